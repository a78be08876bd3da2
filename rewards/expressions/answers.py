"""Reads a whole answer: a value with its unit, a word, a list, a set, an interval, a relation or a matrix.

The text is cut at the signs that join its parts (commas, "or", relations, unions) outside brackets. Then `formula.py`
must be able to read each part to its end.
"""

import re
from fractions import Fraction

from .cutting import BRACKETS, MAX_PARTS, cut, rejoined, split, step, without_thousands
from .formula import parse_formula
from .notation import normal
from .numbers import equal, real, symbols
from .records import Answer, Domain, Either, Joined, Listing, Matrix, Named, Parts, Relation, Value, Word
from .tokens import Unreadable
from .tree import Tree

_OF_MONEY = re.compile(r"(?:per|an?|each|in|dollars?|euros?|total)\b|/")
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|equiv)(?![A-Za-z])|<=|>=|!=|==|<|>|=")
_SPELLED = {"<=": "\\le", ">=": "\\ge", "!=": "\\ne", "==": "=", "\\equiv": "="}
_LIST = re.compile(r"\s*[,;]?\s*(?<![A-Za-z\\])(?P<word>and|or)(?![A-Za-z])\s*|[,;]")
_SET = re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?(?:small)?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_MODULUS = re.compile(r"(.+?)\(?\s*\\(?:pmod|bmod|mod|text\s*\{\s*mod\s*\})\s*(.+?)\s*\)?")
_WORDS = re.compile(r"[^\W_][\w' .-]*", re.UNICODE)
_FUNCTION = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?'*)\s*\(\s*([a-z](?:\s*,\s*[a-z])*)\s*\)")
_DOMAINS = {
    "\\mathbb{R}": "R", "all real numbers": "R", "all reals": "R", "\\emptyset": "", "\\{\\}": "", "no solution": "",
    "no solutions": "", "no real solutions": "",
}  # fmt: skip
_DOTS = Word("...")
_TRANSPOSED = re.compile(r"(.+?)\s*\^\s*\{?\s*(?:T|\\top|\\intercal|\\text\s*\{\s*T\s*\})\s*\}?")
_CLOCK = re.compile(
    r"(\d{1,2}):(\d{2})\s*(?:\\text\s*\{\s*)?([ap])\.?\s?m\.?\s*\}?|(\d{1,2})\s*(?:\\text\s*\{\s*)?([ap]\.\s?m\.|[AP]M)\s*\}?",
    re.IGNORECASE,
)


def parse_answer(text: str) -> Answer:
    """Read the text to its end as one answer. Raises Unreadable if that is not possible."""
    try:
        return _whole(normal(text), 0)
    except RecursionError as error:
        raise Unreadable("brackets are too deep") from error


def _whole(text: str, depth: int) -> Answer:
    text = text.strip()
    if not text or depth > 12:
        raise Unreadable("nothing to read" if not text else "brackets are too deep")
    text = without_thousands(text)
    parts, joints = cut(text, _LIST)
    if len(parts) > 1:
        words = {joint.strip(" ,;") for joint in joints} & {"and", "or"}
        last = [part for part in parts if part.strip()]
        if len(last) < len(parts) and not (words and len(last) > 1):
            raise Unreadable("a part of the list is missing")
        items = tuple(_whole(part, depth + 1) for part in last)
        return Listing("or" if "or" in words else "", items)
    return _single(text, depth)


