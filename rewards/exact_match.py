"""The last line of the reply, or the text after a marker, must equal the row's answer as text.

There is no mathematics and no partial credit.
"""

import re

from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"exact_match": ["answer"]}


def exact_match(
    rollout: Rollout, row: Row, marker: str = "", *, ignore_case: bool = False, collapse_whitespace: bool = True
) -> RewardResult:
    """1 if the last line of the reply (or the text after `marker`) is the row's answer, or one of its answers.

    marker: a regular expression; the text after its only match, up to the end of that line, is compared.
    collapse_whitespace: runs of whitespace count as one space. Raises ValueError where the row has no answer.
    """
    if row.answer is None:
        raise ValueError(f"row {row.id} has no answer to compare with")
    said, reason = _after(marker, rollout.text) if marker else _last_line(rollout.text)
    if said is None:
        return RewardResult(0.0, reason=reason)
    accepted = row.answer if isinstance(row.answer, list | tuple) else [row.answer]
    wanted = {_normal(str(answer), ignore_case, collapse_whitespace) for answer in accepted}
    right = _normal(said, ignore_case, collapse_whitespace) in wanted
    return RewardResult(1.0) if right else RewardResult(0.0, reason="wrong")


def _last_line(text: str) -> tuple[str | None, str]:
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[-1], "") if lines else (None, "empty reply")


def _after(marker: str, text: str) -> tuple[str | None, str]:
    matches = list(re.finditer(marker, text))
    if len(matches) != 1:
        return None, f"{len(matches)} markers"
    return text[matches[0].end() :].split("\n", 1)[0], ""


def _normal(text: str, ignore_case: bool, collapse_whitespace: bool) -> str:
    text = " ".join(text.split()) if collapse_whitespace else text.strip()
    return text.casefold() if ignore_case else text
