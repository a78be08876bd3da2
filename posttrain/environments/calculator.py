"""A calculator as a tool: the policy may have expressions computed before it answers."""

import ast
import operator
from fractions import Fraction

from posttrain.environments.tool_use import until_answer
from posttrain.episodes.session import Session
from posttrain.records import RewardResult, Row, ToolCall

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_MAX_CHARS = 500
_MAX_DIGITS = 1000  # of a number: an expression of a few characters can have millions


def calculate(expression: str) -> str:
    """Compute an arithmetic expression and return its exact value.

    Args:
        expression: Numbers with + - * / // % ** and brackets, such as (3 + 4) * 12.
    """
    try:
        if len(expression) > _MAX_CHARS:
            raise ValueError(f"it has {len(expression)} characters, and at most {_MAX_CHARS} are allowed")
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"
    except ZeroDivisionError:
        return f"Error: {expression[:80]!r} divides by zero"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"Error: {expression[:80]!r} cannot be computed: {error}"


TOOLS = {"calculator": [calculate]}
REQUIRES = {"calculator": ["answer"]}


async def calculator(session: Session, row: Row, *, max_turns: int = 4, marker: str = "") -> RewardResult:
    """Let the policy call a calculator; 1 if its last turn is the row's answer.

    max_turns: how many turns the policy has at most. marker: the text after which the answer stands, such as "Answer:";
    "" compares the whole turn.
    """

    def value(call: ToolCall) -> str:
        return calculate(str(call.arguments["expression"]))

    return await until_answer(session, row, value, max_turns=max_turns, marker=marker)


def _value(node: ast.expr) -> Fraction:
    """The exact value. Raises ValueError for anything but numbers and the operators above, and for values too large."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number)) if isinstance(number, float) else Fraction(number)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _applied(op, _value(left), _value(right))
    raise ValueError("only numbers, + - * / // % ** and brackets are allowed")


def _applied(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(op, ast.Pow):
        size = max(abs(left.numerator), left.denominator).bit_length() * abs(right)
        if right.denominator != 1 or size > _MAX_DIGITS * 3:
            raise ValueError("the power is too large, or its exponent is no whole number")
        return left ** int(right)
    value = Fraction(_OPERATORS[type(op)](left, right))
    if max(abs(value.numerator), value.denominator) >= 10**_MAX_DIGITS:
        raise ValueError(f"the value has more than {_MAX_DIGITS} digits")
    return value
