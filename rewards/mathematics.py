"""Mathematical equality by math-verify. A reply that states several different answers gets nothing.

math-verify's own time limits are left off: they need a signal that only the main thread gets, and they turn a late
verdict into a wrong one. The pool's deadline is the limit. Source: https://github.com/huggingface/Math-Verify.
"""

import functools
import itertools
import logging
import re
from typing import Any

from posttrain.errors import MissingDependencyError
from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"math": ["answer"]}
_MAX_CHARS = 500
_MARK = re.compile(r"(?:\banswer\b(?:\s+is|\s*[:=])|####)[ \t]*:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.;!?](?=\s|$)")
_FORMULA = re.compile(r"\$+([^$]+)\$+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# Words and signs between alternatives. math-verify would read only one side of them and ignore the other.
_CHOICE = re.compile(r"\bor\b|\bbut\b|[$;|→⇒]|[-=]>|\\\\|\\n\b|\\to\b|\\[lL]?(?:ong)?[rR]ightarrow", re.IGNORECASE)


def warm_up() -> None:
    """Imports math-verify and builds its parser, which takes seconds: before the first deadline, not within it."""
    _parse("1")


def math(rollout: Rollout, row: Row) -> RewardResult:
    """1 if the reply's stated answer is mathematically equal to the row's answer.

    Stated: in `\\boxed{}`, after "answer is", "answer:" or "####"; else the only formula or number of the last line.
    All answers stated must be equal to each other. Raises ValueError where the row's answer is no mathematics.
    """
    gold_text = str(row.answer if row.answer is not None else "")
    gold = _parse(gold_text)
    if not gold:
        raise ValueError(f"row {row.id}: its answer {gold_text[:50]!r} cannot be read as mathematics")
    stated = stated_answers(rollout.text)
    if not stated:
        return RewardResult(0.0, reason="no stated answer")
    if any(len(text) > _MAX_CHARS for text in stated):
        return RewardResult(0.0, reason="answer too long")
    if any(_CHOICE.search(text.replace("\\$", "")) for text in stated) and not _CHOICE.search(gold_text.strip("$")):
        return RewardResult(0.0, reason="several answers")
    parsed = [_parse(text) for text in dict.fromkeys(stated)]
    if not all(parsed):
        return RewardResult(0.0, reason="not mathematics")
    if not all(_equal(parsed[0], other) for other in parsed[1:]):
        return RewardResult(0.0, reason="several answers")
    return RewardResult(1.0) if _equal(gold, parsed[0]) else RewardResult(0.0, reason="wrong")


def stated_answers(text: str) -> list[str]:
    """Every final answer that the text states, in order of kind, as written and without the dollar signs around."""
    stated = _boxed(text)
    marks = list(_MARK.finditer(text))
    for mark, following in itertools.zip_longest(marks, marks[1:]):
        line = text[mark.end() : following.start() if following else len(text)].strip().split("\n")[0]
        if line and "\\boxed" not in line:
            stated += _FORMULA.findall(line) or [_SENTENCE_END.split(line)[0]]
    if not stated:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        found = _FORMULA.findall(last) or _NUMBER.findall(last)
        stated = found if len(found) == 1 else []
    return [answer.strip().strip("*$ ").strip() for answer in stated]


def _boxed(text: str) -> list[str]:
    """The contents of each `\\boxed{...}`, with braces counted, since they nest."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            found.append(text[match.end() : end - 1])
    return found


def _parse(text: str) -> list[Any]:
    return _math_verify().parse(f"${text.strip().strip('$')}$", parsing_timeout=None)


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    return bool(_math_verify().verify(gold, answer, timeout_seconds=None))


@functools.cache
def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise MissingDependencyError("reward 'math' needs math-verify: pip install math-verify") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that its limits are off
    return math_verify
