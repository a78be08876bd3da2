"""vLLM: prompts with pictures, and what a weight update must make it forget of them.

Importing this module does not import vLLM.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.compat.patches import patch

if TYPE_CHECKING:
    import torch

_patch = partial(patch, "vllm")
_TEST = "tests/test_vision_engine.py"


@_patch(
    "0.32.0",
    "fault",
    reason="On CPUs the first picture ends the engine: Llama 4's vision encoder hands a permuted tensor to oneDNN, "
    "which takes rows that lie together only ('Expected a.stride(-1) == 1')",
    reference="vllm/model_executor/models/mllama4.py, `Llama4UnfoldConvolution.forward`",
    test=f"{_TEST}::test_an_engine_samples_from_what_the_trainer_computes",
)
def contiguous_patches() -> None:
    """Make the patches of a picture contiguous before they are embedded. On GPUs nothing is changed."""
    from vllm.model_executor.models.mllama4 import Llama4UnfoldConvolution as Unfold
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or getattr(Unfold, "_posttrain_repaired", False):
        return

    def forward(self: Any, hidden_states: "torch.Tensor") -> "torch.Tensor":
        return self.linear(self.unfold(hidden_states).permute(0, 2, 1).contiguous())[0]

    Unfold.forward = forward  # type: ignore[method-assign]
    Unfold._posttrain_repaired = True  # type: ignore[attr-defined]


@_patch(
    "0.32.0",
    "gap",
    reason="No public function makes the tiles of pictures apart from a prompt. A prompt of token ids is expanded by "
    "vLLM itself, also where its pictures are expanded already, and a reply that goes on elsewhere is part of it",
    reference="`_process_multimodal` of vllm/renderers/base.py",
    test=f"{_TEST}::test_an_engine_samples_from_what_the_trainer_computes",
)
def render_pictures(llm: Any, image_id: int, pictures: Sequence[Any], *, keys: Sequence[str]) -> Any:
    """What vLLM makes of pictures: their tiles, and the token ids of a prompt of nothing but them.

    image_id: the id of <|image|>. keys: a name for the content of each picture. Tiles are always part of the result:
    vLLM would leave them out where it believes that the engine core has them, and the core may have forgotten them.
    """
    return llm.renderer._process_multimodal(
        [image_id] * len(pictures), {"image": list(pictures)}, {"image": list(keys)}, None, skip_mm_cache=True
    )


@_patch(
    "0.32.0",
    "gap",
    reason="No public function tells how many bytes the tiles of a rendered prompt take, so that a cache of them could "
    "have a bound",
    reference="`MultiModalCache.get_lru_cache` of vllm/multimodal/cache/base.py",
    test=f"{_TEST}::test_a_picture_is_cut_and_encoded_once_for_the_replies_of_its_group",
)
def rendered_cache(gib: float) -> Any:
    """A cache of what `render_pictures` made, by name, of at most so many GiB: what was used last stays longest.

    It raises ValueError for a value that has no room even in the empty cache.
    """
    from vllm.multimodal.cache.base import MultiModalCache

    of_prompts: Any = dict  # of tensors and numbers, which it measures
    return MultiModalCache.get_lru_cache(gib, of_prompts)


def engine_prompt(prompt_ids: list[int], rendered: Any, *, salt: str | None = None) -> Any:
    """A prompt as vLLM takes it, with a `cache_salt`. rendered: what `render_pictures` made of its pictures, or None.

    The pictures are those that the prompt shows first, in order. Raises ValueError if a picture's token ids, as vLLM
    makes them, are not in the prompt: another number of tokens would stand for it in the engine than in the trainer.
    """
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import PlaceholderRange

    if rendered is None:
        return tokens_input(prompt_ids, cache_salt=salt)
    own, places, start = rendered["prompt_token_ids"], [], 0
    for number, place in enumerate(rendered["mm_placeholders"]["image"]):
        ids = list(own[place.offset : place.offset + place.length])
        start = _find(prompt_ids, ids, start)
        if start < 0:
            raise ValueError(f"the {len(ids)} tokens of picture {number + 1} are not in the prompt as vLLM makes them")
        places.append(PlaceholderRange(offset=start, length=place.length, is_embed=place.is_embed))
        start += place.length
    return mm_input(prompt_ids, rendered["mm_kwargs"], rendered["mm_hashes"], {"image": places}, cache_salt=salt)


def _find(ids: list[int], wanted: list[int], start: int) -> int:
    """The first place, from `start` on, at which `wanted` stands in `ids`; -1 if there is none."""
    last = len(ids) - len(wanted)
    while start <= last:
        try:
            start = ids.index(wanted[0], start, last + 1)
        except ValueError:
            return -1
        if ids[start : start + len(wanted)] == wanted:
            return start
        start += 1
    return -1


@_patch(
    "0.32.0",
    "fault",
    reason="The worker is sent no tiles of a picture whose tokens lie in the prefix cache when a request starts. The "
    "engine ends with 'Encoder cache miss' if the request is computed again, after new weights or because memory was "
    "short, and no other request has the picture",
    reference="`NewRequestData.from_request` of vllm/v1/core/sched/output.py",
    test=f"{_TEST}::test_a_reply_is_computed_again_whose_picture_was_read_for_another",
)
def keep_tiles() -> None:
    """Have the scheduler of this process send all tiles of a request to its workers."""
    from vllm.v1.core.sched import output

    output.strip_covered_mm_data = lambda features, *_, **__: features  # type: ignore[attr-defined]


@_patch(
    "0.32.0",
    "fault",
    reason="`pause_scheduler_async(clear_cache=True)` empties the engine core's cache of pictures, and not its twin in "
    "the process of the AsyncLLM, which then sends no tiles: replies to known pictures end at once, empty. "
    "Without clear_cache, the features of pictures that were computed with the old weights are used on",
    reference="`_reset_caches` of vllm/v1/engine/core.py; `reset_encoder_cache` of vllm/v1/engine/async_llm.py",
    test=f"{_TEST}::test_new_weights_make_new_features",
)
async def forget_weights(llm: Any, *, running: bool, prefixes: bool = True) -> None:
    """Have a paused engine forget what it has computed with its weights, and keep the tiles of pictures.

    running: also the KV cache of running requests, which is computed again when they continue. prefixes: False keeps
    all keys and values, for requests with the salts under which they were computed.
    """
    if running or prefixes:
        await llm.reset_prefix_cache(reset_running_requests=running)
    if llm.model_config.is_multimodal_model:
        await llm.reset_encoder_cache()