def _single(text: str, depth: int) -> Answer:
    """An answer without commas outside brackets."""
    if text.casefold() in _DOMAINS or text in _DOMAINS:
        return Domain(_DOMAINS.get(text, _DOMAINS.get(text.casefold(), "")))
    if text in ("...", "\\ldots"):
        return _DOTS
    if (upright := re.fullmatch(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}\.?", text)) and upright[1].strip(" ~"):
        return _whole(upright[1].replace("~", " "), depth + 1)
    if word := _word(text):
        return word
    sides, signs = cut(text, _RELATION)
    if len(sides) > 1:
        return _related(sides, [_SPELLED.get(sign, sign) for sign in signs], depth)
    for sign in ("\\setminus", "\\cup", "\\cap"):
        parts, signs = cut(text, _SET)
        if sign in signs:
            place = len(signs) - 1 - signs[::-1].index(sign)
            left = rejoined(parts[: place + 1], signs[:place])
            right = rejoined(parts[place + 1 :], signs[place + 1 :])
            return Joined(sign, _whole(left, depth + 1), _whole(right, depth + 1))
    if (matrix := _MATRIX.fullmatch(text)) and "\\begin" not in matrix[2]:
        return _matrix(matrix)
    if (bracketed := _bracketed(text, depth)) is not None:
        return bracketed
    if (transposed := _transposed(text, depth)) is not None:
        return transposed
    if (time := _clock(text)) is not None:
        return time
    if modulus := _MODULUS.fullmatch(text):
        return Parts("mod", (_bare(modulus[1]), _bare(modulus[2].strip("{} "))))
    ratio, _ = cut(text, re.compile(":"))
    if len(ratio) > 1:
        return Parts("ratio", tuple(_bare(part) for part in ratio))
    return _value(text)


def _value(text: str) -> Answer:
    if text.startswith(("\\dollar", "€", "£")):
        sign, rest = re.match(r"(\\dollar|€|£)\s*(.*)", text).groups()  # type: ignore[union-attr]
        tree, unit = parse_formula(rest)
        if unit and not _OF_MONEY.match(unit):
            raise Unreadable("money with another unit")
        money = {"\\dollar": "$", "€": "euro", "£": "pound_sterling"}[sign]
        return Value(tree, unit if unit.startswith(("dollar", "euro")) else money)
    text = re.sub(r"^-\s*\\dollar\s*", "-", text)
    tree, unit = parse_formula(text)
    if "±" in symbols(tree):
        return Listing("", tuple(Value(_with(tree, sign), unit) for sign in (1, -1)))
    return Value(tree, unit)


def _with(tree: Tree, sign: int) -> Tree:
    if tree == ("sym", "±"):
        return ("num", Fraction(sign))
    return tuple(_with(part, sign) if isinstance(part, tuple) else part for part in tree)


def _bare(text: str) -> Tree:
    tree, unit = parse_formula(text)
    if unit:
        raise Unreadable("a unit within a ratio")
    return tree


def _word(text: str) -> Word | None:
    """Plain words, as "even" or "Tuesday morning"; None for what may be a product of variables."""
    if not _WORDS.fullmatch(text) or not re.search(r"[^\W\d_]", text):
        return None
    runs = re.findall(r"[^\W\d_]+", text)
    if len(runs) == 1 and re.search(r"\d", text):
        return None
    first = runs[0]
    names = {"pi", "infinity", "infty", "inf", "sqrt", "theta", "alpha", "beta"}
    if any(run in names for run in runs) or (len(runs) > 1 and max(map(len, runs)) < 3) or re.match(r"\d", text):
        return None
    fits = len(first) > 3 or first.casefold() in ("no", "yes") or not first.isascii() or (
        len(first) == 3 and bool(re.search("[aeiou]", first[1:].lower()) or first.istitle())
    ) or (len(first) == 2 and first.istitle()) or len(runs) > 1  # fmt: skip
    if not fits:
        return None
    kept = re.sub(r"^(?:the|an?)\s+", "", " ".join(text.casefold().split()).strip(" ."))
    return Word(kept)


def _related(texts: list[str], signs: list[str], depth: int) -> Answer:
    if not texts[0].strip() and signs == ["\\approx"]:
        return _whole(texts[1], depth + 1)
    if any(not text.strip() for text in texts):
        raise Unreadable("a side of a relation is missing")
    if signs[0] == "\\in" and len(signs) == 1:
        return Named(_name(texts[0]) or _key_of(texts[0]), _whole(texts[1], depth + 1))
    if set(signs) <= {"=", "\\approx"}:
        return _equation(texts, signs, depth)
    if "\\approx" in signs or "\\in" in signs:
        raise Unreadable("signs that do not belong together")
    return Relation(tuple(signs), tuple(_bare(text) for text in texts))


def _equation(texts: list[str], signs: list[str], depth: int) -> Answer:
    name = _name(texts[0])
    if name is not None:
        rest = _whole(texts[1], depth + 1) if len(texts) == 2 else _equation(texts[1:], signs[1:], depth)
        if len(texts) > 2 and isinstance(rest, Named | Relation):
            raise Unreadable("a chain of equations")
        return Named(name, rest)
    trees = [_bare(text) for text in texts]
    if not any(map(symbols, trees)):
        return _chain(trees, signs)
    if len(texts) == 2 and signs == ["="]:
        back = _name(texts[1])
        return Named(back, Value(trees[0])) if back and not symbols(trees[0]) else Relation(("=",), tuple(trees))
    if set(signs) == {"="} and all(equal(trees[0], tree) for tree in trees[1:]):
        return Value(trees[-1])
    raise Unreadable("a chain of equations")


def _chain(trees: list[Tree], signs: list[str]) -> Answer:
    """Numbers that the text calls equal or nearly equal. Raises Unreadable if they are not."""
    exact, rounded = [trees[0]], []
    for sign, tree in zip(signs, trees[1:], strict=True):
        (rounded if sign == "\\approx" or rounded else exact).append(tree)
    if any(not equal(exact[0], tree) for tree in exact[1:]):
        raise Unreadable("a chain of equations that is false")
    if not rounded:
        return Value(exact[-1])
    number, near = real(exact[0]), real(rounded[-1])
    if abs(number - near) > abs(number) / 100:
        raise Unreadable("an approximation that is false")
    return Either(Value(exact[-1]), Value(rounded[-1]))


def _name(text: str) -> str | None:
    """The left side of an assignment as a name: a word, or a formula made of names alone."""
    text = text.strip()
    if function := _FUNCTION.fullmatch(text):
        return f"{function[1]}({function[2]})".replace(" ", "").replace("{", "").replace("}", "")
    if word := _word(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)):
        return word.text
    try:
        tree, unit = parse_formula(text)
    except Unreadable:
        return None
    return _key_of(text) if not unit and _is_name(tree) else None


