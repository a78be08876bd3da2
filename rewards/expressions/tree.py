"""A formula as a tree of tuples, such as ("add", ("num", 1), ("sym", "x")) for 1 + x.

("num", Fraction)                             a number
("sym", name)                                 a variable; the name ± stands for a number that is 1 or -1
("const", name)                               e, i, pi or inf
("add" | "mul" | "div" | "pow", left, right)
("fn", name, *arguments)                      a function that can be computed
("call", name, *arguments)                    a function that is only named, such as f(x)
("sum" | "prod", variable, first, last, body)
"""

from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]
MINUS_ONE: Tree = ("num", Fraction(-1))


def with_sign(sign: str, tree: Tree) -> Tree:
    """The tree behind a sign, which is +, -, pm (±) or mp (∓)."""
    if sign == "+":
        return tree
    if sign == "-":
        return ("num", -tree[1]) if tree[0] == "num" else ("mul", MINUS_ONE, tree)
    both: Tree = ("sym", "±")
    return ("mul", both if sign == "pm" else ("mul", MINUS_ONE, both), tree)
