"""All code that depends on the internals of an upstream library, one module for each library.

Whoever upgrades a library reads one module here. Each function has a `Patch` record: the library's version, the reason,
the upstream reference, and the test that tells when the function can be deleted. `PATCHES` lists all records, and
`python -m posttrain.compat` prints docs/compat.md from them.

    patches.py        the record, the list, the check of installed versions
    deepspeed.py      expert parallelism, the first step, clipping, the state of optimizers
    ray.py            a session that only this host can reach
    torch.py          learning-rate schedules in another layout, names of operators
    torchvision.py    its Python part beside a CPU build of torch (torchvision_operators.py is copied out)
    transformers.py   two faults of Llama 4's classes, how a trainer divides a loss
    trl.py            the pass over the reference model under DeepSpeed
    vllm.py           weight reloading, prefix caches, the queue of requests, tokens of unfinished replies
    vllm_images.py    prompts with pictures, and what a weight update must make an engine forget of them
    vllm_parsers.py   the names of its parsers of calls
    vllm_prefixes.py  prompts that share a part of a block of the KV cache
    vllm_seeds.py     requests with a seed of their own
    vllm_twin.py      new weights that are built beside generation, on CPUs

Importing this package imports no upstream library: each function imports what it needs when it is called.
Code of ours that uses a public interface (a worker extension, a scheduler subclass, a trainer subclass) stays in the
folder of its feature. Where it overrides a private method, a record here says so.
"""

from posttrain.compat import (
    deepspeed,
    ray,
    torch,
    torchvision,
    transformers,
    trl,
    vllm,
    vllm_images,
    vllm_parsers,
    vllm_prefixes,
    vllm_seeds,
    vllm_twin,
)
from posttrain.compat.patches import PATCHES, Patch, changed_versions

__all__ = [
    "PATCHES",
    "Patch",
    "changed_versions",
    "deepspeed",
    "ray",
    "torch",
    "torchvision",
    "transformers",
    "trl",
    "vllm",
    "vllm_images",
    "vllm_parsers",
    "vllm_prefixes",
    "vllm_seeds",
    "vllm_twin",
]
