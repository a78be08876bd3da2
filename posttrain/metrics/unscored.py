"""Counts replies that a reward could not score, by reason and row, and reports them as an event and as one sentence.

A prompt counts as unscored if none of its replies has a score. Left out: the consequences, such as scoring again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.context import StageContext
from posttrain.records import Outcome, Scored

Failure = tuple[Outcome, str]  # the outcome of a reply without a score, and the reason
MOST_FREQUENT = 3
MAX_ROWS = 20
MAX_REASON = 160


def failures(scores: Iterable[Scored]) -> list[Failure]:
    """The outcome and the reason of each reply without a score."""
    return [(scored.outcome, scored.reason) for scored in scores if scored.result is None]


def kind_of(failure: Failure) -> str:
    """The reason for a missing score in one word: the returned value (none, nan, inf, text), an exception, the
    outcome.
    """
    outcome, reason = failure
    word = reason.removeprefix(f"{outcome}: ").partition(":")[0]
    return word if outcome is Outcome.ERROR and word and len(word) <= 40 else str(outcome)


def kinds_text(kinds: Mapping[str, int]) -> str:
    """The kinds with their counts, the most frequent first, such as "nan 22, none 21"."""
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


class Unscored:
    """Counts replies without a score, by prompt.

    prompts, replies: numbers of all that were counted. unscored: number of replies without a score. lost: {row id:
    kind} of the prompts without any score. partly: {kind: number} of unscored replies to the other prompts.
    """

    def __init__(self) -> None:
        self.prompts = self.replies = self.unscored = 0
        self.lost: dict[str, str] = {}
        self.partly: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, tuple[str, str]] = {}  # kind -> a row, and the reason there

    def add(self, row: str, failed: Sequence[Failure], replies: int) -> None:
        """Count a prompt. row: its id. failed: the failures of its replies without a score. replies: number of its
        replies.
        """
        self.prompts += 1
        self.replies += replies
        self.unscored += len(failed)
        if not failed:
            return
        kinds = Counter(kind_of(failure) for failure in failed)
        if len(failed) == replies:
            self.lost[row] = kinds.most_common(1)[0][0]
        else:
            self.partly += kinds
        for outcome, given in failed:
            reason = given.removeprefix(f"{outcome}: ")
            self._examples.setdefault(kind_of((outcome, reason)), (row, reason))
            self._outcomes[outcome] += 1
            self._reasons[f"{outcome}: {reason}"] += 1

    @property
    def fraction(self) -> float:
        """The share of replies without a score, in [0, 1]."""
        return self.unscored / self.replies if self.replies else 0.0

    @property
    def kinds(self) -> Counter[str]:
        """{kind: number} of the unscored prompts, or, if no prompt is unscored, of the unscored replies."""
        return Counter(self.lost.values()) or self.partly

    @property
    def most_frequent(self) -> str:
        """The most frequent outcome and reason; "" if every reply has a score."""
        return next((reason for reason, _ in self._reasons.most_common(1)), "")

    def sentence(self, where: str) -> str:
        """The sentence, such as "profile: 86 of 200 prompts could not be scored (none 44, nan 42), e.g. row p17".

        where: the part of the run, with which the sentence begins.
        """
        count, of, unit = self.unscored, self.replies, "replies"
        if self.lost:
            count, of, unit = len(self.lost), self.prompts, "prompts"
        text = f"{where}: {count} of {of} {unit} could not be scored ({kinds_text(self.kinds)})"
        text += f", e.g. {self._example()}"
        if self.lost and self.partly:
            text += f"; and of the other prompts {self.partly.total()} replies ({kinds_text(self.partly)})"
        return text

    def _example(self) -> str:
        """A row of the most frequent kind, and the reason, if more of it is known than its kind."""
        kind = self.kinds.most_common(1)[0][0]
        row, reason = self._examples[kind]
        row = next((name for name, why in self.lost.items() if why == kind), row)
        reason = reason.removeprefix(f"{kind}: ") if kind.islower() else reason
        return f"row {row}" + (f": {reason[:MAX_REASON]}" if reason not in ("", kind) else "")

    def figures(self) -> dict[str, Any]:
        """The counts for a summary. In it, `rows` are the first unscored prompts, and `kinds` as in the property."""
        return {
            "prompts": self.prompts,
            "prompts_unscored": len(self.lost),
            "replies": self.replies,
            "replies_unscored": self.unscored,
            "kinds": dict(self.kinds.most_common()),
            "rows": list(self.lost)[:MAX_ROWS],
        }

    def tell(self, context: StageContext, where: str, limit: float) -> None:
        """Emit the event `unscored` if any reply has no score, or `alarm` if their share is above `limit`."""
        if not self.unscored:
            return
        is_alarm = self.fraction > limit
        context.event("alarm" if is_alarm else "unscored", **self.event_fields(where, limit))

    def event_fields(self, where: str, limit: float) -> dict[str, Any]:
        """what, where, fraction, limit, `figures`; outcomes: unscored replies by outcome; reasons: [reason, how often]
        of the most frequent ones; text: the sentence."""
        text = self.sentence(where)
        if self.fraction > limit:
            text += f"; {self.fraction:.0%} of the replies have no score, reward.alarm_fraction is {limit:.0%}"
        return {
            "what": "unscored",
            "where": where,
            "fraction": self.fraction,
            "limit": limit,
            **self.figures(),
            "outcomes": dict(self._outcomes.most_common()),
            "reasons": [list(item) for item in self._reasons.most_common(MOST_FREQUENT)],
            "text": text,
        }
