"""What a rank on another host than the home host needs to be there: its model folder."""

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import UserError
from posttrain.files import move_folder, read_object, remove, write_json
from posttrain.hosts.away import folder_now
from posttrain.model.adapter import CONFIG, base_folder, is_adapter


@dataclass(frozen=True, slots=True)
class ModelHere:
    """A model folder of the home host. path: on this host. base: on the home host; of adapters, that of their base."""

    path: str
    base: str


def staying(key: str, reason: str) -> UserError:
    """The error of a rank that has to be on the home host. key: of the section that says where it runs."""
    return UserError(
        f"{key}: was placed on host {socket.gethostname()}, and {reason}; give the home host the CPUs and GPUs that it "
        "asks for, or name that host in nodes"
    )


def model_here(path: str, key: str, deadline_s: float) -> ModelHere:
    """A model folder of the home host as this host has it. It is pulled if it is not there; with adapters, their base.

    key: as for `staying`. deadline_s: without a byte. Raises UserError for adapters that name their base by a relative
    path.
    """
    found = folder_now(path, deadline_s)
    if not is_adapter(found):
        return ModelHere(found, path)
    base = str(base_folder(found))
    if not os.path.isabs(base):
        raise staying(key, f"{CONFIG} in {path} names its base by the relative path {base!r}")
    return ModelHere(str(_on_base(Path(found), Path(folder_now(base, deadline_s)))), base)


def _on_base(adapters: Path, base: Path) -> Path:
    """A folder with the same adapters, beside theirs, that names this folder as their base."""
    target = adapters.with_name(f"{adapters.name}-{base.name}")
    if target.is_dir():
        return target
    aside = Path(tempfile.mkdtemp(dir=adapters.parent, prefix="."))
    for file in adapters.iterdir():
        if file.name != CONFIG:
            os.link(file, aside / file.name)
    write_json(aside / CONFIG, {**(read_object(adapters / CONFIG) or {}), "base_model_name_or_path": str(base)})
    try:
        move_folder(aside, target)
    except OSError:  # another rank of this host was first
        remove(aside)
    return target
