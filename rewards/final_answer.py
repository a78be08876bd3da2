"""Expects exactly one marked answer at the end of the reply, and compares it as text, without any mathematics."""

from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"final_answer": ["answer"]}
MARKER = "Answer:"


def marked_answer(rollout: Rollout, marker: str = MARKER) -> tuple[str | None, str]:
    """The text after the only marker of a finished reply. If there is no such text: None, and the reason."""
    if rollout.finish_reason != "stop":
        return None, "unfinished"
    count = rollout.text.count(marker)
    if count != 1:
        return None, f"{count} markers"
    answer = rollout.text.partition(marker)[2].strip()
    return (answer, "") if answer else (None, "empty answer")


def final_answer(rollout: Rollout, row: Row, marker: str = MARKER) -> RewardResult:
    """1 if the reply ends its turn, has exactly one marker, and what follows it is the row's answer.

    marker: the text that announces the answer. Raises ValueError for a row without an answer.
    """
    if row.answer is None:
        raise ValueError(f"row {row.id} has no answer to compare with")
    answer, reason = marked_answer(rollout, marker)
    if answer is None:
        return RewardResult(0.0, reason=reason)
    return RewardResult(1.0) if answer == str(row.answer).strip() else RewardResult(0.0, reason="wrong")
