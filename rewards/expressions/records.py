"""The kinds of answers, as frozen records."""

from dataclasses import dataclass

from .tree import Tree


@dataclass(frozen=True)
class Value:
    """A formula and its unit in plain words, "" if it has none."""

    tree: Tree
    unit: str = ""


@dataclass(frozen=True)
class Word:
    """An answer in words, such as "even"."""

    text: str


@dataclass(frozen=True)
class Listing:
    """kind: "" (no brackets), "or" (alternatives), or the brackets around: "{}", "()", "[]", "[)", "(]"."""

    kind: str
    items: tuple["Answer", ...]


@dataclass(frozen=True)
class Matrix:
    """A matrix or a vector, by rows."""

    rows: tuple[tuple["Answer", ...], ...]


@dataclass(frozen=True)
class Named:
    """`name = answer`, or `name ∈ answer`."""

    name: str
    answer: "Answer"


@dataclass(frozen=True)
class Relation:
    """Formulas joined by signs: =, <, \\le, \\ne, >, \\ge."""

    signs: tuple[str, ...]
    sides: tuple[Tree, ...]


@dataclass(frozen=True)
class Joined:
    """Two sets: \\cup, \\cap or \\setminus."""

    sign: str
    left: "Answer"
    right: "Answer"


@dataclass(frozen=True)
class Domain:
    """A set of numbers: all real numbers ("R"), none (""), or those for which the condition holds."""

    name: str
    condition: "Answer | None" = None


@dataclass(frozen=True)
class Either:
    """One number that is given twice, exactly and rounded."""

    exact: "Answer"
    rounded: "Answer"


@dataclass(frozen=True)
class Parts:
    """Values that are compared one by one. kind: "ratio" (3:4), "mod" (3 modulo 7) or "clock" (hour, minutes, half)."""

    kind: str
    trees: tuple[Tree, ...]


Answer = Value | Word | Listing | Matrix | Named | Relation | Joined | Domain | Either | Parts
