"""Constraints on a reply that a program can check: lengths, words, case, bullets, how it begins and ends."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"instructions": ["constraints"]}
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_SENTENCE = re.compile(r"[^.!?]*\w[^.!?]*(?:[.!?]+|$)")


def instructions(rollout: Rollout, row: Row, partial: bool = False) -> RewardResult:
    """1 if the reply keeps every one of the row's `constraints`, a mapping of name to value; see CONSTRAINTS.

    partial: the share of the constraints kept instead. Each constraint is a part of the result. An empty reply keeps
    none. Raises ValueError for a row without constraints or with an unknown one.
    """
    constraints = row.fields.get("constraints")
    if not isinstance(constraints, Mapping) or not constraints:
        raise ValueError(f"row {row.id} needs `constraints`, a mapping such as {{max_words: 20}}")
    unknown = sorted(set(constraints) - set(CONSTRAINTS))
    if unknown:
        raise ValueError(f"row {row.id}: unknown constraint {unknown[0]!r}; known: {', '.join(CONSTRAINTS)}")
    text = rollout.text.strip()
    kept = {name: bool(text) and CONSTRAINTS[name](text, value) for name, value in constraints.items()}
    share = sum(kept.values()) / len(kept)
    broken = ", ".join(name for name, ok in kept.items() if not ok)
    parts = {name: float(ok) for name, ok in kept.items()}
    return RewardResult(share if partial else float(share == 1.0), parts, f"broken: {broken}" if broken else "")


def _num_words(text: str) -> int:
    return len(text.split())


def _has(text: str, phrase: str) -> bool:
    """Whether the phrase occurs as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def _phrases(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(phrase) for phrase in value]


def _same_case(text: str, wanted: bool, cased: str) -> bool:
    """Whether the text is written in that case, and has letters at all; `wanted: false` asks for the contrary."""
    return (any(letter.isalpha() for letter in text) and text == cased) == bool(wanted)


CONSTRAINTS: dict[str, Callable[[str, Any], bool]] = {
    "max_words": lambda text, value: _num_words(text) <= value,
    "min_words": lambda text, value: _num_words(text) >= value,
    "max_sentences": lambda text, value: len(_SENTENCE.findall(text)) <= value,
    "num_paragraphs": lambda text, value: len(re.split(r"\n\s*\n", text)) == value,
    "bullet_count": lambda text, value: len(_BULLET.findall(text)) == value,
    "must_include": lambda text, value: all(_has(text, phrase) for phrase in _phrases(value)),
    "forbid": lambda text, value: not any(_has(text, phrase) for phrase in _phrases(value)),
    "lowercase": lambda text, value: _same_case(text, value, text.lower()),
    "uppercase": lambda text, value: _same_case(text, value, text.upper()),
    "starts_with": lambda text, value: text.startswith(value),
    "ends_with": lambda text, value: text.endswith(value),
}
