"""Python's garbage collector beside a loop that moves many records, which it looks at again and again for nothing."""

import contextlib
import gc
from collections.abc import Iterator

ALLOCATIONS = 100_000  # more containers made than freed, before it looks at the youngest


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Records hold no cycles, so they are freed without it. What is there already, libraries mostly, is left out."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
