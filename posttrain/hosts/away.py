"""What a process on another host reads from the home host, and what it has written for it.

    read     folder of the home host ──► cache of this host           folder_now
    written  folder of this host ──► offered ──► the home host takes it    HandedOver, take_over

The home host takes; nothing is sent to it unasked. So a process that was replaced while its host was cut off cannot
write there when the host is back: nobody takes what it offers.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import StageError
from posttrain.files import OUT_OF_SPACE
from posttrain.hosts.directory import directory, enroll_here, folder_here
from posttrain.hosts.folders import CACHE_VARIABLE, FolderOffer, cache_folder, offer_folder
from posttrain.hosts.placement import this_address, this_node
from posttrain.hosts.relay import Relay


async def is_away() -> bool:
    """Whether this process is on another host than the home host of its run."""
    hosts = directory()
    return hosts is not None and await hosts.home.remote() != this_node()


def now_away() -> bool:
    """As `is_away`, for a process without an event loop."""
    return asyncio.run(is_away())


def enroll_now() -> None:
    """Have this process ended if the home host is not heard for long; nothing on the home host. See `enroll_here`."""
    asyncio.run(enroll_here(os.getpid()))


def folder_now(folder: str, deadline_s: float) -> str:
    """Where this process finds a folder of the home host. See `folder_here`."""
    return asyncio.run(folder_here(folder, deadline_s))


class HandedOver:
    """Folders that this process writes for the home host, one after the other. Each is kept until the next is begun.

    They lie in the cache of the host. What processes have left there that were killed is deleted.
    """

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._place = cache_folder() / "away"
        for left in self._place.glob("*"):
            with contextlib.suppress(OSError):  # its process lives
                descriptor = _locked(left)
                shutil.rmtree(left, ignore_errors=True)
                os.close(descriptor)

    def begin(self, name: str) -> Path:
        """A path for the next folder. The one before is deleted: the home host has it."""
        self._held.close()
        self._place.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=self._place))
        self._held.callback(os.close, _locked(scratch))
        self._held.callback(shutil.rmtree, scratch, ignore_errors=True)
        return scratch / name

    def offer(self, folder: Path) -> FolderOffer:
        """Serve a folder that is complete, until the next is begun."""
        return self._held.enter_context(offered(folder))

    def close(self) -> None:
        """Delete what is held."""
        self._held.close()


@contextlib.contextmanager
def offered(folder: Path) -> Iterator[FolderOffer]:
    """Serve a folder that is complete, within the block."""
    with contextlib.ExitStack() as opened:
        relay = Relay(this_address())
        try:
            yield offer_folder(folder, relay, opened)
        finally:
            relay.close()  # before the files are closed


@contextlib.contextmanager
def host_named() -> Iterator[None]:
    """Within the block, the error of a disk that is full names this host."""
    try:
        yield
    except OSError as error:
        if error.errno not in OUT_OF_SPACE:
            raise
        raise StageError(
            f"host {socket.gethostname()}: {error.filename or 'its disk'} cannot be written: {error.strerror}; free "
            f"some space, or set {CACHE_VARIABLE} to a larger disk on that host"
        ) from error


def _locked(folder: Path) -> int:
    """The descriptor of a folder that no other process has locked, which is locked until it is closed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


async def take_over(offer: FolderOffer | None, folder: Path, deadline_s: float) -> None:
    """Have the home host write an offer to a folder of its own. Nothing for None, which is there already.

    Raises RelayError if nothing arrives for `deadline_s`.
    """
    from ray.exceptions import RayTaskError

    if offer is None:
        return
    hosts = directory()
    try:
        agent = await hosts.agent.remote(await hosts.home.remote())
        await agent.take.remote(offer, str(folder.absolute()), deadline_s)
    except RayTaskError as error:
        raise error.cause from None
