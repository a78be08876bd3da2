"""The request for the replies to one prompt, and the seed of a deterministic wave."""

from posttrain.config.engines import SamplingConfig
from posttrain.records import DrawnPrompt
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight


def sample_request(
    sampling: SamplingConfig, prompt: DrawnPrompt, n: int, *, stop_ids: tuple[int, ...]
) -> SampleRequest:
    """The request for `n` replies to a prompt. stop_ids: token ids that end a reply."""
    return SampleRequest(
        prompt.prompt.token_ids,
        n,
        sampling.temperature,
        max_tokens=sampling.max_tokens,
        stop_token_ids=stop_ids,
        pictures=prompt.prompt.pictures,
    )


def wave_seed(seed: int, flight: Flight) -> int:
    """The seed of a deterministic wave whose first group is `flight`. It depends on `seed` and the group's order."""
    return (seed * 1_000_003 + flight.order) % 2**31