def _is_name(tree: Tree) -> bool:
    return tree[0] == "sym" or (tree[0] in ("mul", "div") and _is_name(tree[1]) and _is_name(tree[2]))


def _key_of(text: str) -> str:
    return re.sub(r"[\s{}]|\\text", "", text)


def _bracketed(text: str, depth: int) -> Answer | None:
    """A list, interval or set, if brackets enclose all of the text; None if they are only the brackets of a formula."""
    places = list(BRACKETS.finditer(text))
    if not places or places[0].start() or places[-1].end() != len(text):
        return None
    level = 0
    for place in places:
        level += step(place[0])
        if level == 0 and place is not places[-1]:
            return None
    left, right = places[0][0], places[-1][0]
    inner = text[places[0].end() : places[-1].start()]
    kind = {"\\{\\}": "{}", "\\langle\\rangle": "()"}.get(left + right, left + right)
    if kind == "{}" and left == "{":
        return _whole(inner, depth + 1)
    if kind == "{}":
        builder, _ = cut(inner, re.compile(r"\\mid(?![A-Za-z])|\||:"))
        if len(builder) == 2:
            return _builder(builder[0], builder[1], depth)
        return Listing("{}", tuple(_whole(part, depth + 1) for part in split(inner)))
    parts = split(inner)
    if kind not in ("()", "[]", "[)", "(]"):
        raise Unreadable("brackets that do not belong together")
    if len(parts) == 1:
        if kind == "()" and left == "(" and (re.search(r"[:%=<>]", inner) or re.fullmatch(r"\s*[A-Za-z]\s*", inner)):
            return _whole(inner, depth + 1)
        if _word(inner.strip()):
            return _whole(inner, depth + 1)
        return None
    return Listing(kind, tuple(_whole(part, depth + 1) for part in parts))


def _builder(head: str, condition: str, depth: int) -> Answer:
    """A set given by a condition, such as `{x | x > 3}` or `{x ∈ R : x > 3}`."""
    sides, signs = cut(head, _RELATION)
    if _name(sides[0]) is None or (signs and (signs != ["\\in"] or sides[1].strip() != "\\mathbb{R}")):
        raise Unreadable("a set of this form")
    return Domain("R", _whole(condition, depth + 1))


def _transposed(text: str, depth: int) -> Matrix | None:
    """A matrix, or a vector that is written as a list, with its rows as columns; None for any other text."""
    if not (match := _TRANSPOSED.fullmatch(text)) or not match[1].endswith((")", "]", "}")):
        return None
    if (matrix := _MATRIX.fullmatch(match[1])) and "\\begin" not in matrix[2]:
        return Matrix(tuple(zip(*_matrix(matrix).rows, strict=True)))
    listing = _bracketed(match[1], depth)
    if isinstance(listing, Listing) and listing.kind in ("()", "[]"):
        return Matrix(tuple((item,) for item in listing.items))
    return None


def _clock(text: str) -> Parts | None:
    """A time of day with its half, such as 2:30 p.m. or 3 PM: hour, minutes, and 1 for the afternoon."""
    if not (match := _CLOCK.fullmatch(text)):
        return None
    hour, minutes, half = int(match[1] or match[4]), int(match[2] or 0), (match[3] or match[5])[0].lower()
    if (match[5] and match[5] in ("pm", "am")) or not 1 <= hour <= 12 or minutes > 59:
        return None
    return Parts("clock", tuple(("num", Fraction(part)) for part in (hour % 12, minutes, int(half == "p"))))


def _matrix(match: re.Match[str]) -> Matrix:
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    found = tuple(tuple(_whole(cell, 3) for cell in row.split("&")) for row in rows)
    if not found or len({len(row) for row in found}) > 1 or sum(map(len, found)) > MAX_PARTS:
        raise Unreadable("a matrix of this form")
    return Matrix(found)
