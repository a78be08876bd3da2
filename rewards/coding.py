"""Runs the program in the reply against the row's tests, in a sandbox. Without a sandbox nothing is run and nothing
scored.

A result is compared with the expected value out here: the program never sees that value, so it can neither stop early
nor forge a pass. The exception is an assertion of another form than `assert EXPRESSION == LITERAL`. It runs beside the
program, which could fake it, so prefer the other kinds of test.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.records import RewardResult, Rollout, Row
from posttrain.scoring.sandbox.run import Limits, SandboxResult, limit_of_error, run_python

REQUIRES = {"code": ["tests"]}
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_MAX_VALUE_CHARS = 100_000
_PROGRAM = "the program: "

# This program runs in the sandbox. It executes the reply's program, then evaluates each check and writes a line for it.
_HARNESS = """
import json, os, sys
job = json.loads(sys.stdin.buffer.read())
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
scope = {"__name__": "program"}
try:
    exec(compile(job["source"], "program.py", "exec"), scope)
except MemoryError:
    raise
except BaseException as error:
    sys.exit("the program: " + type(error).__name__ + ": " + str(error)[:200])
for kind, text in job["checks"]:
    try:
        if kind == "value":
            line = {"value": repr(eval(text, scope))[:job["max_chars"]]}
        else:
            exec(text, scope)
            line = {"passed": True}
    except BaseException as error:
        line = {"error": type(error).__name__ + ": " + str(error)[:200]}
    answers.write(json.dumps(line) + "\\n")
    answers.flush()
"""


def code(
    rollout: Rollout, row: Row, partial: bool = False, *, wall_s: float = 5.0, memory_mib: int = 512
) -> RewardResult:
    """1 if the program in the reply's last fenced block passes every one of the row's `tests`, else 0.

    Tests are a list in the row's fields. Each is `{stdin, stdout}` (the program is run once, and whitespace at the ends
    is ignored), `{call, expected}` (an expression and a JSON value), or a text `assert ...`. partial: return the share
    of the tests that pass instead. wall_s, memory_mib: limits of one run, in seconds and MiB; reaching one is a wrong
    answer with the reason "limit". Raises SandboxError if the program cannot be isolated, and ValueError for a row
    without proper tests.
    """
    tests = row.fields.get("tests")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise ValueError(f"row {row.id} needs `tests`, a list")
    blocks = _FENCED.findall(rollout.text)
    if not blocks:
        return RewardResult(0.0, reason="no code block")
    limits = Limits(wall_s=wall_s, cpu_s=max(1, round(wall_s)), memory_mib=memory_mib)
    programs = [test for test in tests if isinstance(test, Mapping) and "stdout" in test]
    checks = [_check(test, row.id) for test in tests if not (isinstance(test, Mapping) and "stdout" in test)]
    outcomes = [_run_program(blocks[-1], test, limits) for test in programs]
    outcomes += _run_checks(blocks[-1], checks, limits) if checks else []
    share = outcomes.count("") / len(outcomes)
    reason = next((outcome for outcome in outcomes if outcome), "")
    return RewardResult(share if partial else float(share == 1.0), {"passed": share}, reason)


def _run_program(source: str, test: Mapping[str, Any], limits: Limits) -> str:
    """ "" if the program writes the expected output, else why not."""
    result = run_python(source, str(test.get("stdin", "")).encode(), limits)
    if result.limit or result.exit_code:
        return _failure(result)
    return "" if result.stdout.decode(errors="replace").strip() == str(test["stdout"]).strip() else "wrong"


def _run_checks(source: str, checks: list[tuple[str, str, Any]], limits: Limits) -> list[str]:
    """For each check "" if it holds, else why not. All checks share one run of the sandbox."""
    asked = [(kind, text) for kind, text, _ in checks]
    job = {"source": source, "checks": asked, "max_chars": _MAX_VALUE_CHARS}
    result = run_python(_HARNESS, json.dumps(job).encode(), limits)
    lines = result.stdout.decode(errors="replace").splitlines()[: len(checks)]
    outcomes = [_verdict(line, kind, expected) for line, (kind, _, expected) in zip(lines, checks, strict=False)]
    return outcomes + [_failure(result) or "wrong"] * (len(checks) - len(outcomes))


def _verdict(line: str, kind: str, expected: Any) -> str:
    try:
        answer = json.loads(line)
        if "error" in answer:
            return _named(str(answer["error"]))
        if kind == "assert":
            return "" if answer.get("passed") is True else "wrong"
        value = ast.literal_eval(answer["value"])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        return "wrong"  # the value is not a number, text, list or other literal
    return "" if _same(value, expected) else "wrong"


def _same(value: Any, expected: Any) -> bool:
    """Equality in which a tuple equals a list, since JSON has no tuples, and True does not equal 1."""
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) and isinstance(expected, float):
        return abs(value - expected) <= 1e-9 * max(1.0, abs(expected))
    return value == expected


def _check(test: Any, row_id: str) -> tuple[str, str, Any]:
    """A test as (value, expression, expected), or as (assert, statement, None) where nothing can be compared here."""
    if isinstance(test, Mapping) and {"call", "expected"} <= set(test):
        return "value", str(test["call"]), test["expected"]
    if not isinstance(test, str) or not test.strip().startswith("assert"):
        raise ValueError(f"row {row_id}: a test is {{stdin, stdout}}, {{call, expected}} or 'assert ...', not {test!r}")
    try:
        statement = ast.parse(test.strip()).body[0]
    except SyntaxError as error:
        raise ValueError(f"row {row_id}: test {test!r} is not Python: {error.msg}") from error
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
            try:
                return "value", ast.unparse(left), ast.literal_eval(right)
            except ValueError:
                pass
    return "assert", test, None


def _failure(result: SandboxResult) -> str:
    """Why a run failed; "" if it did not."""
    if result.limit:
        return "limit"
    last = result.stderr.rpartition("\n")[2]
    return (_named(last) or f"exit code {result.exit_code}") if result.exit_code else ""


def _named(error: str) -> str:
    """An exception's text as a reason; an exception that reports a limit becomes "limit"."""
    return "limit" if limit_of_error(error.removeprefix(_PROGRAM)) else error[:200]
