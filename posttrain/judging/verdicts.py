"""The judge's verdict on a row: a distribution over the labels and a score, or the reason why there is no verdict."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct

from posttrain.records import Outcome

NOT_ASKED = "was not asked"


class Undecided(Struct, frozen=True):
    """The reason why there is no verdict on a row. It never counts as a verdict.

    outcome: INFRASTRUCTURE if the judge could not be reached, so that the same question may be answered later; ERROR if
    its answer is not a verdict. reason: one line.

    Example: Undecided(Outcome.INFRASTRUCTURE, "http://127.0.0.1:8000/v1: no connection")
    """

    outcome: Literal[Outcome.INFRASTRUCTURE, Outcome.ERROR]
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge's rating of a row: how hard a task is, or how good a reply.

    tag: the likeliest label. score: the expected position among the labels, in [0, 1]; 0 is the first label, 1 the
    last. probabilities: {label: probability}, which add up to 1.

    Example: Verdict("hard", 0.9, {"easy": 0.0, "medium": 0.2, "hard": 0.8})
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


Answer = Verdict | Undecided
OnAnswer = Callable[[int, Answer], None]  # called with the index of a question and its answer


def verdict_of(labels: Sequence[str], logprobs: Sequence[float]) -> Verdict:
    """The verdict from the log-probabilities (nats) of the labels, in the order of the labels.

    They are renormalised over the L labels; -inf is a label that the judge excludes. score = sum p_i * i / (L - 1).
    Raises ValueError if no label is possible or a value is NaN.
    """
    top = max(logprobs)
    if any(math.isnan(value) for value in logprobs) or not math.isfinite(top):
        raise ValueError(f"log-probabilities {list(logprobs)} are no distribution over {list(labels)}")
    weights = [math.exp(value - top) for value in logprobs]
    probabilities = [weight / sum(weights) for weight in weights]
    score = sum(p * index for index, p in enumerate(probabilities)) / (len(labels) - 1)
    tag = labels[max(range(len(labels)), key=probabilities.__getitem__)]
    return Verdict(tag, min(1.0, max(0.0, score)), dict(zip(labels, probabilities, strict=True)))


def sure_verdict(labels: Sequence[str], label: str) -> Verdict:
    """The verdict of an answer without log-probabilities: its label gets a probability of 1."""
    return verdict_of(labels, [0.0 if other == label else -math.inf for other in labels])
