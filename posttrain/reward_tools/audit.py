"""Tests whether a reward can be fooled: it must call each row's own answer right, and every wrong reply wrong.

    rows ─► own answers, in every form ─► the form that the reward accepts ─► wrong replies in that form ─► verdict

A wrong reply without a score is a finding too, because a policy that finds such a reply never learns that it is wrong.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.rewards import RewardConfig
from posttrain.records import Row
from posttrain.reward_tools.controls import Form, forms_with, golds, wrong_replies
from posttrain.reward_tools.trial import Asked, Tell, Tried, reply_to, score

MAX_TEXT = 80
USUAL = "Answer: X"


@dataclass(frozen=True, slots=True)
class Finding:
    """A control that the reward does not pass. count: number of failing replies among `of`. example: one of them."""

    control: str
    count: int
    of: int
    example: Tried

    def to_json(self) -> dict[str, Any]:
        """For the command's JSON."""
        example = self.example
        return {
            "control": self.control,
            "count": self.count,
            "of": self.of,
            "row": example.row.id,
            "reply": example.text,
            "value": example.value,
            "why": example.why,
        }


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit.

    rows, replies: numbers that were tried. accepted: {form of the own answer: number of rows in which it is right}.
    with_answer: number of rows that have an answer. refused: a try of each row whose own answer is right in no form.
    fooled: wrong replies that the reward calls right. unscored: wrong replies without a score. passed: names of the
    controls without a finding.
    """

    rows: int
    replies: int
    with_answer: int
    accepted: Mapping[str, int]
    refused: Sequence[Tried]
    fooled: Sequence[Finding]
    unscored: Sequence[Finding]
    passed: Sequence[str]

    @property
    def is_sound(self) -> bool:
        """True if the audit has no finding."""
        return not (self.refused or self.fooled or self.unscored)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        faults = ["can be fooled"] if self.fooled else []
        faults += ["cannot score some wrong replies"] if self.unscored else []
        faults += ["refuses right answers"] if self.refused else []
        if faults:
            return f"the reward {' and '.join(faults)}"
        only = "" if self.with_answer else "; no row has an answer, so whether a right one passes was not tried"
        return f"no control fooled the reward{only}"

    def to_json(self) -> dict[str, Any]:
        """For the command's JSON."""
        return {
            "sound": self.is_sound,
            "verdict": self.verdict,
            "rows": self.rows,
            "replies": self.replies,
            "rows_with_answer": self.with_answer,
            "accepted_forms": dict(self.accepted),
            "refused_rows": [item.row.id for item in self.refused],
            "fooled": [finding.to_json() for finding in self.fooled],
            "unscored": [finding.to_json() for finding in self.unscored],
            "passed": list(self.passed),
        }


def audit(reward: RewardConfig, rows: Sequence[Row], everything: Sequence[Row], *, tell: Tell | None = None) -> Audit:
    """Try the reward on controls for each of `rows`. everything: all rows, whose answers are wrong for the others."""
    forms, threshold = forms_with(reward.args), reward.correct_threshold
    right = score(own_answers(rows, forms), reward, tell)
    wrong = score(wrong_answers_to(rows, everything, forms, right=right, threshold=threshold), reward, tell)
    return conclude(rows, right, wrong, threshold=threshold)


def own_answers(rows: Sequence[Row], forms: Mapping[str, Form]) -> list[Asked]:
    """Each row's own answer, in every form, under the name of the form."""
    return [
        (name, row, reply_to(row, form(gold))) for row in rows for gold in golds(row) for name, form in forms.items()
    ]


def wrong_answers_to(
    rows: Sequence[Row],
    everything: Sequence[Row],
    forms: Mapping[str, Form],
    *,
    right: Sequence[Tried],
    threshold: float,
) -> list[Asked]:
    """The wrong replies to each row, under the name of the control, in a form in which its own answer is right.

    right: the scores of `own_answers`.
    """
    accepted = _accepted(right, threshold)
    counts = Counter(item.what for items in accepted.values() for item in items)
    usual = max(forms, key=lambda name: (counts[name], name == USUAL))
    asked: list[Asked] = []
    for number, row in enumerate(rows):
        found = accepted.get(row.id, [])
        form = forms[usual if not found or any(item.what == usual for item in found) else found[0].what]
        own = golds(row)
        gold = next((gold for gold in own if any(item.text == form(gold) for item in found)), own[0] if own else None)
        controls = wrong_replies(row, everything, form, gold=gold, is_first=not number)
        asked += [(control, row, reply_to(row, text)) for control, texts in controls.items() for text in texts]
    return asked


def conclude(rows: Sequence[Row], right: Sequence[Tried], wrong: Sequence[Tried], *, threshold: float) -> Audit:
    """The audit from the scores of own answers and of wrong replies."""
    accepted = _accepted(right, threshold)
    forms = Counter(name for items in accepted.values() for name in dict.fromkeys(item.what for item in items))
    fooled = _findings(wrong, [item for item in wrong if item.is_right(threshold)])
    unscored = _findings(wrong, [item for item in wrong if item.value is None])
    bad = {finding.control for finding in (*fooled, *unscored)}
    with_answer: dict[str, Tried] = {}
    for item in right:
        with_answer.setdefault(item.row.id, item)
    return Audit(
        rows=len(rows),
        replies=len(right) + len(wrong),
        with_answer=len(with_answer),
        accepted=dict(forms.most_common()),
        refused=[item for name, item in with_answer.items() if name not in accepted],
        fooled=fooled,
        unscored=unscored,
        passed=[name for name in dict.fromkeys(item.what for item in wrong) if name not in bad],
    )


def _accepted(right: Sequence[Tried], threshold: float) -> dict[str, list[Tried]]:
    """Row id -> the ways to state its answer that are right."""
    accepted: dict[str, list[Tried]] = {}
    for item in right:
        if item.is_right(threshold):
            accepted.setdefault(item.row.id, []).append(item)
    return accepted


def _findings(tried: Sequence[Tried], found: Sequence[Tried]) -> list[Finding]:
    of = Counter(item.what for item in tried)
    by_control: dict[str, list[Tried]] = {}
    for item in found:
        by_control.setdefault(item.what, []).append(item)
    return [Finding(name, len(items), of[name], items[0]) for name, items in by_control.items()]
