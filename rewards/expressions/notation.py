"""Gives each sign a single spelling before a text is parsed, whether it is Unicode, a variant of LaTeX or spacing.

No rule changes a value. A sign without a rule is left unchanged, and the parser refuses it.
"""

import re
import unicodedata

from .rare import styled, usual
from .tokens import words

_SIGNS = {
    **dict.fromkeys("−–﹣－‐‑", "-"), **dict.fromkeys("·⋅∙•", r"\cdot "), "×": r"\times ", "÷": r"/", "∗": "*",
    "∕": "/", "⁄": "/", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "∅": r"\emptyset ",
    "°": r"^\circ ", "º": r"^\circ ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "…": r"\ldots ", "⋯": r"\ldots ", "±": r"\pm ", "∓": r"\mp ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "√": r"\radical ", "∛": r"\cuberadical ", "ℯ": "e", "ⅈ": "i", "ⅇ": "e", "ℓ": "l", "µ": r"\mu ",
    "Ω": r"\Omega ", "′": "'", "’": "'", "‖": r"\|", "∣": "|", "：": ":", "，": ",", "、": ",", "；": ";", "（": "(",
    "）": ")", "％": "%", "＝": "=", "＋": "+", "∧": r" \text{ and } ", "∨": r" \text{ or } ",
    "∑": r"\sum ", "∏": r"\prod ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "\u200b": "", "\u2060": "", "\ufeff": "", "\u200e": "",
}  # fmt: skip
_GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi "
    "psi omega"
)
for _name in _GREEK:
    _letter = {"lambda": "lamda"}.get(_name, _name).upper()
    _SIGNS.setdefault(unicodedata.lookup(f"GREEK SMALL LETTER {_letter}"), f"\\{_name} ")
    _SIGNS.setdefault(unicodedata.lookup(f"GREEK CAPITAL LETTER {_letter}"), f"\\{_name.capitalize()} ")
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))
_SAME = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"), "frac"),
    **dict.fromkeys(("dbinom", "tbinom"), "binom"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), "le"), **dict.fromkeys(("geq", "geqslant", "geqq"), "ge"),
    "neq": "ne", "lt": "<", "gt": ">", "ast": "*", "infin": "infty", "isin": "in", "varphi": "phi",
    "varepsilon": "epsilon", "vartheta": "theta", "varrho": "rho", "varnothing": "emptyset",
    "smallsetminus": "setminus",
    "backslash": "setminus", "colon": ":", "degree": "^\\circ", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[",
    "rbrack": "]", "lparen": "(", "rparen": ")", "Re": "Re", "div": "/", "imath": "i", "exponentialE": "e",
    "imaginaryI": "i", "Reals": "mathbb{R}", "R": "mathbb{R}", "reals": "mathbb{R}", "simeq": "approx", "cdotp": "cdot",
    **dict.fromkeys(("vert", "lvert", "rvert"), "|"),
    **dict.fromkeys(("dots", "cdots", "dotsc", "dotsb", "dotso", "hdots"), "ldots"),
    **{"up" + name: name for name in _GREEK},
}  # fmt: skip
_DROPPED = words(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr mleft mright displaystyle textstyle "
    "limits nolimits scriptstyle hfill rm bf it nobreak boldmath"
)
_SPACES = ("quad qquad enspace thinspace space enskip negthinspace medspace").split()  # noqa: SIM905
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_SPACING = re.compile(r"(?<!\\)\\[,;: ]|~|\\!")
_THIN = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|~|\\thinspace\s?)+(?=\d{3}(?!\d))")
_WIDE = re.compile(r"(?<![\d.,])(\d{1,3})((?:[ \u00a0\u2009\u202f]\d{3})+)(?![\d/]|\s*[/\\]frac)")
_GROUPS = re.compile(r"(?<![\d.,_'])\d{1,3}(?:(?:'\d{3})+|(?:\.\d{3}){2,}|(?:_\d{3}){2,})(?![\d.,])")
_COMMA = re.compile(r"(?<![\d.,}])(?:0\{,\}(?=\d)|(\d+)\{,\}(?=(?:\d{1,2}|\d{4,})(?![\d{])))")
_FRENCH = re.compile(r"([\[\]])([^\[\]]*[,;][^\[\]]*)([\[\]])")
_UPRIGHT = r"\\(?:text|textrm|textup|mathrm|mbox|hbox|textnormal|mathsf|textsf|operatorname\*?)"
_STYLED = re.compile(
    r"\\(?:mathbf|textbf|boldsymbol|bm|mathit|textit|emph|boxed|fbox|bold|ensuremath|underline)\s*(?=\{)"
)
_LINKED = re.compile(_UPRIGHT + r"\s*\{[\s~]*,?[\s~]*(and|or)[\s~]*\}")


