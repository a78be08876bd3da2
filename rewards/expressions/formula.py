"""Reads one formula into a tree (tree.py) by recursive descent. Each method of the parser reads one rule:

    sum      = signed (("+" | "-" | "±" | "∓") signed)*
    signed   = ("+" | "-" | "±" | "∓")* product
    product  = factor ("*" operand | "/" operand | factor)*          two factors side by side are multiplied
    factor   = primary ("^" exponent | "^" "°" | "!" | "!!")*
    primary  = group | "|" sum "|" | numeral | name | command
    group    = "(" sum ")" | "[" sum "]" | "{" sum "}"

The whole text is read, or all of it except a unit at its end; otherwise it is Unreadable. Relations and lists are read
in `answers.py`, operands (numeral, name, command, and the arguments of functions) in `operands.py`.
"""

from fractions import Fraction

from .operands import ACCENTS, FUNCTIONS, GREEK, OperandParser
from .tokens import Token, Unreadable
from .tree import MINUS_ONE, Tree, with_sign
from .units import unit_at

MAX_DEPTH = 40
_CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}
_OPENING = {"frac", "binom", "sqrt", "radical", "cuberadical", "pi", "infty", "lfloor", "lceil", "sum", "prod"}
_TIMES = {"times", "cdot"}


def parse_formula(text: str) -> tuple[Tree, str]:
    """(tree, unit) of a formula in the spelling of notation.py; the unit is "" if there is none. Raises Unreadable."""
    parser = _Parser(text)
    tree = parser.sum()
    rest = parser.peek()
    if rest is None:
        return tree, ""
    unit = unit_at(text, rest.start)
    if unit is None:
        raise Unreadable(f"nothing reads {text[rest.start :][:30]!r}")
    return tree, unit


class _Parser(OperandParser):
    """Reads signs, powers and brackets; see the rules at the top of this file."""

    def sum(self) -> Tree:
        left = self.signed()
        while token := self.peek():
            if not self.at("+", "-", "pm", "mp"):
                break
            self.place += 1
            left = ("add", left, with_sign(token.text, self.signed()))
        return left

    def signed(self) -> Tree:
        signs = []
        while self.at("+", "-", "pm", "mp"):
            signs.append(self.tokens[self.place].text)
            self.place += 1
        tree = self.product()
        for sign in reversed(signs):
            tree = with_sign(sign, tree)
        return tree

    def product(self) -> Tree:
        left = self.factor()
        while token := self.peek():
            if self.at("*", *_TIMES) or self.is_cross():
                self.place += 1
                left = ("mul", left, self.operand())
            elif self.take("/"):
                left = ("div", left, self.operand())
            elif self.starts_factor(token):
                left = ("mul", left, self.factor())
            else:
                break
        return left

    def operand(self) -> Tree:
        """A factor after * or /, which may have a sign, as in 2 * -3."""
        if self.take("-"):
            return ("mul", MINUS_ONE, self.factor())
        self.take("+")
        return self.factor()

    def is_cross(self) -> bool:
        """Whether the next token is the letter x between two numerals, which multiplies them, as in 1.2 x 10^5."""
        token, before, after = self.peek(), self.peek(-1) if self.place else None, self.peek(1)
        return bool(
            token and token.kind == "letter" and token.text in "xX" and before and before.kind == "number"
            and after and after.kind == "number"
        )  # fmt: skip

    def starts_factor(self, token: Token) -> bool:
        """Whether the token begins a factor that is multiplied without a sign. A number and a unit do not."""
        if not self.depth and unit_at(self.text, token.start) is not None:
            return False
        if token.kind in ("letter", "name", "text"):
            return True
        if token.kind == "sign":
            return token.text in "({[" or (token.text == "|" and not self.bars)
        return token.kind == "command" and (
            token.text in GREEK or token.text in FUNCTIONS or token.text in ACCENTS
            or token.text in _OPENING
        )  # fmt: skip

    def factor(self) -> Tree:
        tree = self.primary()
        while self.peek():
            if self.at("^") and self.at("circ", ahead=1):
                if not self.angles and not self.depth and unit_at(self.text, self.tokens[self.place].start) is not None:
                    break
                self.place += 2
                tree = ("mul", tree, ("div", ("const", "pi"), ("num", Fraction(180))) if self.angles else ("sym", "°"))
            elif self.take("^"):
                tree = ("pow", tree, self.exponent())
            elif self.take("!"):
                tree = ("fn", "factorial2" if self.take("!") else "factorial", tree)
            else:
                break
        return tree

    def exponent(self) -> Tree:
        """What follows ^. Powers are read from the right: 2^3^2 is 2^(3^2)."""
        if self.take("-"):
            return ("mul", MINUS_ONE, self.exponent())
        token = self.peek()
        if token and token.kind == "number":
            self.place += 1
            return ("num", token.value)
        if self.at("(", "{", "["):
            return self.group()
        tree = self.primary()
        return ("pow", tree, self.exponent()) if self.take("^") else tree

    def group(self) -> Tree:
        """A sum in brackets or bars."""
        token = self.peek()
        if token is None or token.text not in _CLOSING:
            raise Unreadable("a bracket is missing")
        if self.depth >= MAX_DEPTH:
            raise Unreadable("brackets are too deep")
        self.place += 1
        self.depth += 1
        outer, self.bars = self.bars, int(token.text == "|")
        tree = self.sum()
        self.need(_CLOSING[token.text])
        self.bars = outer
        self.depth -= 1
        return tree
