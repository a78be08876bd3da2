"""vLLM: replies to one prompt share its keys and values to the last few tokens, not only in whole blocks.

vLLM shares a prompt's KV cache in blocks, of 32 tokens on a CPU. What is left of the prompt, all of it where it is
shorter, would be computed again for every reply of a group. vLLM can find a prefix that ends within a block and copy
that block for the request (copy-on-write), but it does so only for models with Mamba layers. Here it does so for every
model whose layers have one kind of cache, on CPUs:

```
8 replies to 27 tokens   vLLM: 8 x 27 tokens are computed   here: 27 + 7 x 3, one step later
```

Importing this module does not import vLLM. Its functions run in the process of the engine core.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from posttrain.compat.patches import patch

_patch = partial(patch, "vllm")
_TEST = "tests/test_sampling_stream.py::test_replies_share_a_prompt_that_fills_no_block"

# Tokens between two places at which a shared prefix may end. A request computes up to so many of its prompt's tokens
# itself. A hash is made for so many tokens of each request, prompt and reply.
UNIT = 4


@_patch(
    "0.32.0",
    "gap",
    reason="Where a model's layers have one kind of KV cache, vLLM looks for shared prefixes in whole blocks only; "
    "`prefix_match_unit` is refused. Its managers and workers can share a part of a block, as they do for Mamba",
    reference="`resolve_kv_cache_block_sizes` of vllm/v1/core/kv_cache_utils.py, `UnitaryKVCacheCoordinator` and "
    "`partial_hash_hits_enabled` of vllm/v1/core/kv_cache_coordinator.py",
    test=_TEST,
)
def share_parts_of_blocks() -> None:
    """From now on, engine cores of this process that run on a CPU share prompts to within `UNIT` tokens."""
    from vllm.v1.core import kv_cache_coordinator
    from vllm.v1.engine import core as engine_core

    # The names are not among those that the modules offer.
    coordinator: Any = kv_cache_coordinator
    core: Any = engine_core
    if getattr(core, "_posttrain_shares_parts", False):
        return
    resolve, enabled = core.resolve_kv_cache_block_sizes, coordinator.partial_hash_hits_enabled
    Unitary = coordinator.UnitaryKVCacheCoordinator

    def resolve_sizes(kv_cache_config: Any, vllm_config: Any) -> tuple[int, int]:
        block, unit = resolve(kv_cache_config, vllm_config)
        return block, UNIT if _can_share(kv_cache_config, vllm_config, block) else unit

    def has_partial_hits(groups: Any, hash_block_size: int, *rest: Any) -> bool:
        one = len(groups) == 1 and hash_block_size < groups[0].kv_cache_spec.block_size
        return one or enabled(groups, hash_block_size, *rest)

    def one_group(kv_cache_config: Any, *args: Any, hash_block_size: int, **rest: Any) -> Any:
        is_whole = hash_block_size == kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        kind = Unitary if is_whole else coordinator.HybridKVCacheCoordinator
        return kind(kv_cache_config, *args, hash_block_size=hash_block_size, **rest)

    changed: dict[Any, dict[str, Callable[..., Any]]] = {
        core: {"resolve_kv_cache_block_sizes": resolve_sizes},
        coordinator: {"partial_hash_hits_enabled": has_partial_hits, "UnitaryKVCacheCoordinator": one_group},
    }
    for module, functions in changed.items():
        for name, function in functions.items():
            setattr(module, name, function)
    core._posttrain_shares_parts = True


def _can_share(kv_cache_config: Any, vllm_config: Any, block: int) -> bool:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    groups = kv_cache_config.kv_cache_groups
    return (
        vllm_config.device_config.device_type == "cpu"
        and vllm_config.cache_config.enable_prefix_caching
        and vllm_config.parallel_config.decode_context_parallel_size == 1
        and len(groups) == 1
        and block % UNIT == 0
        and KVCacheSpecRegistry.get_manager_class(groups[0].kv_cache_spec, groups[0].role) is FullAttentionManager
    )


@_patch(
    "0.32.0",
    "gap",
    reason="vLLM offers a part of a block to other requests as soon as it is scheduled, and copies it before the step "
    "in which it is computed: a request of the same step would read keys and values that are not there yet. Of a "
    "finished request it offers the prompt only, so that the next turn of a conversation computes a part of the reply "
    "again",
    reference="`_cache_partial_tail_block` of vllm/v1/core/single_type_kv_cache_manager.py; `kv_cache_block_copies` of "
    "vllm/v1/worker/gpu_model_runner.py",
    test=_TEST,
)
class PartialBlocks:
    """The parts of blocks that requests of one scheduler share.

    scheduler: vLLM's `Scheduler`. Nothing is done where prefixes are shared in whole blocks.
    """

    def __init__(self, scheduler: Any):
        self._block_size, self._unit = scheduler.block_size, scheduler.hash_block_size
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._is_on = len(self._managers) == 1 and self._unit < self._block_size
        self._new: set[int] = set()  # ids of the blocks of which this step computes the part that is offered
        self._waiting: str | None = None  # the request that was looked up last, if it has to wait
        pool = scheduler.kv_cache_manager.block_pool
        self._offer = pool.cache_partial_block
        pool.cache_partial_block = self._note

    def _note(self, *, request: Any, block: Any, num_tokens: int, **rest: Any) -> Any:
        if request.num_computed_tokens < num_tokens:
            self._new.add(block.block_id)
        return self._offer(request=request, block=block, num_tokens=num_tokens, **rest)

    def begin_step(self) -> None:
        """What the last step computed may be copied now."""
        self._new.clear()

    def look_up(self, request: Any, blocks: Any, num_tokens: int) -> None:
        """Note whether a request, whose cached prefix of `num_tokens` tokens lies in `blocks`, has to wait a step."""
        is_part = self._is_on and num_tokens % self._block_size != 0
        must_wait = is_part and blocks.blocks[0][-1].block_id in self._new
        self._waiting = request.request_id if must_wait else None

    def is_waiting(self, request: Any) -> bool:
        """Whether the request, which was looked up last, has to wait."""
        return self._waiting == request.request_id

    def keep_end(self, request: Any) -> None:
        """Offer the end of a finished request to a request that continues it."""
        num_tokens = request.num_computed_tokens // self._unit * self._unit
        if not self._is_on or num_tokens % self._block_size == 0:
            return
        manager, size = self._managers[0], self._block_size
        blocks = manager.req_to_blocks[request.request_id]
        if num_tokens < len(blocks) * size:
            block, group = blocks[num_tokens // size], manager.kv_cache_group_id
            self._offer(request=request, block=block, num_tokens=num_tokens, kv_cache_group_id=group, block_size=size)
