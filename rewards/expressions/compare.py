"""Decides whether two answers are the same. Answers that differ only in notation are the same. Nothing is rounded."""

import itertools
from fractions import Fraction

from .letters import with_constant_of, with_variable_of
from .numbers import equal, proportional, symbols
from .records import Answer, Domain, Either, Joined, Listing, Matrix, Named, Parts, Relation, Value, Word
from .regions import region_of
from .tokens import Unreadable
from .tree import MINUS_ONE, Tree
from .units import same_unit
from .vectors import components, plain_vector, rows_of

_UP = {">": "<", "\\ge": "\\le"}
_HUNDRED = ("num", Fraction(100))
_DEGREE: Tree = ("div", ("const", "pi"), ("num", Fraction(180)))
_DEGREES, _RADIANS = ("°", "deg", "degree", "degrees"), ("rad", "radian", "radians")


def same_answer(gold: Answer, reply: Answer) -> bool:
    """Whether the reply equals the gold answer. Raises Unreadable if a computation would exceed its bounds."""
    match gold, reply:
        case (_, Either(exact=exact, rounded=rounded)):
            return same_answer(gold, exact) or same_answer(gold, rounded)
        case (Either(exact=exact), _):
            return same_answer(exact, reply)
        case (Value(), Value()):
            return _same_value(gold, reply) or _same_vector(gold, reply)
        case (Named(), Named()) if gold.name == reply.name:
            return same_answer(gold.answer, reply.answer)
        case (Named(), Named()) if with_variable_of(gold, reply).name == gold.name:
            return same_answer(gold.answer, with_variable_of(gold, reply).answer)
        case (Named(answer=Value(tree=left)), Named(answer=Value(tree=right))):
            return False if not symbols(left) or not symbols(right) else _same_relation(gold, reply)
        case (Named(), Named()):
            return False
        case (Named() | Relation(signs=("=",)), Relation(signs=("=",))) | (Relation(signs=("=",)), Named()):
            return _same_relation(gold, reply)
        case (Named(answer=inner), Value() | Word() | Parts() | Matrix()):
            return same_answer(inner, reply)
        case (Value() | Word() | Parts() | Matrix(), Named(answer=inner)):
            return same_answer(gold, inner)
        case (Word(), Word()):
            return gold.text == reply.text
        case (Word(text=word), Value(tree=("sym", name))) | (Value(tree=("sym", name)), Word(text=word)):
            return word == name.casefold()
        case (Matrix(rows=rows), Matrix(rows=others)):
            return _same_rows(rows, others)
        case (Matrix(rows=rows), Listing(kind="()")):
            return _in_order(_vector(rows), reply.items)
        case (Listing(kind="()"), Matrix(rows=rows)):
            return _in_order(gold.items, _vector(rows))
        case (Matrix(rows=rows), Listing(kind="[]")):
            return (matrix := rows_of(reply)) is not None and _same_rows(rows, matrix.rows)
        case (Listing(kind="[]"), Matrix(rows=rows)):
            return (matrix := rows_of(gold)) is not None and _same_rows(matrix.rows, rows)
        case (Value(), Listing(kind="()") | Matrix()) | (Listing(kind="()") | Matrix(), Value()) if components(
            gold
        ) or components(reply):
            return same_answer(components(gold) or gold, components(reply) or reply)
        case (Parts(), Parts()):
            return _same_parts(gold, reply)
        case (Parts(kind="ratio", trees=(above, below)), Value(unit="")):
            return equal(("div", above, below), reply.tree)
        case (Value(unit=""), Parts(kind="ratio", trees=(above, below))):
            return equal(gold.tree, ("div", above, below))
    if _is_list(gold) and _is_list(reply):
        return _same_list(_inner(gold), _inner(reply))
    if isinstance(gold, Relation) and isinstance(reply, Relation) and _same_relation(gold, reply):
        return True
    return _same_region(gold, reply)


def _same_vector(gold: Value, reply: Value) -> bool:
    """Whether two sums of unit vectors are equal, of which one may have plain letters."""
    if not components(gold) and not components(reply):
        return False
    one, other = components(plain_vector(gold)), components(plain_vector(reply))
    return one is not None and other is not None and _in_order(one.items, other.items)


def _same_value(gold: Value, reply: Value) -> bool:
    left, right = gold.tree, with_constant_of(gold.tree, reply.tree)
    if left[0] == right[0] == "sym" and len(left[1]) == len(right[1]) == 1 and not gold.unit and not reply.unit:
        return left[1].casefold() == right[1].casefold()  # a letter as an answer: C or c
    if "%" in (gold.unit, reply.unit) and gold.unit != reply.unit:
        if gold.unit and reply.unit:
            return False
        percent, plain = (left, right) if gold.unit == "%" else (right, left)
        return equal(percent, plain) or equal(percent, ("mul", plain, _HUNDRED))
    if (gold.unit in _DEGREES) != (reply.unit in _DEGREES):
        one, other = _in_radians(gold), _in_radians(reply)
        if one is not None and other is not None:
            return equal(one, other)
    if gold.unit and reply.unit:
        factor = same_unit(reply.unit, gold.unit)
        if factor is None:
            return False
        right = right if factor == 1 else ("mul", right, ("num", factor))
    return equal(left, right)


