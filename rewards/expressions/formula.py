"""Reads one formula into a tree (tree.py) by recursive descent. Each method of the parser reads one rule:

    sum      = signed (("+" | "-" | "±" | "∓") signed)*
    signed   = ("+" | "-" | "±" | "∓")* product
    product  = factor ("*" operand | "/" operand | factor)*          two factors side by side are multiplied
    factor   = primary ("^" exponent | "^" "°" | "!" | "!!")*
    primary  = group | "|" sum "|" | numeral | name | command
    group    = "(" sum ")" | "[" sum "]" | "{" sum "}"

The whole text is read, or all of it except a unit at its end; otherwise it is Unreadable. Relations and lists are read
in `answers.py`.
"""

from fractions import Fraction

from .tokens import NAMES, Cursor, Token, Unreadable, words
from .tree import MINUS_ONE, Tree, with_sign
from .units import unit_at

MAX_DEPTH = 40
_GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell aleph"
)
_FUNCTIONS = set(NAMES) - {"infinity", "infty", "inf", "pi", "theta", "alpha", "beta", "sqrt"}
_TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
_ACCENTS = {"overline", "vec", "hat", "bar", "tilde", "dot", "widehat", "overrightarrow", "mathcal", "mathfrak"}
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


class _Parser(Cursor):
    """depth: number of open brackets. bars: 1 if a | would close an absolute value. angles: number of enclosing
    trigonometric functions; inside them a degree sign means pi / 180.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.bars, self.angles = 0, 0, 0

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
            token.text in _GREEK or token.text in _FUNCTIONS or token.text in _ACCENTS
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

    def argument(self) -> Tree:
        """The argument of a LaTeX command: a group in braces, one digit, one letter or one command, but no bracket."""
        token = self.peek()
        if token is None or token.text in ("(", "[", "|"):
            raise Unreadable("an argument is missing")
        if self.at("{"):
            return self.group()
        if token.kind == "number":
            if not token.text.isdigit():
                raise Unreadable("an argument needs braces")
            first, rest = token.text[0], token.text[1:]
            self.place += 1
            if rest:
                self.place -= 1
                self.tokens[self.place] = Token("number", rest, token.start + 1, False, Fraction(rest))
            return ("num", Fraction(first))
        if token.kind == "sign":
            raise Unreadable("an argument is missing")
        return self.primary()

    def primary(self) -> Tree:
        token = self.peek()
        if token is None:
            raise Unreadable("the formula ends too early")
        if token.text in ("(", "{", "[") and token.kind == "sign":
            return self.group()
        if token.text == "|" and not self.bars:
            return ("fn", "abs", self.group())
        self.place += 1
        if token.kind == "number":
            return self.numeral(token)
        if token.kind in ("letter", "text"):
            return self.named(token)
        if token.kind in ("command", "name"):
            return self.command(token)
        raise Unreadable(f"nothing reads {token.text!r} here")

    def numeral(self, token: Token) -> Tree:
        """A number: plain, with an index (its base, 101_2), or mixed with a fraction (1 1/2)."""
        if self.take("_"):
            return ("sym", f"{token.text}_{self.index()}")
        number: Tree = ("num", token.value)
        if token.text.isdigit():
            if self.at("frac"):
                start, kept = self.place, list(self.tokens)
                self.place += 1
                above, below = self.argument(), self.argument()
                if above[0] == below[0] == "num" and 0 < above[1] < below[1]:
                    return ("add", number, ("div", above, below))
                self.place, self.tokens = start, kept
            above, slash, below = self.peek(), self.at("/", ahead=1), self.peek(2)
            if above and above.kind == "number" and above.spaced and slash and below and below.kind == "number":
                if above.value is None or below.value is None or not 0 < above.value < below.value:
                    raise Unreadable("no mixed number")
                self.place += 3
                return ("add", number, ("num", above.value / below.value))
        return number

    def named(self, token: Token) -> Tree:
        """A variable, a call such as f(x), a function in upright letters, or one of the constants e and i."""
        name = token.text
        if token.kind == "text":
            if name in _FUNCTIONS:
                return self.function(name)
            if not name or not name.replace(" ", "").isalnum():
                raise Unreadable(f"nothing reads {name!r} here")
        if name in ("e", "i"):
            return ("const", name)
        while self.take("'"):
            name += "'"
        if self.take("_"):
            name += "_" + self.index()
        if name[0] in "fgh" and len(name) < 4 and self.at("("):
            return ("call", name, *self.arguments())
        return ("sym", name)

    def index(self) -> str:
        """An index after _: the text in braces, or one token."""
        token = self.peek()
        if token is None:
            raise Unreadable("an index is missing")
        self.place += 1
        if token.text != "{":
            return token.text
        depth, parts = 1, []
        while depth:
            token = self.peek()
            if token is None:
                raise Unreadable("'}' is missing")
            self.place += 1
            depth += {"{": 1, "}": -1}.get(token.text, 0)
            parts.append(token.text)
        return "".join(parts[:-1])

    def arguments(self) -> list[Tree]:
        """Arguments in brackets, separated by commas."""
        self.need("(")
        self.depth += 1
        found = [self.sum()]
        while self.take(","):
            found.append(self.sum())
        self.need(")")
        self.depth -= 1
        return found

    def command(self, token: Token) -> Tree:
        """What a LaTeX command or a known word begins: a fraction, a root, a function, a constant, a sum, a letter."""
        name = token.text
        if name == "frac":
            return ("div", self.argument(), self.argument())
        if name == "binom":
            return ("fn", "binomial", self.argument(), self.argument())
        if name == "sqrt" and token.kind == "command":
            order = self.group() if self.at("[") else ("num", Fraction(2))
            return ("fn", "root", self.argument(), order)
        if name in ("radical", "cuberadical", "sqrt"):
            order = ("num", Fraction(3 if name == "cuberadical" else 2))
            return ("fn", "root", self.group() if self.at("(", "{") else self.primary(), order)
        if name in _FUNCTIONS:
            return self.function(name)
        if name == "pi":
            return ("const", "pi")
        if name in ("infty", "infinity", "inf"):
            return ("const", "inf")
        if name in _GREEK or name in NAMES:
            return self.named(Token("letter", name, token.start, token.spaced))
        if name in ("lfloor", "lceil"):
            self.depth += 1
            tree = self.sum()
            self.need("r" + name[1:])
            self.depth -= 1
            return ("fn", name[1:], tree)
        if name in ("sum", "prod"):
            return self.series(name)
        if name in _ACCENTS:
            return ("sym", f"{name}({self.index()})")
        raise Unreadable(f"nothing reads \\{name}")

    def series(self, name: str) -> Tree:
        """A sum or product of a series: _{variable = first}^last body."""
        self.need("_")
        self.need("{")
        variable = self.peek()
        self.place += 1
        if variable is None or variable.kind != "letter":
            raise Unreadable("a sum has no variable")
        self.need("=")
        first = self.sum()
        self.need("}")
        self.need("^")
        last = self.exponent()
        return (name, variable.text, first, last, self.product())

    def function(self, name: str) -> Tree:
        """A function and its argument. The power and the base come first, as in \\sin^2 2x and \\log_2 8."""
        power: Tree | None = None
        base: Tree | None = None
        for _ in range(2):
            if self.take("^"):
                power = self.exponent()
            elif name == "log" and self.take("_"):
                base = self.argument()
        if name in _TRIGONOMETRIC and power in (MINUS_ONE, ("mul", MINUS_ONE, ("num", Fraction(1)))):
            name, power = "arc" + name, None
        self.angles += name in _TRIGONOMETRIC
        arguments = self.arguments() if self.at("(") else [self.bare_argument()]
        self.angles -= name in _TRIGONOMETRIC
        if base is not None:
            arguments.append(base)
        tree: Tree = ("fn", name, *arguments)
        return tree if power is None else ("pow", tree, power)

    def bare_argument(self) -> Tree:
        """The argument of a function without brackets: the factors up to the next bracket or function."""
        tree = self.factor()
        while token := self.peek():
            function = token.text in _FUNCTIONS and token.kind in ("command", "name")
            if function or token.text in ("(", "[") or not self.starts_factor(token):
                break
            tree = ("mul", tree, self.factor())
        return tree
