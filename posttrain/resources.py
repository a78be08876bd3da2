"""Where the YAML that ships with the package lies.

In a checkout it is the top-level folders pipelines/ and configs/; in a wheel the same folders are subpackages. Both are
plain files on a disk: nothing is read out of a zip.
"""

import importlib
from pathlib import Path
from typing import Literal

from posttrain.errors import ConfigError

Kind = Literal["pipelines", "configs"]


def bundled_dir(kind: Kind) -> Path:
    """The folder that holds the bundled pipelines or configs."""
    try:
        package = importlib.import_module(f"posttrain.{kind}")
    except ModuleNotFoundError:  # run from a checkout that was never installed
        return Path(__file__).resolve().parent.parent / kind
    return Path(next(iter(package.__path__)))


def bundled_names(kind: Kind) -> list[str]:
    """Names that `bundled` takes, sorted: paths below the folder without `.yaml`, such as `models/tiny`."""
    folder = bundled_dir(kind)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def bundled(kind: Kind, name: str) -> Path:
    """The path of a bundled YAML file. `name` is its path below the folder, with or without `.yaml`.

    Raises ConfigError, which lists the names there are, if there is none of that name.
    """
    wanted = name.removesuffix(".yaml")
    if wanted not in bundled_names(kind):
        raise ConfigError(name, [f"no bundled file of that name in {kind}; there are {', '.join(bundled_names(kind))}"])
    return bundled_dir(kind) / f"{wanted}.yaml"
