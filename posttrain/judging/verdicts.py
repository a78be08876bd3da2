"""The judge's verdict on a row: a distribution over the labels and one number, or the reason why there is none."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Struct

from posttrain.records import Outcome


class Undecided(Struct, frozen=True):
    """Why there is no verdict on a row. It is never taken for one.

    outcome: INFRASTRUCTURE if the judge could not be reached, so that the same question may be answered later; ERROR if
    its answer is not a verdict. reason: one line.

    Example: Undecided(Outcome.INFRASTRUCTURE, "http://127.0.0.1:8000/v1: no connection")
    """

    outcome: Literal[Outcome.INFRASTRUCTURE, Outcome.ERROR]
    reason: str


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


Answer = Verdict | Undecided
OnAnswer = Callable[[int, Answer], None]  # the place of the question, and the answer


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


def sure_verdict(labels: Sequence[str], label: str) -> Verdict:
    """The verdict of an answer of which only the label is known. The label gets a probability of 1."""
    return verdict_of(labels, [0.0 if other == label else -math.inf for other in labels])
