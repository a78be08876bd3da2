"""What the steps of an engine cost, as sums that only grow: for a fit by least squares no step need be kept.

    engine core: StepClock ──► StepSums in a small file that both processes map ──► engine's actor: `taken`

A step gives each of c sequences a token and computes p further tokens of prompts. What its seconds may depend on are
the terms 1, c and p. Its seconds are those from its beginning to that of the next one, or to its end if there is
nothing more to do, without the time in which the core waited for a processor. So they are the same on a machine with
other work. Steps that an update of the weights interrupts are left out.
"""

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Collection, Sequence

import numpy as np

from posttrain.sampling.progress import give_up, shared_file

PATH = "POSTTRAIN_STEP_SUMS"  # the environment variable that tells the engine core the file
TERMS = 3
_PAIRS = [(first, second) for first in range(TERMS) for second in range(first, TERMS)]
_NUMBERS = struct.Struct(f"<{len(_PAIRS) + TERMS}d")


class StepSums:
    """The sums over steps, in a file at `path` that another process may map too.

    They are those of the products of each two terms, (1, 1), (1, c), (1, p), (c, c) and so on, and then those of
    the products of each term with the seconds.
    """

    def __init__(self, path: str):
        self.path = path
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(descriptor, _NUMBERS.size)
        finally:
            os.close(descriptor)
        self._taken = self._read()

    @classmethod
    def create(cls) -> "StepSums":
        """Make a new file. Call `give_up` once the other process has opened it."""
        return cls(shared_file("posttrain-steps", _NUMBERS.size))

    def add(self, sequences: int, prompt_tokens: int, seconds: float) -> None:
        """Count a step."""
        new = sums_of_step(sequences, prompt_tokens, seconds)
        _NUMBERS.pack_into(self._map, 0, *(old + more for old, more in zip(self._read(), new, strict=True)))

    def taken(self) -> list[float]:
        """The sums since the last call, in the order above."""
        now, before = self._read(), self._taken
        self._taken = now
        return [new - old for new, old in zip(now, before, strict=True)]

    def give_up(self) -> None:
        """Give up the path; both processes keep their mapping."""
        give_up(self.path)

    def _read(self) -> tuple[float, ...]:
        return _NUMBERS.unpack_from(self._map)


def sums_of_step(sequences: int, prompt_tokens: int, seconds: float) -> list[float]:
    """The products of one step, in the order of the sums."""
    terms = (1.0, float(sequences), float(prompt_tokens))
    return [*(terms[first] * terms[second] for first, second in _PAIRS), *(term * seconds for term in terms)]


def as_equations(sums: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The normal equations of a fit: products of two terms, [TERMS, TERMS], and of terms and seconds, [TERMS]."""
    products = np.zeros((TERMS, TERMS))
    for (first, second), value in zip(_PAIRS, sums, strict=False):
        products[first, second] = products[second, first] = value
    return products, np.array(sums[len(_PAIRS) :])


class StepClock:
    """Times the steps of an engine's scheduler. It is made, and used, in the thread that runs them.

    waits: what Linux tells of the time in which this thread waited for a processor. Where a kernel tells nothing, that
    time counts as the step's.
    """

    def __init__(self, sums: StepSums, waits: str = "/proc/thread-self/schedstat"):
        self._sums = sums
        self._open: tuple[int, int] | None = None  # sequences and prompt tokens of the step that runs
        self._since = 0.0
        self._waits: int | None = None
        with contextlib.suppress(OSError):
            self._waits = os.open(waits, os.O_RDONLY)

    def begin(self, scheduled: Collection[int]) -> None:
        """What the step computes that has begun with the last `end`. scheduled: tokens of each sequence."""
        if scheduled:
            self._open = (len(scheduled), sum(scheduled) - len(scheduled))

    def end(self) -> None:
        """The step that runs, if there is one, has ended."""
        now = self._now()
        if self._open is not None:
            self._sums.add(*self._open, now - self._since)
        self._open, self._since = None, now

    def forget(self) -> None:
        """Leave the step out that has begun."""
        self._open = None

    def _now(self) -> float:
        """Seconds in which this thread did not wait for a processor. It may well have waited for a device."""
        waited_ns = 0 if self._waits is None else int(os.pread(self._waits, 64, 0).split()[1])
        return time.perf_counter() - waited_ns * 1e-9
