"""Compares the values of formulas, as exact fractions if possible and otherwise with 60 digits or more, within bounds.

Two formulas with variables are equal if they have equal values at several points, which are drawn from the names of the
variables: the identity test of Schwartz and Zippel, here in exact or long arithmetic.
"""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .evaluate import SMALL, Evaluator, Number, Undefined, long
from .tokens import Unreadable
from .tree import Tree

_DIGITS = 60
_POINTS = 6


def symbols(tree: Tree) -> frozenset[str]:
    """The names of the variables in a tree."""
    if tree[0] == "sym":
        return frozenset((tree[1],))
    if tree[0] in ("num", "const"):
        return frozenset()
    parts = tree[2:] if tree[0] in ("fn", "call", "sum", "prod") else tree[1:]
    inner = frozenset().union(*(symbols(part) for part in parts))
    return inner - {tree[1]} if tree[0] in ("sum", "prod") else inner


def points(trees: tuple[Tree, ...]) -> list[dict[str, Fraction]]:
    """Points, which are values for the variables of the trees. The values have both signs, and are whole for variables
    that only make sense as whole numbers.
    """
    names = frozenset().union(*map(symbols, trees))
    whole = frozenset().union(*map(_whole, trees))
    order = sorted(names)
    return [
        {name: _value(name, number, place=place, whole=name in whole) for place, name in enumerate(order)}
        for number in range(_POINTS if names else 1)
    ]


def equal(one: Tree, other: Tree) -> bool:
    """Whether two formulas have the same value at all points where both have one. Raises Unreadable beyond bounds."""
    compared = 0
    for point in points((one, other)):
        try:
            if not same_number(one, other, point):
                return False
            compared += 1
        except Undefined:
            continue
    if not compared:
        raise Unreadable("it has no value")
    return True


def same_number(one: Tree, other: Tree, point: Mapping[str, Fraction]) -> bool:
    """Whether two formulas have the same value at a point: exactly, or to 40 digits, relative to their size.

    A decimal of 16 or more digits counts as a printed float, of which only 15 digits are exact.
    """
    left, right = value(one, point), value(other, point)
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        if left == right:
            return True
        noisy = _is_float(one) or _is_float(other)
        return noisy and abs(left - right) <= abs(left) * Fraction(1, 10**15)
    if _is_infinite(left) or _is_infinite(right):
        return left == right and one == other
    from mpmath import mp

    digits = _digits((one, other))
    with mp.workdps(digits):
        if _close(left, right, mp.mpf(10) ** (20 - digits)):
            return True
        if (_is_float(one) or _is_float(other)) and _close(left, right, mp.mpf(10) ** -15):
            return True
    return _vanishes(one, point, digits) and _vanishes(other, point, digits)


def proportional(one: Tree, other: Tree) -> int:
    """The sign of c, if one formula is c times the other at all points and c is not zero; 0 if there is no such c."""
    from mpmath import mp

    pairs = []
    for point in points((one, other)):
        try:
            pairs.append((value(one, point), value(other, point)))
        except Undefined:
            continue
    if len(pairs) < 2 or not all(left and right for left, right in pairs):
        return 0
    digits = _digits((one, other))
    with mp.workdps(digits):
        ratios = [long(left) / long(right) for left, right in pairs]
        if any(not _close(ratios[0], ratio, mp.mpf(10) ** (20 - digits)) for ratio in ratios[1:]):
            return 0
        return 1 if mp.re(ratios[0]) > 0 else -1


def real(tree: Tree) -> Any:
    """The value of a formula without variables, as a number that can be ordered: a Fraction, or an infinite float.

    Raises Unreadable if it has no such value. Irrational numbers are rounded to 50 digits.
    """
    from mpmath import mp

    if symbols(tree):
        raise Unreadable("it has variables")
    try:
        found = value(tree, {})
    except Undefined as error:
        raise Unreadable("it has no value") from error
    if isinstance(found, Fraction):
        return found
    if mp.im(found):
        raise Unreadable("it is not real")
    if _is_infinite(found):
        return math.inf if found > 0 else -math.inf
    return Fraction(str(mp.nstr(mp.re(found), 50)))


