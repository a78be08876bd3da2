"""The output of `posttrain compare`."""

import json
from dataclasses import asdict
from pathlib import Path

import typer

from posttrain.eval.compare import Comparison, Entry, compare, find_evaluation, read_evaluation
from posttrain.metrics.paired import Difference

COLUMNS = ("", "rows", "A", "B", "B - A, points", "only A", "only B", "p", "mean reward, B - A")


def print_comparison(run_a: Path, run_b: Path, stages: list[str], *, shared: bool, as_json: bool) -> None:
    """Compare two evaluations and print the result.

    stages: names of the evaluated stages: none, one for both runs, or one for each. shared: compare only the rows that
    both evaluations have.
    """
    first, last = (stages[0], stages[-1]) if stages else (None, None)
    a, b = (read_evaluation(find_evaluation(run, name)) for run, name in ((run_a, first), (run_b, last)))
    found = compare(a, b, shared=shared)
    if as_json:
        typer.echo(json.dumps({"a": str(a.folder), "b": str(b.folder), **asdict(found)}, indent=2))
        return
    typer.echo(f"A: {a.folder}\nB: {b.folder}\n")
    typer.echo("\n".join(_table(found)))
    if found.unscored:
        typer.echo(f"\n{found.unscored} rows are left out because one of the two evaluations has no reward for them.")
    if found.left_out:
        typer.echo(f"\n{found.left_out} rows are left out because only one of the two evaluations has them.")


def _table(found: Comparison) -> list[str]:
    rows = [list(COLUMNS), *([name, *_cells(entry)] for name, entry in found.entries.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(entry: Entry) -> list[str]:
    shares = (f"{100 * right / entry.rows:.1f}%" for right in (entry.right_a, entry.right_b))
    accuracy = _difference(entry.accuracy, 100, digits=1)
    reward = _difference(entry.reward, 1, digits=3)
    return [str(entry.rows), *shares, accuracy, str(entry.only_a), str(entry.only_b), f"{entry.p:.2g}", reward]


def _difference(found: Difference, times: float, *, digits: int) -> str:
    mean, low, high = (f"{times * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"
