"""Model folders on other hosts: by the hash of their content, in a cache of the host, once for all its processes.

The home host lists a folder with a hash of each file. Another host that has a folder of the same content in its cache
uses it; otherwise it pulls the files and checks each. A folder is complete as soon as it has its name. In the same way
the home host takes what the ranks of a trainer on another host have written.
"""

import contextlib
import mmap
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import xxhash

from posttrain.errors import UserError
from posttrain.files import remove, replacing
from posttrain.hosts.relay import Mismatch, Relay, Source, pull

CACHE_VARIABLE = "POSTTRAIN_CACHE"
KEPT = 4  # folders in the cache; the ones used least recently are removed
BLOCK_BYTES = 8 << 20


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a folder. name: relative to it. digest: XXH3-128 of its content."""

    name: str
    num_bytes: int
    digest: str


class FolderOffer(msgspec.Struct, frozen=True):
    """A folder that its host serves. Example: `FolderOffer("/runs/a/model", (entry, ...), source)`."""

    folder: str
    files: tuple[FileEntry, ...]
    source: Source

    @property
    def digest(self) -> str:
        """A hash of the names and the content of all files."""
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(self.files))

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(file.num_bytes for file in self.files)


def offer_folder(folder: Path, relay: Relay, opened: contextlib.ExitStack | None = None) -> FolderOffer:
    """List a folder, and serve its files. Each file stays open, so that what is served is what was listed.

    opened: closes the files.
    """
    entries = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        if opened is not None:
            opened.callback(os.close, descriptor)
        size = os.fstat(descriptor).st_size
        entry = FileEntry(str(path.relative_to(folder)), size, _digest(descriptor, size))
        relay.hold(_served_name(entry), descriptor, size)
        entries.append(entry)
    return FolderOffer(str(folder), tuple(entries), relay.source)


def state_of(folder: Path) -> tuple[object, ...]:
    """A value that changes when a file of a folder is written."""
    files = [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return (str(folder), *((name, status.st_size, status.st_mtime_ns) for name, status in files))


def cache_folder() -> Path:
    """Where model folders from other hosts are kept: POSTTRAIN_CACHE, or the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def fetch_folder(offer: FolderOffer, deadline_s: float) -> Path:
    """The folder in this host's cache; pulled first if it is not there.

    Raises UserError if the disk has no room for it, and RelayError if nothing arrives for `deadline_s`.
    """
    cache = cache_folder() / "models"
    folder = cache / offer.digest
    if folder.is_dir():
        os.utime(folder)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < offer.num_bytes:
        raise UserError(
            f"host {socket.gethostname()}: {cache} has {free / 1e9:.1f} GB free, and the model {offer.folder} has "
            f"{offer.num_bytes / 1e9:.1f} GB; free some space, or set {CACHE_VARIABLE} to a larger disk on that host"
        )
    take_folder(offer, folder, deadline_s)
    for old in sorted(_complete(cache), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        remove(old)
    return folder


def take_folder(offer: FolderOffer, folder: Path, deadline_s: float) -> None:
    """Pull the files of an offer to `folder`, whole or not at all. What was there is replaced.

    Raises RelayError if nothing arrives for `deadline_s`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as aside:
        for file in offer.files:
            _fetch_file(file, aside / file.name, offer.source, deadline_s=deadline_s)


def _complete(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _fetch_file(file: FileEntry, path: Path, source: Source, *, deadline_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb+") as opened:
        if not file.num_bytes:
            return
        opened.truncate(file.num_bytes)
        with mmap.mmap(opened.fileno(), file.num_bytes) as mapped, memoryview(mapped) as place:
            pull(_served_name(file), place, [source], deadline_s=deadline_s, check=_checker(file, place))


def _checker(file: FileEntry, place: memoryview) -> Callable[[int], None]:
    """Compares the hash of a file once its last byte is there."""

    def check(have: int) -> None:
        if have == file.num_bytes and xxhash.xxh3_128_hexdigest(place) != file.digest:
            raise Mismatch(0, f"file {file.name}")

    return check


def _served_name(file: FileEntry) -> str:
    return f"file {file.digest}"


def _digest(descriptor: int, num_bytes: int) -> str:
    digest, offset = xxhash.xxh3_128(), 0
    while offset < num_bytes:
        block = os.pread(descriptor, BLOCK_BYTES, offset)
        if not block:
            raise OSError("a file became shorter while it was read")
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()
