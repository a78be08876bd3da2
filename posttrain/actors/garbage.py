"""Run Python's cyclic garbage collector rarely where its scans of very many objects would find nothing."""

import contextlib
import gc
from collections.abc import Iterator

ALLOCATIONS = 100_000  # the youngest objects are scanned when this many more were made than freed


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Import in the `with` block without collections; then exclude what there is from all later ones.

    For a process that serves one purpose. An import of torch, transformers or vLLM makes a million objects that all
    stay. The collector would scan them again and again while they are made: a fifth of the time of the import.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
