"""The puzzle families of the quick start.

A Countdown puzzle has many right answers, so the expression in the reply is computed; the other families have one right
answer. The reply is untrusted text, so eval() is not used, and only + and - are understood.
"""

import re
from collections import Counter

from posttrain.records import RewardResult, Rollout, Row

from .final_answer import MARKER, marked_answer

REQUIRES = {"puzzles": ["answer|numbers"]}
_MAX_CHARS = 200
_NUMBER_OR_SIGN = re.compile(r"\s*([0-9]{1,9}|[+-])", re.ASCII)


def puzzles(rollout: Rollout, row: Row) -> RewardResult:
    """1 if the reply ends its turn, has exactly one "Answer:", and the answer solves the row's puzzle.

    For rows with `family: countdown`, the answer is a sum or difference that uses each of `numbers` once and equals
    `target`. For every other family, the answer is the text of the row's `answer`.
    """
    answer, reason = marked_answer(rollout, MARKER)
    if answer is None:
        return RewardResult(0.0, reason=reason)
    if row.fields.get("family") == "countdown":
        return _countdown(answer, row)
    if row.answer is None:
        raise ValueError(f"row {row.id} has no answer to compare with")
    return RewardResult(1.0) if answer == str(row.answer).strip() else RewardResult(0.0, reason="wrong")


def _countdown(answer: str, row: Row) -> RewardResult:
    numbers, target = row.fields.get("numbers"), row.fields.get("target")
    if not isinstance(numbers, list | tuple) or not isinstance(target, int):
        raise ValueError(f"countdown row {row.id} needs `numbers` (a list) and `target` (an integer)")
    terms = parse_sum(answer)
    if terms is None:
        return RewardResult(0.0, reason="not an expression")
    if Counter(abs(term) for term in terms) != Counter(numbers):
        return RewardResult(0.0, reason="wrong numbers")
    return RewardResult(1.0) if sum(terms) == target else RewardResult(0.0, reason="wrong")


def parse_sum(text: str) -> list[int] | None:
    """The signed terms of `a + b - c`; None for any other text. The first term must not have a sign."""
    if len(text) > _MAX_CHARS:
        return None
    terms: list[int] = []
    sign, position, wants_number = 1, 0, True
    text = text.rstrip()
    while position < len(text):
        token = _NUMBER_OR_SIGN.match(text, position)
        if token is None or token[1].isdigit() != wants_number:
            return None
        if wants_number:
            terms.append(sign * int(token[1]))
        else:
            sign = 1 if token[1] == "+" else -1
        wants_number, position = not wants_number, token.end()
    return None if wants_number else terms
