"""A request as vLLM takes it, and vLLM's finished output as a completion."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from posttrain.records import FinishReason, VersionSpan
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.sampling.stream import finish_reason_of

if TYPE_CHECKING:
    from vllm import CompletionOutput, RequestOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs


def sampling_params(request: SampleRequest, num_begun: int = 0, stream: bool = False) -> "SamplingParams":
    """How vLLM shall sample a request.

    num_begun: tokens of the reply that another engine sampled before. stream: for one reply that is collected in
    pieces; otherwise for all `n` replies, which vLLM gives when they are finished.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1 if stream else request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=1 if request.choice_ids else request.max_tokens - num_begun,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # the request names all ends; those of the engine's first folder may be of another model
        allowed_token_ids=list(request.choice_ids) if request.choice_ids else None,
        logprobs=len(request.choice_ids) if request.choice_ids else 0,
        flat_logprobs=True,
        stop=list(request.stop) or None,
        include_stop_str_in_output=bool(request.stop),
        seed=request.seed,
        detokenize=bool(request.stop),  # otherwise the whole reply is decoded at once when it is finished
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def end_of(begun: tuple[int, ...], request: SampleRequest, decode: Callable[[list[int]], str]) -> FinishReason:
    """How a reply that was begun elsewhere has ended; RUNNING if it goes on."""
    if begun and begun[-1] in request.stop_token_ids:
        return FinishReason.STOP
    if begun and request.stop and any(text in decode(list(begun)) for text in request.stop):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(begun) >= request.max_tokens else FinishReason.RUNNING


def completions_of(final: "RequestOutput", decode: Callable[[list[int]], str]) -> list[Completion]:
    """The replies of a finished request, in their order."""
    outputs = sorted(final.outputs, key=lambda output: output.index)
    return [_completion(output, decode) for output in outputs]


def _completion(output: "CompletionOutput", decode: Callable[[list[int]], str]) -> Completion:
    token_ids, flat = tuple(output.token_ids), cast("FlatLogprobs", output.logprobs)
    logprobs = tuple(flat.logprobs[start] for start in flat.start_indices)
    versions = tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions or ())
    return Completion(
        token_ids=token_ids,
        text=decode(list(token_ids)),
        logprobs=logprobs,
        finish_reason=finish_reason_of(output.finish_reason),
        versions=versions,
    )
