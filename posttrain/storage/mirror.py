"""The state of a run as objects: files by the hash of their content, and numbered manifests.

    blobs/HASH            the content of a file; written once, never changed
    manifests/NUMBER      which files the run has, who holds it, and since which epoch

`take` begins an epoch, `commit` adds a state to it. Both create the next manifest, which exists only once. A holder
whose number is taken has been succeeded: `Succeeded`.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import xxhash

from posttrain.storage.store import StorageError, Store

MANIFESTS = "manifests"
BLOBS = "blobs"
KEPT = 20  # manifests before the last one; older ones are deleted
WHOLE_BYTES = 64 << 20  # files up to this size are read once, so that one that is written meanwhile is copied whole
STEP_BYTES = 1 << 22


class Manifest(msgspec.Struct, frozen=True):
    """One state of a run. run: names it for ever. epoch: counts its holders. token: the holder's own. holder: host and
    process. files: (hash, size) by path below the run directory. inputs: the same by absolute path, of what the run
    reads elsewhere. cwd: the directory to which paths of the run's configs are relative.
    """

    run: str
    pipeline: str
    epoch: int
    token: str
    holder: str
    time: float
    files: dict[str, tuple[str, int]] = {}
    inputs: dict[str, tuple[str, int]] = {}
    cwd: str = ""

    @property
    def blobs(self) -> set[str]:
        """The hashes of all files."""
        return {digest for digest, _ in (*self.files.values(), *self.inputs.values())}


class Succeeded(Exception):
    """Another host holds the run. manifest: its newest."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        super().__init__(f"{manifest.holder} holds the run since epoch {manifest.epoch}")


class Mirror:
    """The newest state of a run at a store, and the right to add another. number: of the newest manifest."""

    def __init__(self, store: Store, number: int, manifest: Manifest):
        self._store = store
        self._number = number
        self.manifest = manifest
        self._known = manifest.blobs
        self._hashes: dict[Path, tuple[tuple[int, int, int], str]] = {}  # (state, hash) of files that were copied

    def commit(self, files: Mapping[str, Path], inputs: Mapping[str, Path] | None = None) -> None:
        """Copy what is new, and add a manifest. files: by path below the run directory; inputs: None for those before.

        A file that grows while it is copied is copied as far as it was. Raises Succeeded, StorageError, and OSError for
        a file that vanishes.
        """
        found = {name: self._send(path) for name, path in files.items()}
        read = {name: self._send(path) for name, path in inputs.items()} if inputs is not None else self.manifest.inputs
        if (found, read) == (self.manifest.files, self.manifest.inputs):
            self._check_held()
            return
        before, old = self.manifest.blobs, self._number
        manifest = msgspec.structs.replace(self.manifest, time=time.time(), files=found, inputs=read)
        self._number = _create(self._store, old + 1, manifest)
        self.manifest = manifest
        self._store.delete([_blob(digest) for digest in before - manifest.blobs])
        self._known &= manifest.blobs
        self._store.delete([_name(number) for number in range(max(0, old - 2 * KEPT), old - KEPT)])

    def _check_held(self) -> None:
        newest = newest_of(self._store)
        if newest is not None and newest[0] > self._number:
            raise Succeeded(newest[1])

    def _send(self, path: Path) -> tuple[str, int]:
        """Copy a file unless its content is there. Returns its hash and size."""
        before = _state(path)
        if (seen := self._hashes.get(path)) is not None and seen[0] == before:
            return seen[1], before[0]
        if before[0] <= WHOLE_BYTES:
            with path.open("rb") as file:
                data = file.read()
            digest, size = xxhash.xxh3_128_hexdigest(data), len(data)
            if digest not in self._known:
                self._store.create(_blob(digest), data)
        else:
            digest, size = file_digest(path, before[0]), before[0]
            if digest not in self._known:
                self._store.send(_blob(digest), path)
            if _state(path) != before:
                raise StorageError(f"{path} was changed while it was copied")
        self._known.add(digest)
        self._hashes[path] = before, digest
        return digest, size


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced: size, date and inode."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def newest_of(store: Store) -> tuple[int, Manifest] | None:
    """The number and content of the newest manifest; None if there is none."""
    names = store.names(MANIFESTS)
    if not names:
        return None
    number = int(names[-1].rpartition("/")[2])
    try:
        return number, msgspec.json.decode(store.read(names[-1]), type=Manifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise StorageError(f"storage {store.uri}: {names[-1]} is no manifest of a run: {error}") from None


def begin(store: Store, *, run: str, pipeline: str, token: str) -> Mirror:
    """Begin the first epoch of a new run. Raises Succeeded if there is a run already."""
    manifest = Manifest(run, pipeline, 1, token, holder_name(), time.time(), cwd=os.getcwd())
    return Mirror(store, _create(store, 1, manifest), manifest)


def take(store: Store, number: int, manifest: Manifest, *, token: str, cwd: str | None = None) -> Mirror:
    """Begin the next epoch of a run, after its manifest `number`. Raises Succeeded if another host does so too.

    cwd: the directory to which its paths are relative from now on; None for that before.
    """
    own = msgspec.structs.replace(
        manifest, epoch=manifest.epoch + 1, token=token, holder=holder_name(), time=time.time(), cwd=cwd or manifest.cwd
    )
    return Mirror(store, _create(store, number + 1, own), own)


def _create(store: Store, number: int, manifest: Manifest) -> int:
    newest = newest_of(store)
    if newest is not None and newest[0] >= number:
        raise Succeeded(newest[1])
    if not store.create(_name(number), msgspec.json.encode(manifest)):
        newest = newest_of(store)
        assert newest is not None
        raise Succeeded(newest[1])
    return number


def restore(
    store: Store, items: Mapping[str, tuple[str, int]], place: Callable[[str], Path]
) -> Iterator[tuple[Path, int]]:
    """Copy files back, to where `place` says. Yields each with its size. Raises StorageError for damaged content."""
    for name, (digest, size) in sorted(items.items()):
        path = place(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.restoring")
        store.fetch(_blob(digest), aside)
        if aside.stat().st_size != size or file_digest(aside, size) != digest:
            aside.unlink()
            raise StorageError(f"storage {store.uri}: {_blob(digest)} is damaged; it should be {name}")
        aside.replace(path)
        yield path, size


def file_digest(path: Path, size: int) -> str:
    """XXH3-128 of the first `size` bytes of a file."""
    digest, left = xxhash.xxh3_128(), size
    with path.open("rb") as file:
        while left and (part := file.read(min(left, STEP_BYTES))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def holder_name() -> str:
    """This host and process, for messages."""
    return f"{platform.node()}, process {os.getpid()}"


def _name(number: int) -> str:
    return f"{MANIFESTS}/{number:012d}"


def _blob(digest: str) -> str:
    return f"{BLOBS}/{digest[:2]}/{digest}"
