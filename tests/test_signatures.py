"""Up to three arguments may be given by place; the rest of a function's parameters are keyword-only, so that a call
says what each of its values is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain

PACKAGE = Path(posttrain.__file__).parent
ROOT = PACKAGE.parent
# torch calls `forward` and `backward` by place, and transformers the methods of models, trainers and callbacks.
CALLED_BY_PLACE_UPSTREAM = {"forward", "compute_loss", "on_log"}


def too_long(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each function that takes more than three arguments by place, `self` and `cls` not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in CALLED_BY_PLACE_UPSTREAM:
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            if len(names) - (names[:1] in (["self"], ["cls"])) > 3:
                yield node.lineno, node.name


def sources() -> Iterator[Path]:
    for folder in (PACKAGE, ROOT / "rewards", ROOT / "benchmarks", ROOT / "scripts"):
        yield from sorted(folder.rglob("*.py"))


def test_the_fourth_parameter_is_keyword_only():
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}" for path in sources() for line, name in too_long(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(a, b, c, d): ...", ["f"]),
        ("def f(a, b, c, *, d): ...", []),
        ("class A:\n    async def f(self, a, b, c, d=1): ...\n    def g(self, a, b, c): ...", ["f"]),
        ("class A:\n    def forward(self, a, b, c, d): ...", []),
    ],
)
def test_the_rule_finds_what_breaks_it(source: str, names: list[str]):
    assert [name for _, name in too_long(source)] == names
