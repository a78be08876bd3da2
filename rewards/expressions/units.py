"""Units at the end of an answer: finds where a unit begins, and decides whether two units are the same.

pint knows the names, short forms and prefixes of units. Words that it does not know ("apples") are the same unit if
they are equal.
"""

import functools
import re
from fractions import Fraction
from typing import Any

from .tokens import words

# Short names that count as units after a number even without a LaTeX macro around them ("12cm", "5 kg").
_SHORT = frozenset(
    words(
        "mm cm dm km nm ft yd mi mg kg lb lbs oz ml mL cl dl kL ms ns hr hrs min mins sec secs yr yrs km/h kmh kph "
        "mph rpm Hz kHz MHz GHz kN kJ MJ eV keV MeV kW MW kWh kV mV mA kPa Pa MPa atm bar mol cal kcal rad deg sq cu "
        "USD EUR cents men"
    )
)
_SINGLE = frozenset("mgshLlNJWVAKCFTH")
_HEDGES = frozenset(
    words(
        "or and but maybe perhaps possibly probably about approximately roughly so not plus minus times either if "
        "then is are was equals equal to nor else mod modulo divided over than more less least most half quarter "
        "third squared cubed wait no actually hundred thousand million billion trillion dozen factorial choose"
    )
)
_NEUTRAL = frozenset(
    words("unit square cubic sq cu in total of the a an each altogether exactly only all different way")
)
_LETTERS = re.compile(r"[A-Za-z]+")
_PERCENT = re.compile(r"\s*(?:\\?%|\\?percent|per cent|\\text\{\s*(?:\\?%|percent|per cent)\s*\})\s*")
_UPRIGHT = re.compile(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SHAPE = re.compile(r"[A-Za-z°µΩ$/^*().0-9 -]*")
_MONEY = (
    "dollar = [currency] = usd = USD; cent = dollar / 100; euro = [euro_currency] = eur = EUR; pound_sterling = [gbp]"
)


def unit_at(text: str, start: int) -> str | None:
    """The unit that begins at this place and ends with the text, in plain words; None if the rest is not a unit."""
    rest = text[start:]
    if rest[:1] in "([{|+*=<>!_" or len(rest) > 80:
        return None
    if _PERCENT.fullmatch(rest):
        return "%"
    marked = rest.startswith(("\\text", "^\\circ", "\\dollar", "\\mu", "\\Omega"))
    before = text[:start]
    if rest.startswith("/") and not re.match(r"/\s*\\text", rest):
        return None
    words = _plain(rest)
    if words is None:
        return None
    first = _LETTERS.search(words)
    if first is None:
        return words if words in ("°", "Ω", "$") else None
    names = [name.lower() for name in _LETTERS.findall(words)]
    if _HEDGES.intersection(names) or len(names) > 7:
        return None
    if marked:
        alone = len(words) == 1 and words not in _SINGLE  # an upright variable
        return None if alone or not re.search(r"[\d})]\s*$|^\s*$", before) else words
    glued = not (before.endswith(" ") or rest.startswith(" "))
    word = first[0]
    if len(word) == 1:
        fits = word in _SINGLE and not glued and bool(re.search(r"\d\s*$", before)) and "\\" not in before
    elif word in _SHORT:
        fits = bool(re.search(r"[\d})]\s*$", before))
    else:
        fits = not glued and (len(word) > 3 or (len(word) == 3 and bool(re.search("[aeiou]", word)) and word != "abc"))
    return words if fits else None


def _plain(rest: str) -> str | None:
    """The unit without LaTeX: words, `/`, `*` and powers; None if there is anything else."""
    for _ in range(2):
        rest = _UPRIGHT.sub(r" \1 ", rest)
    rest = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/(\2)", rest)
    rest = rest.replace("\\dollar", "$").replace("^\\circ", "°").replace("\\mu ", "µ").replace("\\Omega", "Ω")
    rest = re.sub(r"\s*\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", rest.replace("\\cdot", "*").replace("~", " "))
    rest = re.sub(r"[{}\\]", lambda match: "" if match[0] != "\\" else match[0], rest)
    words = " ".join(rest.split()).strip(".")
    return words if _SHAPE.fullmatch(words) and not re.search(r"(?<![\^-])(?<!\^-)\d", words) else None


def same_unit(one: str, other: str) -> Fraction | None:
    """The factor from the first unit to the second, such as 100 from m to cm; None if they measure different things.

    Unknown words are the same unit if they are equal apart from a plural. Neutral words ("units", "in total") match any
    unit.
    """
    first, second = _words(one), _words(other)
    if first == second or not first or not second:
        return Fraction(1)
    try:
        left, right = _registry()(first), _registry()(second)
    except Exception:  # pint raises many kinds for text that is no unit
        return None
    if left.dimensionality != right.dimensionality:
        return None
    try:
        factor = left.to(right.units).magnitude
    except Exception:  # units with an offset, as degrees of temperature
        return None
    return Fraction(factor) if isinstance(factor, Fraction | int) else None


def _words(unit: str) -> str:
    """The unit with singular words, without the neutral ones, as pint reads it."""
    text = unit.replace("°C", " degC ").replace("° C", " degC ").replace("°F", " degF ").replace("° F", " degF ")
    text = text.replace("°", " degree ").replace("$", " dollar ").replace("Ω", " ohm ").replace("µ ", "µ")
    text = re.sub(r"\b(?:square|sq\.?)\s+([A-Za-z]+)", r"\1^2", text)
    text = re.sub(r"\b(?:cubic|cu\.?)\s+([A-Za-z]+)", r"\1^3", re.sub(r"\bper\b", "/", text))
    text = re.sub(r"\b([A-Za-z]+) squared\b", r"\1^2", text)
    words = re.findall(r"[A-Za-zµ]+(?:\^-?\d)?|[/*()]", re.sub(r"\s+\^", "^", text))
    kept = [_singular(word) for word in words]
    kept = [word for word in kept if word.partition("^")[0].lower() not in _NEUTRAL]
    return " ".join(kept).strip("/* ")


def _singular(word: str) -> str:
    name, mark, power = word.partition("^")
    name = {"feet": "foot", "inches": "inch", "hrs": "hour", "hr": "hour", "mins": "minute", "min": "minute", "secs":
            "second", "sec": "second", "yrs": "year", "yr": "year", "lbs": "pound", "lb": "pound", "L": "liter",
            "kph": "km / hour", "kmh": "km / hour", "people": "person", "men": "man", "women": "woman",
            "pennies": "cent", "children": "child", "¢": "cent"}.get(name, name)  # fmt: skip
    if len(name) > 3 and name.endswith("ies"):
        name = name[:-3] + "y"
    elif len(name) > 3 and name.endswith(("ches", "shes", "xes", "sses")):
        name = name[:-2]
    elif len(name) > 3 and name.endswith("s") and not name.endswith("ss"):
        name = name[:-1]
    return (name.lower() if len(name) > 3 else name) + mark + power


@functools.cache
def _registry() -> Any:
    """pint's registry of units, in exact fractions.

    It is loaded when two different names are compared the first time.
    """
    import pint

    registry: Any = pint.UnitRegistry(non_int_type=Fraction)  # pyright: ignore[reportArgumentType]
    for line in _MONEY.split("; "):
        registry.define(line)
    return registry
