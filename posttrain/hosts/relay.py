"""Bytes from host to host over TCP: whoever holds a part of them already serves that part on.

    source ──► host 1 ──► host 2 ──► host 3      each host pulls from the one before it, and serves what it has so far
       └─────────────────────────┘               host 2 is lost: host 3 goes on at the same byte, from host 1 or source

So the source sends one copy, whatever the number of hosts, and a lost host costs a second or two. Each relay has
a secret of its own, which a reader must know; the secret travels by Ray alone. Nothing is encrypted. Left out: what the
bytes mean. A reader checks them while they arrive (`check` of `pull`), and what does not agree is read again.
"""

import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from posttrain.errors import PosttrainError

SECRET_BYTES = 32
REQUEST = struct.Struct(f">{SECRET_BYTES}sQH")  # secret, first byte wanted, length of the name that follows
STEP_BYTES = 4 << 20
# A reader that hears nothing for so long goes on with its next source. Readers further down a chain wait longer, so
# that the one right behind a lost host finds it out first, and those behind it only see a pause.
SILENCE_S = 0.5
SILENCE_STEP_S = 0.25
MAX_SILENCE_S = 5.0
SEND_S = 20.0  # a reader that takes nothing for so long is left
ROUND_S = 0.2  # between two rounds over all sources


class RelayError(PosttrainError):
    """Bytes did not arrive from another host."""


class Mismatch(Exception):
    """Raised by `check` of `pull`. start: where the bytes begin that are to be read again. what: what they are."""

    def __init__(self, start: int, what: str):
        super().__init__(what)
        self.start = start
        self.what = what


class Source(msgspec.Struct, frozen=True):
    """A relay as a reader finds it. Example: `Source("10.0.0.5", 40123, "9f…", "process 7 on worker-1")`."""

    address: str
    port: int
    secret: str
    peer: str


@dataclass(slots=True)
class _Holding:
    descriptor: int
    num_bytes: int
    have: int


class Relay:
    """Serves files by name to readers on other hosts, also while they grow. `address` is that of this host."""

    def __init__(self, address: str):
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._holdings: dict[str, _Holding] = {}
        self._changed = threading.Condition()
        self._server = socket.create_server((address, 0))
        peer = f"process {os.getpid()} on {socket.gethostname()}"
        self.source = Source(address, self._server.getsockname()[1], self._secret.hex(), peer)
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def hold(self, name: str, descriptor: int, num_bytes: int, *, have: int | None = None) -> None:
        """Serve an open file as `name`. have: how many of its bytes are there so far; None means all."""
        with self._changed:
            self._holdings[name] = _Holding(descriptor, num_bytes, num_bytes if have is None else have)
            self._changed.notify_all()

    def grew(self, name: str, have: int) -> None:
        """Note that the first `have` bytes are there."""
        with self._changed:
            if (holding := self._holdings.get(name)) is not None:
                holding.have = max(holding.have, have)
            self._changed.notify_all()

    def drop(self, name: str) -> None:
        """Serve a name no longer: its bytes are about to be overwritten."""
        with self._changed:
            self._holdings.pop(name, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Serve nothing any more."""
        with self._changed:
            self._holdings.clear()
            self._changed.notify_all()
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(SEND_S)
            try:
                secret, offset, length = REQUEST.unpack(_read(connection, REQUEST.size))
                if not hmac.compare_digest(secret, self._secret):
                    return
                name = _read(connection, length).decode()
                while (step := self._next(name, offset)) is not None:
                    _wait_for_room(connection)
                    offset += os.sendfile(connection.fileno(), step[0], offset, step[1])
            except (OSError, ValueError):  # the reader is gone, or what it asked for is no request
                return

    def _next(self, name: str, offset: int) -> tuple[int, int] | None:
        """Wait for bytes from `offset` on. Returns the descriptor and their number; None if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._has(name, offset), MAX_SILENCE_S)
            holding = self._holdings.get(name)
            if holding is None or holding.have <= offset:
                return None
            return holding.descriptor, min(holding.have - offset, STEP_BYTES)

    def _has(self, name: str, offset: int) -> bool:
        holding = self._holdings.get(name)
        return holding is not None and (holding.have > offset or offset >= holding.num_bytes)


def _wait_for_room(connection: socket.socket) -> None:
    """Wait until the reader takes bytes. Raises TimeoutError if it takes none for SEND_S."""
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    if not poller.poll(SEND_S * 1000):
        raise TimeoutError


def _read(connection: socket.socket, length: int) -> bytes:
    """Exactly `length` bytes. Raises OSError if the other side ends before."""
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionError("ended early")
        data += part
    return data


def silence_s(num_sources: int) -> float:
    """How long a reader with so many sources waits for the next byte. The first of a chain has one."""
    return min(SILENCE_S + SILENCE_STEP_S * (num_sources - 1), MAX_SILENCE_S)


def pull(
    name: str,
    place: memoryview,
    sources: Sequence[Source],
    *,
    deadline_s: float,
    grew: Callable[[int], None] = lambda have: None,
    check: Callable[[int], None] = lambda have: None,
) -> list[str]:
    """Fill `place` with the bytes that the sources serve as `name`. Returns why a source was left, for each time.

    sources: in the order of preference; all of them, again and again, until `deadline_s` have passed without progress.
    grew: called with the number of bytes that are there. check: called with the same number before; it verifies what is
    complete, and raises Mismatch for what must be read again. Raises RelayError, which says what was waited for.
    """
    have, most, progress = 0, 0, time.monotonic()
    left: list[str] = []
    silent_s = silence_s(len(sources))
    while True:
        for source in sources:
            try:
                with socket.create_connection((source.address, source.port), timeout=silent_s) as connection:
                    text = name.encode()
                    connection.sendall(REQUEST.pack(bytes.fromhex(source.secret), have, len(text)) + text)
                    while have < len(place):
                        got = connection.recv_into(place[have : have + STEP_BYTES])
                        if not got:
                            raise ConnectionError("it ended before the last byte")
                        check(have + got)
                        have += got
                        grew(have)
                        if have > most:  # what was damaged and is read again is no progress
                            most, progress = have, time.monotonic()
            except Mismatch as error:
                left.append(f"{source.peer}: {error.what} arrived damaged")
                have = error.start
            except OSError as error:
                left.append(f"{source.peer}: {error}")
            if have == len(place):
                return left
            if time.monotonic() - progress > deadline_s:
                raise RelayError(
                    f"{name}: {have} of {len(place)} bytes arrived, and none in the last {deadline_s:g} s; {left[-1]}"
                )
        time.sleep(ROUND_S)
