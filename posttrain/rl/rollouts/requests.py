"""What the policy is asked for: a request for the replies to one prompt."""

from posttrain.config.shared import SamplingConfig
from posttrain.rl.records import DrawnPrompt
from posttrain.sampling.requests import SampleRequest


def sample_request(
    sampling: SamplingConfig, prompt: DrawnPrompt, n: int, *, stop_ids: tuple[int, ...]
) -> SampleRequest:
    """The request for `n` replies to a prompt. stop_ids: token ids that end a reply."""
    return SampleRequest(
        prompt.prompt.token_ids, n, sampling.temperature, max_tokens=sampling.max_tokens, stop_token_ids=stop_ids
    )