def _in_radians(angle: Value) -> Tree | None:
    """An angle as a number; None if the value is in neither degrees nor radians. A multiple of pi is in radians."""
    if angle.unit in _DEGREES:
        return ("mul", angle.tree, _DEGREE)
    return angle.tree if angle.unit in _RADIANS or (not angle.unit and _has_pi(angle.tree)) else None


def _has_pi(tree: Tree) -> bool:
    return tree == ("const", "pi") or any(_has_pi(part) for part in tree if isinstance(part, tuple))


def _is_list(answer: Answer) -> bool:
    return isinstance(_inner(answer), Listing | Value)


def _inner(answer: Answer) -> Answer:
    return answer.answer if isinstance(answer, Named) else answer


def _same_list(gold: Answer, reply: Answer) -> bool:
    """Whether two lists are equal. Order counts if one is a tuple or ends with dots; otherwise neither order nor
    repetition counts.
    """
    if isinstance(gold, Value):
        assert isinstance(reply, Listing)
        return reply.kind == "{}" and len(reply.items) == 1 and same_answer(gold, reply.items[0])
    if isinstance(reply, Value):
        return gold.kind == "{}" and len(gold.items) == 1 and same_answer(gold.items[0], reply)  # type: ignore[union-attr]
    assert isinstance(gold, Listing)
    assert isinstance(reply, Listing)
    if any(isinstance(item, Relation) for item in (*gold.items, *reply.items)):
        if len(gold.items) == len(reply.items) and _in_any_order(gold.items, reply.items):
            return True
        return _same_region(gold, reply)
    left, right = _names(gold), _names(reply)
    if left and right:
        return left.keys() == right.keys() and all(same_answer(left[name], right[name]) for name in left)
    one = Listing("()", tuple(left[name] for name in sorted(left))) if left else _nameless(gold)
    other = Listing("()", tuple(right[name] for name in sorted(right))) if right else _nameless(reply)
    kinds = {one.kind, other.kind}
    if len(kinds - {"", "or"}) > 1 or (kinds == {"or", "()"} or kinds == {"or", "[]"}):
        return _same_region(one, other) if kinds <= {"()", "[]", "[)", "(]"} and len(kinds) == 1 else False
    dotted = Word("...") in (*one.items, *other.items)
    if dotted or kinds - {"", "or", "{}"}:
        return _in_order(one.items, other.items)
    return _in_any_order(one.items, other.items)


def _names(listing: Listing) -> dict[str, Answer]:
    """The answers by name, if each answer has a different name."""
    found = {item.name: item.answer for item in listing.items if isinstance(item, Named)}
    return found if len(found) == len(listing.items) and len(found) > 1 else {}


def _nameless(listing: Listing) -> Listing:
    """The list without its name, if the same name stands before the first item or before every item."""
    names = {item.name for item in listing.items if isinstance(item, Named)}
    if len(names) != 1 or not isinstance(listing.items[0], Named):
        return listing
    return Listing(listing.kind, tuple(_inner(item) for item in listing.items))


def _in_order(one: tuple[Answer, ...], other: tuple[Answer, ...]) -> bool:
    return len(one) == len(other) and all(map(same_answer, one, other))


def _in_any_order(one: tuple[Answer, ...], other: tuple[Answer, ...]) -> bool:
    return _covered(one, other) and _covered(other, one)


def _covered(one: tuple[Answer, ...], other: tuple[Answer, ...]) -> bool:
    return all(any(same_answer(item, candidate) for candidate in other) for item in one)


def _same_rows(one: tuple[tuple[Answer, ...], ...], other: tuple[tuple[Answer, ...], ...]) -> bool:
    return len(one) == len(other) and all(_in_order(left, right) for left, right in zip(one, other, strict=True))


def _vector(rows: tuple[tuple[Answer, ...], ...]) -> tuple[Answer, ...]:
    return tuple(itertools.chain.from_iterable(rows)) if len(rows) == 1 or len(rows[0]) == 1 else ()


