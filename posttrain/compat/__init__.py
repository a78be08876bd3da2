"""Every place that depends on how an upstream library works inside, one module a library.

An upgrade of a library means reading one module here. Each function carries a `Patch` record: the library's version,
the reason, the upstream reference, and the test that says when the function can go. `PATCHES` lists them all, and
docs/compat.md is made from it by `python -m posttrain.compat`.

    patches.py        the record, the list, the check of installed versions
    deepspeed.py      expert parallelism, the first and the clipped step, state of optimizers
    ray.py            a session that only this host can reach
    torch.py          schedules of another layout, names of operators
    transformers.py   Llama 4's prefix and unread default, how a trainer divides a loss
    trl.py            the pass over the reference model under DeepSpeed
    vllm.py           weight reloading, prefix caches, the queue of requests, tokens of growing replies

Importing this package imports no upstream library: each function imports what it needs when it is called.
Our own features on public seams (a worker extension, a scheduler subclass, a trainer subclass) stay where they belong;
an override of a private method is recorded here.
"""

from posttrain.compat import deepspeed, ray, torch, transformers, trl, vllm
from posttrain.compat.patches import PATCHES, Patch, changed_versions

__all__ = ["PATCHES", "Patch", "changed_versions", "deepspeed", "ray", "torch", "transformers", "trl", "vllm"]
