"""Finds the local copy of a dataset that a config names as OWNER/NAME, and downloads it from the hub if there is none.

Left out: loading scripts. Only the data files of the dataset are read, in the same way as those of a local folder.
"""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from posttrain.data.generated import generated_path, is_generated
from posttrain.data.readers import READERS, data_suffix
from posttrain.errors import DataError

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w./-]+))?")
_CONNECT_S = 3.0


def is_name(path: str) -> bool:
    """Whether a path that does not exist can be the name of a dataset: OWNER/NAME[:SPLIT], without a data suffix."""
    return bool(_NAME.fullmatch(path)) and data_suffix(Path(path)) not in READERS and not Path(path).parent.exists()


def local_path(path: str) -> Path:
    """The local path: `path` itself, or the folder with the local copy of the dataset that it names."""
    return located(path)[0]


def located(path: str) -> tuple[Path, tuple[str, str] | None]:
    """(local path, (name, split)) of a dataset's name, downloading it if needed; (path, None) of any other path.

    The split is "" if the name has none. The rows of a generator (generated.py) are made if needed. Raises `DataError`
    if the dataset cannot be downloaded or made.
    """
    if is_generated(path):
        return generated_path(path), None
    found = Path(path).expanduser()
    named = _NAME.fullmatch(path) if not found.exists() and is_name(path) else None
    return (snapshot(named[1]), (named[1], named[2] or "")) if named else (found, None)


def snapshot(name: str) -> Path:
    """The folder of a dataset's files. Raises `DataError` if it is not on this machine and cannot be downloaded."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    if (why := _unreachable(constants.ENDPOINT)) is not None:
        raise DataError(
            f"{name}: no such file or folder, and the dataset of this name cannot be downloaded: {constants.ENDPOINT} "
            f"{why}; name a local path, or download it on a machine with a network: "
            f"hf download --repo-type dataset {name}"
        )
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name}: no such file or folder, nor can it be downloaded from {constants.ENDPOINT}: {reason}"
        ) from None


def _unreachable(endpoint: str) -> str | None:
    """Why the hub cannot be reached, or None."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "is switched off by HF_HUB_OFFLINE"
    where = urlsplit(endpoint)
    try:
        socket.create_connection(
            (where.hostname, where.port or (80 if where.scheme == "http" else 443)), _CONNECT_S
        ).close()
    except OSError as error:
        return f"cannot be reached ({error.strerror or error})"
    return None
