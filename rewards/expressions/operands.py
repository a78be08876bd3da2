"""Reads the operands of a formula: numbers, names, LaTeX commands, functions with their arguments, and series.

formula.py has the signs between operands. Its parser extends `OperandParser`, because an operand may hold a whole
formula, such as the argument of a function.
"""

from abc import ABC, abstractmethod
from fractions import Fraction

from .tokens import NAMES, Cursor, Token, Unreadable, words
from .tree import MINUS_ONE, Tree

GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell aleph"
)
FUNCTIONS = set(NAMES) - {"infinity", "infty", "inf", "pi", "theta", "alpha", "beta", "sqrt"}
ACCENTS = {"overline", "vec", "hat", "bar", "tilde", "dot", "widehat", "overrightarrow", "mathcal", "mathfrak"}
_TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}


class OperandParser(Cursor, ABC):
    """depth: number of open brackets. bars: 1 if a | would close an absolute value. angles: number of enclosing
    trigonometric functions; inside them a degree sign means pi / 180.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.bars, self.angles = 0, 0, 0

    @abstractmethod
    def sum(self) -> Tree: ...
    @abstractmethod
    def product(self) -> Tree: ...
    @abstractmethod
    def factor(self) -> Tree: ...
    @abstractmethod
    def exponent(self) -> Tree: ...
    @abstractmethod
    def group(self) -> Tree: ...
    @abstractmethod
    def starts_factor(self, token: Token) -> bool: ...

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
            if name in FUNCTIONS:
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
        if name in FUNCTIONS:
            return self.function(name)
        if name == "pi":
            return ("const", "pi")
        if name in ("infty", "infinity", "inf"):
            return ("const", "inf")
        if name in GREEK or name in NAMES:
            return self.named(Token("letter", name, token.start, token.spaced))
        if name in ("lfloor", "lceil"):
            self.depth += 1
            tree = self.sum()
            self.need("r" + name[1:])
            self.depth -= 1
            return ("fn", name[1:], tree)
        if name in ("sum", "prod"):
            return self.series(name)
        if name in ACCENTS:
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
            function = token.text in FUNCTIONS and token.kind in ("command", "name")
            if function or token.text in ("(", "[") or not self.starts_factor(token):
                break
            tree = ("mul", tree, self.factor())
        return tree
