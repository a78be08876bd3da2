"""Computes a formula at a point, within bounds: as an exact fraction if possible, otherwise as a number of mpmath."""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from .tokens import Unreadable
from .tree import Tree

MAX_BITS = 100_000
MAX_TERMS = 2_000
SMALL = 24  # denominators from here on are those of a variable in an exponent
Number = Any  # Fraction, mpf or mpc


class Undefined(ValueError):
    """The formula has no value at this point, for example because of a division by zero."""


def long(number: Number) -> Any:
    """A number of mpmath, with its current precision."""
    from mpmath import mp

    return mp.mpf(number.numerator) / number.denominator if isinstance(number, Fraction) else number


class Evaluator:
    """Computes trees with the precision that mpmath is set to. point: the values of the variables."""

    def __init__(self, mp: Any, point: Mapping[str, object], terms_left: list[int] | None = None) -> None:
        self.mp, self.point = mp, point
        self.terms_left = terms_left or [MAX_TERMS]  # shared by sums within sums

    def of(self, tree: Tree) -> Number:
        """The value of a tree. Raises Undefined if it has none, Unreadable if it exceeds the bounds."""
        kind = tree[0]
        if kind == "num":
            return tree[1]
        if kind == "sym":
            return self.point[tree[1]]
        if kind == "const":
            return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1), "inf": self.mp.inf}[tree[1]]
        if kind in ("sum", "prod"):
            return self.series(tree)
        arguments = [self.of(part) for part in tree[2 if kind in ("fn", "call") else 1 :]]
        if kind == "call":
            shown = [str(part) if isinstance(part, Fraction) else self.mp.nstr(part, 30) for part in arguments]
            return Fraction(1 + zlib.crc32(f"{tree[1]}({shown})".encode()), 9973)
        if kind == "fn":
            return self.function(tree[1], arguments)
        return self.operation(kind, *arguments)

    def operation(self, kind: str, left: Number, right: Number) -> Number:
        if kind == "pow":
            return self.power(left, right)
        if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
            left, right = long(left), long(right)
        if kind == "add":
            return self.bounded(left + right)
        if kind == "mul":
            return self.bounded(left * right)
        if right == 0:
            raise Undefined("a division by zero")
        return self.bounded(left / right)

    def bounded(self, number: Number) -> Number:
        if isinstance(number, Fraction):
            if max(number.numerator.bit_length(), number.denominator.bit_length()) > 2 * MAX_BITS:
                raise Unreadable("a number is too large")
            return number
        if not self.mp.isfinite(number):
            return number
        if isinstance(number, self.mp.mpc):
            if number.imag == 0:
                number = number.real
            else:
                return number
        if number and abs(self.mp.mag(number)) > 50 * MAX_BITS:
            raise Unreadable("a number is too large")
        return number

    def power(self, base: Number, exponent: Number) -> Number:
        if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
            size = max(abs(base.numerator), base.denominator)
            if size.bit_length() * abs(exponent.numerator) > MAX_BITS and size > 1:
                raise Unreadable("a power is too large")
            if base == 0 and exponent < 0:
                raise Undefined("a division by zero")
            if size == 1:
                return base ** (exponent.numerator % 2) if base else Fraction(0 if exponent else 1)
            return base**exponent.numerator
        odd = not isinstance(exponent, Fraction) or exponent.denominator >= SMALL
        if odd and not isinstance(base, self.mp.mpc) and base < 0:
            raise Undefined("a power of a negative number")
        if isinstance(exponent, Fraction) and isinstance(base, Fraction) and exponent.denominator < SMALL:
            return self.root(self.power(base, Fraction(exponent.numerator)), Fraction(exponent.denominator))
        base, exponent = long(base), long(exponent)
        if base == 0:
            if self.mp.re(exponent) > 0:
                return Fraction(0)
            raise Undefined("a power of zero")
        finite = self.mp.isfinite(base) and self.mp.isfinite(exponent)
        if finite and abs(self.mp.log(base)) * abs(exponent) > MAX_BITS:
            raise Unreadable("a power is too large")
        return self.bounded(self.mp.power(base, exponent))

    def root(self, base: Number, order: Number) -> Number:
        """The real root if there is one, as for a negative number and an odd order; otherwise the complex one."""
        if not isinstance(order, Fraction) or order.denominator != 1 or not 1 <= order <= 10_000:
            if isinstance(order, Fraction) and order == 0:
                raise Undefined("a root of order zero")
            return self.power(base, self.operation("div", Fraction(1), order))
        degree = int(order)
        if isinstance(base, Fraction):
            if base < 0 and degree % 2:
                return self.operation("mul", Fraction(-1), self.root(-base, order))
            if base >= 0:
                above, below = _whole_root(base.numerator, degree), _whole_root(base.denominator, degree)
                if above is not None and below is not None:
                    return Fraction(above, below)
            return self.mp.root(long(base), degree) if base > 0 else self.mp.power(long(base), self.mp.mpf(1) / degree)
        if self.mp.im(base) == 0 and self.mp.re(base) < 0 and degree % 2:
            return -self.mp.root(-self.mp.re(base), degree)
        return self.mp.power(base, self.mp.mpf(1) / degree)

    def series(self, tree: Tree) -> Number:
        kind, variable, first, last, body = tree
        start, end = self.of(first), self.of(last)
        if not all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (start, end)):
            raise Unreadable("a sum without whole bounds")
        total: Number = Fraction(kind == "prod")
        for step in range(int(start), int(end) + 1):
            self.terms_left[0] -= 1
            if self.terms_left[0] < 0:
                raise Unreadable("a sum is too long")
            term = Evaluator(self.mp, {**self.point, variable: Fraction(step)}, self.terms_left).of(body)
            total = self.operation("add" if kind == "sum" else "mul", total, term)
        return total

    def function(self, name: str, arguments: list[Number]) -> Number:
        first, exact = arguments[0], all(isinstance(part, Fraction) for part in arguments)
        if name == "root":
            return self.root(first, arguments[1])
        if name == "abs":
            return abs(first)
        if name in ("max", "min"):
            if any(not isinstance(part, Fraction) and self.mp.im(part) for part in arguments):
                raise Undefined("no order")
            return (max if name == "max" else min)(arguments, key=long)
        if name in ("floor", "ceil"):
            return (
                Fraction(math.floor(first) if name == "floor" else math.ceil(first))
                if exact
                else Fraction(
                    int(self.mp.floor(self.mp.re(first)) if name == "floor" else self.mp.ceil(self.mp.re(first)))
                )
            )
        if name in ("factorial", "factorial2", "binomial", "gcd", "lcm"):
            if not exact or any(part.denominator != 1 or part < 0 for part in arguments):
                raise Undefined("no natural number")
            return self.natural(name, [int(part) for part in arguments])
        return self.bounded(self.analytic(name, [long(part) for part in arguments]))

    def natural(self, name: str, arguments: list[int]) -> Fraction:
        first, second = arguments[0], arguments[-1]
        if name in ("gcd", "lcm"):
            return Fraction((math.gcd if name == "gcd" else math.lcm)(*arguments))
        terms = min(second, max(first - second, 0)) if name == "binomial" else first
        if terms * max(first, 2).bit_length() > 2 * MAX_BITS:
            raise Unreadable("a factorial is too large")
        if name == "binomial":
            return Fraction(math.comb(first, second))
        return Fraction(math.factorial(first) if name == "factorial" else math.prod(range(first, 0, -2)))

    def analytic(self, name: str, arguments: list[Any]) -> Any:
        first = arguments[0]
        if not self.mp.isfinite(first) or (first and self.mp.mag(first) > 2_000):
            raise Unreadable("an argument is too large")
        if name in ("log", "ln", "lg"):
            if first == 0 or (len(arguments) > 1 and arguments[1] in (0, 1)):
                raise Undefined("a logarithm of zero")
            base = arguments[1] if len(arguments) > 1 else self.mp.e if name == "ln" else 10
            return self.mp.log(first) / self.mp.log(base)
        if name == "exp":
            return self.power(self.mp.e, first)
        functions = {
            "arcsin": "asin",
            "arccos": "acos",
            "arctan": "atan",
            "arccot": "acot",
            "arcsec": "asec",
            "arccsc": "acsc",
        }
        try:
            return getattr(self.mp, functions.get(name, name))(*arguments)
        except (ZeroDivisionError, ValueError) as error:
            raise Undefined("a pole") from error


def _whole_root(number: int, degree: int) -> int | None:
    if degree == 2:
        found = math.isqrt(number)
    elif number.bit_length() > 4000:
        return None
    else:
        found = round(number ** (1 / degree)) if number < 2**900 else 0
        if number >= 2**900 or (abs(found**degree - number) and number > 2**52):
            low, high = 0, 1 << (number.bit_length() // degree + 1)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
            found = low
    return found if found**degree == number else None