def _same_parts(gold: Parts, reply: Parts) -> bool:
    if "clock" in (gold.kind, reply.kind):
        return _same_time(gold, reply)
    if gold.kind != reply.kind or len(gold.trees) != len(reply.trees):
        return False
    if gold.kind == "mod":
        gap: Tree = ("add", gold.trees[0], ("mul", MINUS_ONE, reply.trees[0]))
        if not equal(gold.trees[1], reply.trees[1]):
            return False
        quotient: Tree = ("div", gap, gold.trees[1])
        return equal(quotient, quotient if symbols(quotient) else ("fn", "floor", quotient))
    times = [all(_is_clock(part) for part in parts.trees) for parts in (gold, reply)]
    if all(times):  # 10:20 may be a time of day
        return all(map(equal, gold.trees, reply.trees))
    first, second = gold.trees[0], reply.trees[0]
    pairs = zip(gold.trees[1:], reply.trees[1:], strict=True)
    return all(equal(("mul", first, right), ("mul", second, left)) for left, right in pairs)


def _same_time(gold: Parts, reply: Parts) -> bool:
    """Whether two times of day are equal, of which one may lack its half or have 24 hours: 2:30 p.m. is 14:30."""
    if gold.kind == reply.kind:
        return gold.trees == reply.trees
    time, plain = (gold, reply) if gold.kind == "clock" else (reply, gold)
    hour, minutes, half = (tree[1] for tree in time.trees)
    if plain.kind != "ratio" or len(plain.trees) != 2 or any(tree[0] != "num" for tree in plain.trees):
        return False
    hours = {hour + 12 * half, hour or Fraction(12)}
    return plain.trees[0][1] in hours and plain.trees[1][1] == minutes


def _is_clock(tree: Tree) -> bool:
    return tree[0] == "num" and 10 <= tree[1] < 60


def _same_relation(gold: Named | Relation, reply: Named | Relation) -> bool:
    """Whether two relations mean the same. They do if the differences of their sides are multiples of each other."""
    left, right = _relation(gold), _relation(reply)
    if left is None or right is None or len(left.signs) != len(right.signs):
        return False
    pairs = zip(_differences(left), _differences(right), strict=True)
    for (sign, gap), (other_sign, other_gap) in pairs:
        if sign != other_sign or not (symbols(gap) or symbols(other_gap)):
            return False
        ratio = proportional(gap, other_gap)
        if not ratio or (ratio < 0 and sign in ("<", "\\le")):
            return False
    return True


def _relation(answer: Named | Relation) -> Relation | None:
    if isinstance(answer, Relation):
        return answer
    if isinstance(answer.answer, Value):
        return Relation(("=",), (("sym", answer.name), answer.answer.tree))
    return None


def _differences(relation: Relation) -> list[tuple[str, Tree]]:
    found = []
    for left, sign, right in zip(relation.sides, relation.signs, relation.sides[1:], strict=False):
        if sign in _UP:
            left, sign, right = right, _UP[sign], left
        found.append((sign, ("add", left, ("mul", MINUS_ONE, right))))
    return sorted(found, key=lambda pair: pair[0]) if len({pair[0] for pair in found}) > 1 else found


def _same_region(gold: Answer, reply: Answer) -> bool:
    """Whether two sets of real numbers are equal: intervals, inequalities, unions or sets given by a condition."""
    kinds = Joined | Domain | Relation | Listing | Named
    if not isinstance(gold, kinds) or not isinstance(reply, kinds):
        return False
    try:
        (name, left), (other, right) = region_of(gold), region_of(reply)
    except Unreadable:
        return _same_symbolic(gold, reply)
    return left == right and (not name or not other or name == other)


def _same_symbolic(gold: Answer, reply: Answer) -> bool:
    """Whether sets whose ends have variables are equal: unions part by part, and an interval against a condition."""
    if isinstance(gold, Joined) and isinstance(reply, Joined):
        if gold.sign != reply.sign:
            return False
        straight = same_answer(gold.left, reply.left) and same_answer(gold.right, reply.right)
        crossed = (
            gold.sign != "\\setminus" and same_answer(gold.left, reply.right) and same_answer(gold.right, reply.left)
        )
        return straight or crossed
    one, other = _as_interval(gold), _as_interval(reply)
    return one is not None and other is not None and one.kind == other.kind and _in_order(one.items, other.items)


def _as_interval(answer: Answer) -> Listing | None:
    """The interval of a chain such as a <= x < b, whose ends may be any formulas."""
    answer = _inner(answer)
    if isinstance(answer, Listing) and answer.kind in ("()", "[]", "[)", "(]"):
        return answer
    if not isinstance(answer, Relation) or len(answer.sides) != 3 or answer.sides[1][0] != "sym":
        return None
    low, _, high = answer.sides
    first, second = answer.signs
    if {first, second} <= {">", "\\ge"}:
        low, high, first, second = high, low, _UP[second], _UP[first]
    if not {first, second} <= {"<", "\\le"}:
        return None
    return Listing(("(" if first == "<" else "[") + (")" if second == "<" else "]"), (Value(low), Value(high)))
