"""A cache of base models. The key of an entry is a hash of config, seed, source code and torch version.

The cache is in $POSTTRAIN_CACHE/base, or else in ~/.cache/posttrain/base. An entry is written under another name and
then renamed, so it is complete or absent. Entries are never removed, except for those that a crash left half-written.
Left out of the key: the processor, on which the last bits of a float depend.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import posttrain
from posttrain.base.config import StageConfig
from posttrain.files import replacing

_HASH_CHARS = 24


def cache_root() -> Path:
    """The folder of the cache."""
    given = os.environ.get("POSTTRAIN_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "posttrain") / "base"


def cache_key(config: StageConfig, seed: int) -> str:
    """A hash of everything on which the weights depend, except for the processor."""
    import torch

    settings = config.model_dump(mode="json", exclude={"cache", "trackers"})
    digest = hashlib.sha256(json.dumps([settings, seed, torch.__version__], sort_keys=True).encode())
    package = Path(posttrain.__file__).parent
    folders = (path for folder in ("base", "model") for path in (package / folder).rglob("*.py"))
    for path in sorted([*folders, package / "data/chat.py", package / "data/images/tiles.py"]):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:_HASH_CHARS]


def fetch(key: str, out: Path) -> bool:
    """Copy the model folder of an entry to `out`, which must not exist. False if there is no such entry."""
    entry = cache_root() / key
    if not (entry / "config.json").is_file():
        return False
    with replacing(out) as aside:
        shutil.copytree(entry, aside)
    return True


def store(key: str, model: Path) -> None:
    """Keep a copy of a model folder. If the cache cannot be written, nothing is kept, and no error is raised."""
    entry = cache_root() / key
    if entry.exists():
        return
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with replacing(entry) as aside:
            shutil.copytree(model, aside)