def normal(text: str) -> str:
    """The text with one spelling for each sign, without dollar signs around it and without layout commands."""
    text = _COMMA.sub(lambda match: (match[1] or "0") + ".", text.strip())
    text = _THIN.sub("", text)
    text = "".join(_spelled(text, place) for place in range(len(text)))
    text = unicodedata.normalize("NFKC", text.replace("\u2044", "/"))
    text = _unwrapped(text)
    text = _LINKED.sub(r" \1 ", re.sub(r"\\(?:lor|vee)(?![A-Za-z])", " or ", styled(text)))
    text = usual(re.sub(_UPRIGHT + r"\s*(?=\{)", r"\\text", text))
    text = _STYLED.sub("", re.sub(r"\\(?:boxed|fbox)\s+(?=\w)", "", text))
    text = _COMMAND.sub(_command, text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}", r"^\\circ ", text)
    text = _WIDE.sub(lambda match: re.sub(r"\s", "", match[0]), _SPACING.sub(" ", text))
    text = _GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = re.sub(r"\(([^\[\]()]*[,;][^\[\]()]*)\[", r"(\1)", text)
    text = re.sub(r"\]([^\[\]()]*[,;][^\[\]()]*)\)", r"(\1)", text)
    text = _FRENCH.sub(_plain_interval, text)
    return " ".join(text.split())


def key(text: str) -> str:
    """A key that is equal for texts which differ in spelling and spacing only. Equal keys mean equal answers."""
    return re.sub(r"(?<=[^\w\s])\s+|\s+(?=[^\w\s])", "", normal(text))


def _spelled(text: str, place: int) -> str:
    sign = text[place]
    if sign < "\x80":
        return sign
    before = text[place - 1] if place else ""
    after = text[place + 1] if place + 1 < len(text) else ""
    for marks, mark in ((_RAISED, "^"), (_LOWERED, "_")):
        if sign in marks:
            return ("" if before in marks else mark + "{") + marks[sign] + ("" if after and after in marks else "}")
    if unicodedata.decomposition(sign).startswith("<fraction>"):
        above, below = unicodedata.normalize("NFKC", sign).split("\u2044")
        return rf"\frac{{{above}}}{{{below}}}" if below else sign
    return _SIGNS.get(sign, sign)


def _unwrapped(text: str) -> str:
    """The text without the signs of mathematics mode, which only show where the formula begins and ends."""
    text = text.replace(r"\(", " ").replace(r"\)", " ").replace(r"\[", " ").replace(r"\]", " ")
    text = text.replace("\\$", "\\dollar ").strip().strip("*").strip()
    if text.startswith("$") and text.count("$") == 1:  # an amount of money
        return "\\dollar " + text[1:]
    return text.replace("$", " ")


def _command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _DROPPED:
        return ""
    if name in _SPACES:
        return " "
    same = _SAME.get(name, name)
    if not same[0].isalpha() or name in ("imath", "exponentialE", "imaginaryI"):
        return same + (" " if same[0] == "\\" or same.startswith("^") else "")
    return "\\" + same


def _plain_interval(match: re.Match[str]) -> str:
    """`]a, b[` as `(a, b)`: a square bracket that is turned outwards excludes the end of an interval."""
    if (match[1], match[3]) == ("[", "]"):
        return match[0]
    return ("(" if match[1] == "]" else "[") + match[2] + (")" if match[3] == "[" else "]")
