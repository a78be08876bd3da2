"""Constraints on a reply that a program can check: lengths, words, case, layout, how it begins and ends."""

from collections.abc import Mapping

from posttrain.records import RewardResult, Rollout, Row

from .constraints import CONSTRAINTS, loose_variants, visible
from .stated import without_reasoning

REQUIRES = {"instructions": ["constraints"]}


def instructions(rollout: Rollout, row: Row, partial: bool = False, *, loose: bool = False) -> RewardResult:
    """1 if the reply keeps every one of the row's `constraints`, a mapping of name to value; see CONSTRAINTS.

    partial: the share of the constraints kept instead. loose: each may also be kept by the reply without its first
    line, its last line, or markdown stars. Text inside `<think>` does not count, and keys that are null are absent.
    Each constraint is a part of the result. An empty reply keeps none. Raises ValueError for a row without constraints
    or with an unknown one.
    """
    constraints = row.fields.get("constraints")
    if isinstance(constraints, Mapping):
        constraints = {name: value for name, value in constraints.items() if value is not None}
    if not isinstance(constraints, Mapping) or not constraints:
        raise ValueError(f"row {row.id} needs `constraints`, a mapping such as {{max_words: 20}}")
    unknown = sorted(set(constraints) - set(CONSTRAINTS))
    if unknown:
        raise ValueError(f"row {row.id}: unknown constraint {unknown[0]!r}; known: {', '.join(CONSTRAINTS)}")
    text = visible(without_reasoning(rollout.text)).replace("\r\n", "\n").strip()
    variants = [variant for variant in (loose_variants(text) if loose else [text]) if variant]
    kept = {name: any(CONSTRAINTS[name](variant, value) for variant in variants) for name, value in constraints.items()}
    share = sum(kept.values()) / len(kept)
    broken = ", ".join(name for name, ok in kept.items() if not ok)
    parts = {name: float(ok) for name, ok in kept.items()}
    return RewardResult(share if partial else float(share == 1.0), parts, f"broken: {broken}" if broken else "")
