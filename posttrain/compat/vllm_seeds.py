"""vLLM: requests with a seed of their own, drawn by the seed and each token's place alone.

Importing this module does not import vLLM. Its function runs in vLLM's worker process.
"""

from functools import partial
from typing import Any

from posttrain.compat.patches import patch

_patch = partial(patch, "vllm")
_BITS = 2**64 - 1


@_patch(
    "0.32.0",
    "fault",
    reason="A request with a seed has a generator that each step advances. After a step that computes only a part of a "
    "prompt it is set back by an offset. Generators on CPUs have none: the engine ends with 'CPU Generator does not "
    "use offset'. A reply that is continued in another engine is drawn like its first tokens again",
    reference="`_bookkeeping_sync` and `_update_states` of vllm/v1/worker/gpu_model_runner.py. The newer runner "
    "(vllm/v1/worker/gpu) draws by place itself",
    test="tests/test_sampling_stream.py::test_a_seed_decides_a_reply_whatever_else_is_sampled",
)
def draw_by_place(runner: Any) -> None:
    """Seed the generator of a request again before each draw. runner: vLLM's model runner."""
    import torch

    class WithoutOffset(torch.Generator):
        """Set back by nothing: the next draw seeds it."""

        def get_offset(self) -> int:
            return 0

        def set_offset(self, offset: int) -> None:
            pass

    def seed_again() -> None:
        batch = runner.input_batch
        for index in list(batch.generators):
            request = runner.requests[batch.req_ids[index]]
            if not isinstance(request.generator, WithoutOffset):
                request.generator = batch.generators[index] = WithoutOffset(device=runner.device)
            place = int(runner.optimistic_seq_lens_cpu[index])  # of the token that is drawn, in prompt and reply
            request.generator.manual_seed(mixed(request.sampling_params.seed, place))

    sample = getattr(runner, "_sample", None)
    if sample is not None:  # the newer runner has no such method

        def sample_by_place(*args: Any) -> Any:
            seed_again()
            return sample(*args)

        runner._sample = sample_by_place


def mixed(seed: int, place: int) -> int:
    """A seed of 64 bits for one place. Source: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (seed + place * 0x9E3779B97F4A7C15) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)
