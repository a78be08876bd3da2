"""Runs the program in the reply against the row's tests, in a sandbox. Without a sandbox nothing is run and nothing
scored.

The sandbox returns results, and this process compares them with the expected values. The program never sees these
values, so it can neither stop early nor fake a success. The exception is an assertion that has not the form
`assert EXPRESSION == LITERAL`. It runs beside the program, which could fake it, so prefer the other kinds of test.
"""

import ast
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.records import RewardResult, Rollout, Row
from posttrain.scoring.sandbox.run import Limits, SandboxResult, limit_of_error, run_python

from .blocks import fenced_blocks
from .stated import without_reasoning

REQUIRES = {"code": ["tests"]}
_PYTHON = re.compile(r"i?py(?:thon)?(?:[23](?:\.\d+)?)?")
_MAX_VALUE_CHARS = 500_000
_PROGRAM = "the program: "
_LIMIT = "limit"
_Step = tuple[str, str, Any]

# This program runs in the sandbox. It executes the reply's program, then evaluates each check and writes a line for it.
# It takes the functions that it needs before the reply's program can replace them. Each line begins with a secret, so
# that lines which that program writes to any open file are not taken for its results.
_HARNESS = """
import json, os, sys

def main(run=exec, value_of=eval, show=repr, to_line=json.dumps, size=len, error_type=BaseException, text_of=str):
    job = json.loads(sys.stdin.buffer.read())
    secret, checks, max_chars, leave = job.pop("secret"), job.pop("checks"), job.pop("max_chars"), sys.exit
    answers = os.fdopen(os.dup(1), "w")
    write, flush, name_of = answers.write, answers.flush, type
    os.dup2(2, 1)
    scope = {"__name__": "program"}
    try:
        run(compile(job.pop("source"), "program.py", "exec"), scope)
    except MemoryError:
        raise
    except error_type as error:
        leave("the program: " + name_of(error).__name__ + ": " + text_of(error)[:200])
    for kind, text in checks:
        try:
            if kind == "value":
                value = show(value_of(text, scope))
                line = {"value": value} if size(value) <= max_chars else {"error": "MemoryError: a long value"}
            else:
                run(text, scope)
                line = {"passed": True}
        except error_type as error:
            line = {"error": name_of(error).__name__ + ": " + text_of(error)[:200]}
        write(secret + to_line(line) + "\\n")
        flush()

main()
"""


def code(
    rollout: Rollout, row: Row, partial: bool = False, *, wall_s: float = 5.0, memory_mib: int = 512
) -> RewardResult:
    """1 if the program of the reply passes every one of the row's `tests`, else 0.

    The program is the last fenced block that is tagged as Python, else the last without a tag.
    Tests are a list in the row's fields. Each is `{stdin, stdout}` (the program is run once; spaces at line ends do not
    count), `{call, expected}` (an expression and a JSON value), or a text with
    assertions, whose other statements are run too. partial: return the share
    of the tests that pass instead. wall_s, memory_mib: limits of one run, in seconds and MiB; reaching one is a wrong
    answer with the reason "limit", and no further run is begun, so that a program that never ends does not take up the
    time that the grader itself has. Raises SandboxError if the program cannot be isolated, and ValueError for a row
    without proper tests.
    """
    tests = _as_list(row.fields.get("tests"))
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"row {row.id} needs `tests`, a list")
    tests = [_without_null(test) for test in tests]
    source = _program_in(without_reasoning(rollout.text))
    if source is None:
        return RewardResult(0.0, reason="no code block")
    limits = Limits(wall_s=wall_s, cpu_s=max(1, round(wall_s)), memory_mib=memory_mib)
    programs = [test for test in tests if isinstance(test, Mapping) and "stdout" in test]
    others = [test for test in tests if not (isinstance(test, Mapping) and "stdout" in test)]
    checks = [_check(test, row.id) for test in others]
    outcomes: list[str] = []
    for test in programs:
        outcomes.append(_LIMIT if _LIMIT in outcomes else _run_program(source, test, limits))
    if checks:
        outcomes += [_LIMIT] * len(checks) if _LIMIT in outcomes else _run_checks(source, checks, limits)
    share = outcomes.count("") / len(outcomes)
    reason = next((outcome for outcome in outcomes if outcome), "")
    return RewardResult(share if partial else float(share == 1.0), {"passed": share}, reason)


def _run_program(source: str, test: Mapping[str, object], limits: Limits) -> str:
    """The reason why the program does not write the expected output; "" if it does."""
    result = run_python(source, str(test.get("stdin", "")).encode(), limits)
    if result.limit or result.exit_code:
        return _failure(result)
    wanted = test["stdout"]
    wanted = "\n".join(map(str, wanted)) if isinstance(wanted, list | tuple) else str(wanted)
    return "" if _lines(result.stdout.decode(errors="replace")) == _lines(wanted) else "wrong"


def _lines(output: str) -> list[str]:
    """The lines without the spaces at their ends, and without empty lines at the end of all."""
    return [line.rstrip() for line in output.replace("\r\n", "\n").rstrip().split("\n")]


