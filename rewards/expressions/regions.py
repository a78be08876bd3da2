"""Sets of real numbers as pieces between cuts, so that intervals, inequalities and sets by condition can be compared.

A cut lies just before a number x, written (x, 0), or just after it, (x, 1). [2, 5) is the piece from (2, 0) to (5, 0).
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .evaluate import Undefined
from .numbers import real, symbols, value
from .records import Answer, Domain, Joined, Listing, Named, Relation, Value
from .tokens import Unreadable
from .tree import MINUS_ONE, Tree

Cut = tuple[Any, int]
Region = tuple[tuple[Cut, Cut], ...]
_LEFT, _RIGHT = (-math.inf, 1), (math.inf, 0)
ALL: Region = ((_LEFT, _RIGHT),)
_MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}


def region_of(answer: Answer) -> tuple[str, Region]:
    """The variable of the set's condition ("" without one), and its real numbers. Raises Unreadable for other kinds."""
    match answer:
        case Domain(name="R", condition=None):
            return "", ALL
        case Domain(name="", condition=None):
            return "", ()
        case Domain(condition=condition) if condition is not None:
            return "", region_of(condition)[1]
        case Named(name=name, answer=inner):
            return name, region_of(inner)[1]
        case Joined(sign=sign, left=left, right=right):
            one, other = region_of(left)[1], region_of(right)[1]
            rules = {
                "\\cup": lambda a, b: a or b,
                "\\cap": lambda a, b: a and b,
                "\\setminus": lambda a, b: a and not b,
            }
            return "", combined(one, other, rules[sign])
        case Listing(kind=kind, items=(low, high)) if kind in ("()", "[]", "[)", "(]"):
            return "", _piece((_end(low), int(kind[0] == "(")), (_end(high), int(kind[1] == "]")))
        case Listing(kind="{}", items=items):
            region: Region = ()
            for item in items:
                region = combined(region, _piece((_end(item), 0), (_end(item), 1)), lambda a, b: a or b)
            return "", region
        case Listing(kind="" | "or", items=items) if any(isinstance(item, Relation) for item in items):
            return _of_conditions(answer.kind, [region_of(item) for item in items])
        case Relation():
            return _of_relation(answer)
        case Value():
            return "", _piece((_end(answer), 0), (_end(answer), 1))
    raise Unreadable("it is no set of real numbers")


def combined(one: Region, other: Region, rule: Callable[[bool, bool], bool]) -> Region:
    """The numbers for which `rule` is true. It gets whether a number lies in `one`, and whether it lies in `other`."""
    cuts = sorted({cut for piece in (*one, *other, *ALL) for cut in piece})
    pieces: list[tuple[Cut, Cut]] = []
    for low, high in itertools.pairwise(cuts):
        if rule(_holds(one, low), _holds(other, low)):
            if pieces and pieces[-1][1] == low:
                pieces[-1] = (pieces[-1][0], high)
            else:
                pieces.append((low, high))
    return tuple(pieces)


def _holds(region: Region, cut: Cut) -> bool:
    return any(low <= cut < high for low, high in region)


def _piece(low: Cut, high: Cut) -> Region:
    low, high = max(low, _LEFT), min(high, _RIGHT)
    return ((low, high),) if low < high else ()


def _end(answer: Answer) -> Any:
    if not isinstance(answer, Value) or answer.unit:
        raise Unreadable("an end that is no number")
    return real(answer.tree)


def _of_conditions(kind: str, found: list[tuple[str, Region]]) -> tuple[str, Region]:
    """The region of several conditions. Those joined by commas or "and" must all hold, unless no number satisfies all;
    of those joined by "or", one must hold.
    """
    names = {name for name, _ in found if name}
    if len(names) != 1:
        raise Unreadable("conditions on several variables")
    total = found[0][1]
    for _, region in found[1:]:
        total = combined(total, region, (lambda a, b: a or b) if kind == "or" else (lambda a, b: a and b))
    if not total and kind != "or":
        return _of_conditions("or", found)
    return names.pop(), total


def _of_relation(relation: Relation) -> tuple[str, Region]:
    names = frozenset().union(*map(symbols, relation.sides))
    if len(names) != 1:
        raise Unreadable("a condition on several variables")
    (name,) = names
    region = ALL
    for left, sign, right in zip(relation.sides, relation.signs, relation.sides[1:], strict=False):
        region = combined(region, _solved(left, sign, right, name=name), lambda a, b: a and b)
    return name, region


def _solved(left: Tree, sign: str, right: Tree, *, name: str) -> Region:
    """The solutions of a condition on an expression that is linear in its variable, or on its absolute value."""
    if right[:2] == ("fn", "abs") and name not in symbols(left):
        left, sign, right = right, _MIRRORED[sign], left
    if left[:2] == ("fn", "abs") and name not in symbols(right):
        negative = ("mul", MINUS_ONE, right)
        upper = _solved(left[2], sign, right, name=name)
        lower = _solved(left[2], _MIRRORED[sign], negative, name=name)
        return combined(upper, lower, (lambda a, b: a and b) if sign in ("<", "\\le") else (lambda a, b: a or b))
    try:
        gap: Tree = ("add", left, ("mul", MINUS_ONE, right))
        start, *others = (value(gap, {name: Fraction(at)}) for at in (0, 1, 3, Fraction(-7, 2)))
    except Undefined as error:
        raise Unreadable("a condition that is not linear") from error
    if not all(isinstance(number, Fraction) for number in (start, *others)):
        return _lone(left, sign, right)
    slope = others[0] - start
    if not slope or others[1] != start + 3 * slope or others[2] != start - Fraction(7, 2) * slope:
        raise Unreadable("a condition that is not linear")
    return _beyond(-start / slope, sign if slope > 0 else _MIRRORED[sign])


def _lone(left: Tree, sign: str, right: Tree) -> Region:
    """The solutions of a condition with the variable alone on one side and an irrational number on the other."""
    if left[0] == "sym":
        return _beyond(real(right), sign)
    if right[0] == "sym":
        return _beyond(real(left), _MIRRORED[sign])
    raise Unreadable("a condition that is not linear")


def _beyond(bound: Any, sign: str) -> Region:
    if sign == "<":
        return _piece(_LEFT, (bound, 0))
    if sign == "\\le":
        return _piece(_LEFT, (bound, 1))
    if sign == ">":
        return _piece((bound, 1), _RIGHT)
    if sign == "\\ge":
        return _piece((bound, 0), _RIGHT)
    point = _piece((bound, 0), (bound, 1))
    return point if sign == "=" else combined(ALL, point, lambda a, b: a and not b)
