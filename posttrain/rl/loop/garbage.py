"""Run Python's cyclic garbage collector rarely during RL, because its scans of the many records find nothing."""

import contextlib
import gc
from collections.abc import Iterator

ALLOCATIONS = 100_000  # the youngest objects are scanned when this many more were made than freed


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Make collections rare in the `with` block.

    Records hold no reference cycles, so they are freed without the collector. Objects that exist already, mostly those
    of libraries, are excluded from its scans.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
