"""Vectors and matrices in other notation: sums of unit vectors such as 2i - 3j, and lists of lists."""

from fractions import Fraction

from .numbers import equal, symbols
from .records import Answer, Listing, Matrix, Value
from .tree import Tree

UNITS = tuple(f"hat({letter})" for letter in "ijk")
_ZERO: Tree = ("num", Fraction(0))


def components(answer: Answer) -> Listing | None:
    """The components of a sum of multiples of unit vectors, as a tuple; None for anything else."""
    if not isinstance(answer, Value) or answer.unit:
        return None
    names = symbols(answer.tree) & set(UNITS)
    if not names:
        return None
    size = 3 if UNITS[2] in names else 2
    units = UNITS[:size]
    parts = tuple(_at(answer.tree, {name: Fraction(name == unit) for name in UNITS}) for unit in units)
    back: Tree = _ZERO
    for part, unit in zip(parts, units, strict=True):
        back = ("add", back, ("mul", part, ("sym", unit)))
    if not equal(answer.tree, back):  # a product of unit vectors, or a number without one
        return None
    return Listing("()", tuple(Value(part) for part in parts))


def plain_vector(answer: Answer) -> Answer:
    """The formula with i, j and k read as unit vectors, for one that is compared with a sum of unit vectors."""
    return Value(_read(answer.tree), answer.unit) if isinstance(answer, Value) else answer


def rows_of(listing: Listing) -> Matrix | None:
    """A list of lists of equal lengths as a matrix, such as [[1, 2], [3, 4]]; None for any other list."""
    rows = [item.items for item in listing.items if isinstance(item, Listing) and item.kind == listing.kind]
    if listing.kind not in ("[]", "()") or len(rows) < len(listing.items) or len({len(row) for row in rows}) != 1:
        return None
    return Matrix(tuple(rows))


def _at(tree: Tree, point: dict[str, Fraction]) -> Tree:
    if tree[0] == "sym" and tree[1] in point:
        return ("num", point[tree[1]])
    return tuple(_at(part, point) if isinstance(part, tuple) else part for part in tree)


def _read(tree: Tree) -> Tree:
    if tree == ("const", "i"):
        return ("sym", UNITS[0])
    if tree in (("sym", "j"), ("sym", "k")):
        return ("sym", f"hat({tree[1]})")
    return tuple(_read(part) if isinstance(part, tuple) else part for part in tree)
