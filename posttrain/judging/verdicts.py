"""The judge's verdict on each row: a distribution over the labels, and from it one number for hardness."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.errors import StageError
from posttrain.judging.config import JudgeQuestion
from posttrain.judging.prompts import JudgePrompts, label_token_ids
from posttrain.records import Row
from posttrain.sampling.requests import Completion, SampleRequest


class Sampler(Protocol):
    """What is needed of the engines."""

    def generate(
        self, requests: Sequence[SampleRequest], on_done: Callable[[int], None] | None = None
    ) -> list[list[Completion]]: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """How hard, or how good, the judge finds a row.

    tag: the likeliest label; score: expected place among the labels in [0, 1], 0 the first; probabilities: of each
    label, sum 1.
    """

    tag: str
    score: float
    probabilities: Mapping[str, float]

    def to_json(self, judge: str) -> dict[str, Any]:
        """The `difficulty` field of a row."""
        return {
            "tag": self.tag,
            "score": round(self.score, 6),
            "probabilities": {label: round(value, 6) for label, value in self.probabilities.items()},
            "judge": judge,
        }


def verdict_of(labels: Sequence[str], logprobs: Sequence[float]) -> Verdict:
    """The verdict from log-probabilities of the labels, ordered from the easiest to the hardest.

    They are renormalised over the labels; -inf is a label the judge rules out. score = sum p_i * i / (L - 1).
    Raises ValueError if none is possible or one is NaN.
    """
    top = max(logprobs)
    if any(math.isnan(value) for value in logprobs) or not math.isfinite(top):
        raise ValueError(f"log-probabilities {list(logprobs)} are no distribution over {list(labels)}")
    weights = [math.exp(value - top) for value in logprobs]
    probabilities = [weight / sum(weights) for weight in weights]
    score = sum(p * index for index, p in enumerate(probabilities)) / (len(labels) - 1)
    tag = labels[max(range(len(labels)), key=probabilities.__getitem__)]
    return Verdict(tag, min(1.0, max(0.0, score)), dict(zip(labels, probabilities, strict=True)))


def judge_requests(
    rows: Sequence[Row], tokenizer: Any, config: JudgeQuestion
) -> tuple[list[SampleRequest], tuple[int, ...], int]:
    """One constrained request a row, the labels' token ids, and how many rows were shortened."""
    choice_ids = label_token_ids(tokenizer, config.labels)
    prompts = JudgePrompts(tokenizer, config)
    requests = [SampleRequest(prompts.render(row), max_tokens=1, choice_ids=choice_ids) for row in rows]
    return requests, choice_ids, prompts.num_shortened


def verdicts(
    sampler: Sampler,
    requests: Sequence[SampleRequest],
    labels: Sequence[str],
    choice_ids: Sequence[int],
    on_done: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """Ask the judge; one verdict a request, in order. Raises StageError where an answer holds no distribution."""
    return [read_verdict(answer[0], labels, choice_ids) for answer in sampler.generate(requests, on_done)]


def read_verdict(answer: Completion, labels: Sequence[str], choice_ids: Sequence[int]) -> Verdict:
    """The verdict of one answer. Raises StageError where it holds no distribution."""
    try:
        return verdict_of(labels, [answer.choice_logprobs.get(token, -math.inf) for token in choice_ids])
    except ValueError as error:
        raise StageError(f"the judge's answer cannot be used: {error}") from None
