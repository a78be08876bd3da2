"""Letters whose choice does not matter: the constant of integration, and the variable of a function.

x^2 + C is x^2 + k, and f(x) = x^2 is f(t) = t^2.
"""

import re

from .numbers import symbols
from .records import Named, Value
from .tree import Tree

_CONSTANTS = {"C", "c", "K", "k", "const"}
_FUNCTION = re.compile(r"(.+)\((\w)\)")


def with_constant_of(gold: Tree, reply: Tree) -> Tree:
    """The reply's formula with its constant of integration named as in the gold; unchanged if one of them has none."""
    own, other = _constant(gold), _constant(reply)
    return renamed(reply, other, own) if own and other and own not in symbols(reply) else reply


def with_variable_of(gold: Named, reply: Named) -> Named:
    """A function's definition with the variable of the gold; unchanged if it is no definition of the same function."""
    one, other = _FUNCTION.fullmatch(gold.name), _FUNCTION.fullmatch(reply.name)
    if not one or not other or one[1] != other[1] or not isinstance(reply.answer, Value):
        return reply
    if one[2] in symbols(reply.answer.tree):
        return reply
    tree = renamed(reply.answer.tree, other[2], one[2])
    return Named(gold.name, Value(tree, reply.answer.unit))


def renamed(tree: Tree, old: str, new: str) -> Tree:
    """The tree with one variable under another name."""
    if tree == ("sym", old):
        return ("sym", new)
    return tuple(renamed(part, old, new) if isinstance(part, tuple) else part for part in tree)


def _constant(tree: Tree) -> str:
    """The letter that is added to a formula with other variables and stands nowhere else in it; "" if there is none."""
    terms, added = [tree], []
    while terms:
        term = terms.pop()
        if term[0] == "add":
            terms += term[1:]
        else:
            added.append(term)
    names = [term[1] for term in added if term[0] == "sym" and term[1] in _CONSTANTS]
    others = [symbols(term) for term in added if term[0] != "sym" or term[1] not in names]
    alone = len(names) == 1 and any(others) and not any(names[0] in inner for inner in others)
    return names[0] if alone else ""
