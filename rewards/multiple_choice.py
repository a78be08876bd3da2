"""One letter of several choices. A reply that names two different letters as its answer gets nothing."""

import re

from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"multiple_choice": ["answer"]}
_MARKED = re.compile(r"\banswer\b(?:\s+is|\s*[:=])[\s:*$]*(?:option\s+|choice\s+)?", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{(?:\\text\s*\{)?\s*")
_LETTER = re.compile(r"\(?([A-Z])(?![A-Za-z'])\)?")


def multiple_choice(rollout: Rollout, row: Row, num_choices: int = 26) -> RewardResult:
    """1 if the reply names the row's letter, and no other, as its answer.

    Named: after "answer is" or "answer:", in `\\boxed{}`, or as the beginning of a reply of one line ("B", "(B) red").
    The row's `choices` (a list in its fields), else `num_choices`, says which letters there are. Raises ValueError
    where the row's answer is not one of them.
    """
    choices = row.fields.get("choices")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices) if isinstance(choices, list | tuple) else num_choices]
    gold = str(row.answer).strip().strip("().").upper()
    if len(gold) != 1 or gold not in letters:
        raise ValueError(f"row {row.id}: its answer {row.answer!r} is none of the letters {letters}")
    named = named_letters(rollout.text) & set(letters)
    if len(named) != 1:
        return RewardResult(0.0, reason="several answers" if named else "no stated answer")
    return RewardResult(1.0) if named == {gold} else RewardResult(0.0, reason="wrong")


def named_letters(text: str) -> set[str]:
    """Every letter that the text names as its answer; alternatives joined by "or", "and", "/" or a comma count too."""
    starts = [match.end() for pattern in (_MARKED, _BOXED) for match in pattern.finditer(text)]
    stripped = text.strip()
    if not starts and "\n" not in stripped:
        text, starts = stripped, [0]
    return set().union(*(_letters_at(text, start) for start in starts))


def _letters_at(text: str, start: int) -> set[str]:
    found: set[str] = set()
    while match := _LETTER.match(text, start):
        found.add(match[1])
        joint = re.compile(r"[\s*$]*(?:\bor\b|\band\b|/|,|\|)[\s*$]*", re.IGNORECASE).match(text, match.end())
        if joint is None:
            break
        start = joint.end()
    return found