def value(tree: Tree, point: Mapping[str, object]) -> Number:
    """The value of a formula at a point. Raises Undefined if it has none, Unreadable if it exceeds the bounds."""
    from mpmath import mp

    with mp.workdps(_digits((tree,))):
        found = Evaluator(mp, point).of(tree)
    if not isinstance(found, Fraction) and (mp.isnan(found)):
        raise Undefined("no number")
    return found


def _vanishes(tree: Tree, point: Mapping[str, object], digits: int) -> bool:
    """Whether a value is zero apart from rounding, which is so if it shrinks when more digits are computed."""
    from mpmath import mp

    sizes = []
    for count in (digits, 2 * digits):
        with mp.workdps(count):
            sizes.append(abs(long(Evaluator(mp, point).of(tree))))
    return sizes[1] == 0 or sizes[1] < sizes[0] * mp.mpf(10) ** (-digits // 2)


def _close(left: Number, right: Number, bound: Any) -> bool:
    left, right = long(left), long(right)
    return abs(left - right) <= bound * max(abs(left), abs(right))


def _is_infinite(number: Number) -> bool:
    return not isinstance(number, Fraction) and abs(number) == math.inf


def _is_float(tree: Tree) -> bool:
    """Whether the tree is a numeral that looks like a printed float: a finite decimal of 16 digits and more."""
    if tree[0] == "mul" and tree[1][0] == "num" and tree[2][0] == "num":
        tree = tree[2]
    if tree[0] != "num" or tree[1].denominator == 1 or tree[1].denominator.bit_length() > 2000:
        return False
    rest, places = tree[1].denominator, 0
    while rest % 10 in (0, 2, 4, 5, 6, 8) and rest > 1:
        rest //= math.gcd(rest, 10)
        places += 1
    return rest == 1 and places + len(str(abs(int(tree[1])))) > 15


def _digits(trees: tuple[Tree, ...]) -> int:
    """How many digits to compute with. Long numbers in the formula need more, because their last digits must count."""
    return _DIGITS + min(2000, max(map(_longest, trees)) // 3)


def _longest(tree: Tree) -> int:
    if tree[0] == "num":
        return max(tree[1].numerator.bit_length(), tree[1].denominator.bit_length())
    if tree[0] == "pow" and tree[2][0] == "num" and tree[1][0] == "num":
        return _longest(tree[1]) * min(2000, abs(int(tree[2][1])) + 1)
    return max((_longest(part) for part in tree if isinstance(part, tuple)), default=0)


def _whole(tree: Tree) -> frozenset[str]:
    if tree[0] in ("num", "const", "sym"):
        return frozenset()
    inner = frozenset().union(*(_whole(part) for part in tree if isinstance(part, tuple)))
    if tree[0] in ("sum", "prod"):
        return inner | symbols(tree[2]) | symbols(tree[3])
    if tree[0] == "fn" and tree[1] in ("factorial", "factorial2", "binomial", "gcd", "lcm"):
        return inner | frozenset().union(*map(symbols, tree[2:]))
    return inner


def _value(name: str, number: int, *, place: int, whole: bool) -> Fraction:
    """The variable's value at a point. At the first two points all are positive, then all negative, then mixed."""
    drawn = zlib.crc32(f"{name}/{number}".encode())
    negative = (False, False, True, place % 2 == 0, place % 2 == 1, place // 2 % 2 == 0)[number]
    if name == "±":
        return Fraction(-1 if number % 2 else 1)
    if whole:
        return Fraction(2 + drawn % 7)
    size = Fraction(1 + drawn % 9973, SMALL + drawn // 9973 % 997)
    if number % 2:  # below one, where |x^2 - 1| and x^2 - 1 differ; the denominator stays above SMALL
        size = Fraction(1 + drawn % 89, 97)
    return -size if negative else size