def _run_checks(source: str, groups: list[list[_Step]], limits: Limits) -> list[str]:
    """For each test the reason why one of its steps fails, "" if none does. All tests share one run of the sandbox."""
    outcomes = _run_steps(source, [step for group in groups for step in group], limits)
    found = []
    for group in groups:
        own, outcomes = outcomes[: len(group)], outcomes[len(group) :]
        found.append(next((outcome for outcome in own if outcome), ""))
    return found


def _run_steps(source: str, checks: list[_Step], limits: Limits) -> list[str]:
    asked = [(kind, text) for kind, text, _ in checks]
    secret = secrets.token_hex(16)
    job = {"source": source, "checks": asked, "max_chars": _MAX_VALUE_CHARS, "secret": secret}
    result = run_python(_HARNESS, json.dumps(job).encode(), limits)
    output = result.stdout.decode(errors="replace").split("\n")
    lines = [line.removeprefix(secret) for line in output if line.startswith(secret)][: len(checks)]
    outcomes = [_verdict(line, kind, expected) for line, (kind, _, expected) in zip(lines, checks, strict=False)]
    return outcomes + [_failure(result) or "wrong"] * (len(checks) - len(outcomes))


def _verdict(line: str, kind: str, expected: object) -> str:
    try:
        answer = json.loads(line)
        if "error" in answer:
            return _named(str(answer["error"]))
        if kind != "value":
            return "" if answer.get("passed") is True else "wrong"
        value = _literal(answer["value"])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return "wrong"  # the value is not a number, text, list or other literal
    return "" if _same(value, expected) else "wrong"


def _literal(text: str) -> Any:
    """A value from its repr: a literal, or a float that has no literal."""
    if text in ("inf", "-inf", "nan"):
        return float(text)
    return ast.literal_eval(text)


def _same(value: object, expected: object) -> bool:
    """Equality in which a tuple equals a list (JSON has no tuples), True is not 1, and floats are rounded."""
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, Mapping) and isinstance(expected, Mapping):
        if len(value) != len(expected):
            return False
        if all(isinstance(key, str) for key in expected) and not all(isinstance(key, str) for key in value):
            value = {key if isinstance(key, str) else str(key): item for key, item in value.items()}
        return all(key in value and _same(value[key], expected[key]) for key in expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float) and float in (type(value), type(expected)):
        return value == expected or abs(value - expected) <= 1e-9 * max(1.0, abs(expected)) < math.inf
    return value == expected


def _check(test: object, row_id: str) -> list[_Step]:
    """The steps of a test: (value, expression, expected), (assert, statement, None) or (setup, statement, None)."""
    if isinstance(test, Mapping) and {"call", "expected"} <= set(test):
        return [("value", str(test["call"]), test["expected"])]
    if not isinstance(test, str) or "assert" not in test:
        raise ValueError(f"row {row_id}: a test is {{stdin, stdout}}, {{call, expected}} or 'assert ...', not {test!r}")
    try:
        statements = ast.parse(test.strip()).body
    except SyntaxError as error:
        raise ValueError(f"row {row_id}: test {test!r} is not Python: {error.msg}") from error
    if not any(isinstance(node, ast.Assert) for statement in statements for node in ast.walk(statement)):
        raise ValueError(f"row {row_id}: test {test!r} asserts nothing")
    return [_step(statement) for statement in statements]


def _step(statement: ast.stmt) -> _Step:
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
            try:
                return "value", ast.unparse(left), _expected(right)
            except ValueError:
                pass
    return ("assert" if isinstance(statement, ast.Assert) else "setup"), ast.unparse(statement), None


def _expected(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node) in ("float('inf')", "float('-inf')"):
        return float(ast.literal_eval(node.args[0]))
    return ast.literal_eval(node)


def _as_list(tests: object) -> Any:
    """The tests as a list. A table without lists stores them as JSON text, which is read here."""
    if isinstance(tests, str):
        try:
            return json.loads(tests)
        except ValueError:
            return tests
    return tests


def _without_null(test: object) -> Any:
    """A test without the keys that a table has padded with null. `expected` may be null where it has a call."""
    if not isinstance(test, Mapping):
        return test
    kept = {key: value for key, value in test.items() if value is not None}
    if "call" in kept and "stdout" not in kept and "expected" in test:
        kept["expected"] = test["expected"]
    return kept


def _program_in(text: str) -> str | None:
    """The last block that is tagged as Python; without one, the last block without a tag."""
    blocks = fenced_blocks(text)
    tagged = [block.text for block in blocks if _PYTHON.fullmatch(block.tag)]
    untagged = [block.text for block in blocks if not block.tag]
    return (tagged or untagged or [None])[-1]


def _failure(result: SandboxResult) -> str:
    """Why a run failed; "" if it succeeded."""
    if result.limit:
        return _LIMIT
    last = result.stderr.rpartition("\n")[2]
    return (_named(last) or f"exit code {result.exit_code}") if result.exit_code else ""


def _named(error: str) -> str:
    """The reason for an exception's text: "limit" if it reports a limit, else the text."""
    return _LIMIT if limit_of_error(error.removeprefix(_PROGRAM)) else error[:200]
