"""The `filter` stage: a judge gives a verdict on each row, and the hardest part of the rows is kept.

    rows ─► prune (pruning.py) ─► a verdict on each (rating.py) ─► select ─► kept.jsonl, dropped.jsonl

Rows, labels, questions and the endpoint are checked before an engine starts. A row without a verdict ends the stage,
because the selection depends on all scores, and a missing score is not a low score. Left out: the policy's own pass
rate, which measures difficulty better if replies can be scored (see the profile of the RL stage).
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from posttrain.context import StageContext
from posttrain.data.rows import load_rows, write_rows
from posttrain.data.special import special_token_problem
from posttrain.errors import DataError, StageError
from posttrain.files import write_json
from posttrain.filtering.config import FilterConfig
from posttrain.filtering.pruning import prune
from posttrain.filtering.rating import rate
from posttrain.filtering.selection import num_kept, select
from posttrain.judging.backend import prepare_judge
from posttrain.judging.prompts import JudgePrompts, Question
from posttrain.judging.verdicts import Answer, Undecided, Verdict
from posttrain.records import Row

NUM_BINS = 20
SHOWN_REASONS = 3


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The result of `filter_rows`. Each row has its verdict in `fields["difficulty"]`.

    verdicts: {row id: verdict}. num_shortened: number of rows of which the judge read only the beginning and the end.
    num_known: number of rows whose verdict came from an earlier run. judging_s: seconds in which the judge rated the
    other rows, without its start.
    """

    kept: list[Row]
    dropped: list[Row]
    verdicts: dict[str, Verdict]
    num_shortened: int
    num_known: int = 0
    judging_s: float = 0.0


def run(config: FilterConfig, context: StageContext) -> dict[str, Any]:
    """Filter the configured rows. Returns {"kept": path, "dropped": path, "stats": {...}}.

    Raises what `filter_rows` raises, and `DataError` for bad rows.
    """
    rows = load_rows(config.data, kind="supervised", stage="filter", context=context)
    started = time.time()
    rows, removed = prune(rows, config, context)
    result = filter_rows(rows, config, context)
    paths = {"kept": context.dir / "kept.jsonl", "dropped": context.dir / "dropped.jsonl"}
    write_rows(paths["kept"], result.kept)
    write_rows(paths["dropped"], result.dropped)
    write_json(context.dir / "histogram.json", histogram(result, config.labels))
    stats = {**statistics(result, time.time() - started), **removed}
    context.metrics(0, stats)
    return {**{name: str(path) for name, path in paths.items()}, "stats": stats}


def filter_rows(rows: Sequence[Row], config: FilterConfig, context: StageContext) -> FilterResult:
    """Rate `rows` (supervised, at least one) with the judge and split them into kept and dropped ones.

    Of `config.data` only `special_tokens_in_text` is read. Verdicts are saved in the run directory, and verdicts saved
    there earlier are used again. A judge on engines needs an initialised Ray session; an endpoint needs none. Raises
    UserError before an engine is started, for labels that cannot be told apart, an endpoint that cannot be used and
    rows that do not fit into the judge's prompt. Raises StageError if a row has no verdict in the end.
    """
    if len({row.id for row in rows}) != len(rows):
        raise DataError("two rows have the same id; every id must be unique")
    if not num_kept(len(rows), config.keep_fraction):
        raise DataError(
            f"keep_fraction {config.keep_fraction} of {len(rows)} rows keeps none of them; raise it or add rows"
        )
    prepared = prepare_judge(config)
    questions = ask(rows, config, prepared.prompts)
    rated = rate(questions, prepared, config.resources.judge, context=context)
    found = decided(rated.answers)
    kept, dropped = split(rows, found, config, seed=context.seed)
    by_id = {row.id: verdict for row, verdict in zip(rows, found, strict=True)}
    return FilterResult(kept, dropped, by_id, prepared.prompts.num_shortened, rated.num_known, rated.judging_s)


def ask(rows: Sequence[Row], config: FilterConfig, prompts: JudgePrompts) -> list[Question]:
    """The question about each row. Raises DataError for special tokens in a row, if `config.data` refuses them."""
    if config.data.special_tokens_in_text == "refuse":
        for row in rows:
            if (token := prompts.special_token_in(row)) is not None:
                raise DataError(special_token_problem(f"row {row.id!r}", token))
    return [prompts.render(row) for row in rows]


def decided(answers: Sequence[Answer]) -> list[Verdict]:
    """The verdicts. If a row has none, raises StageError with the number of such rows and the most frequent reasons."""
    reasons = Counter(answer.reason for answer in answers if isinstance(answer, Undecided))
    if reasons:
        most = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(SHOWN_REASONS))
        raise StageError(
            f"the judge gave no verdict on {reasons.total()} of {len(answers)} rows, and nothing was filtered: {most}"
        )
    return [answer for answer in answers if isinstance(answer, Verdict)]


def split(
    rows: Sequence[Row], found: Sequence[Verdict], config: FilterConfig, *, seed: int
) -> tuple[list[Row], list[Row]]:
    """(kept, dropped) rows, each with its verdict."""
    rated = [_with_difficulty(row, verdict, config.judge_name) for row, verdict in zip(rows, found, strict=True)]
    return select(
        rated, [verdict.score for verdict in found], config.keep_fraction, stratify=config.stratify, seed=seed
    )


def histogram(result: FilterResult, labels: Sequence[str]) -> dict[str, Any]:
    """The numbers of kept and dropped rows by score and capability, as a JSON object.

    Returns {"edges": [NUM_BINS + 1 scores], "labels": [...], "capabilities": {name: {"kept": {"counts": [NUM_BINS],
    "tags": {label: count}}, "dropped": ...}}}; a bin holds its lower edge, the last one both.
    """
    capabilities: dict[str, dict[str, Any]] = {}
    for row in [*result.kept, *result.dropped]:
        empty = {part: {"counts": [0] * NUM_BINS, "tags": dict.fromkeys(labels, 0)} for part in ("kept", "dropped")}
        capabilities.setdefault(row.capability, empty)
    for part, rows in (("kept", result.kept), ("dropped", result.dropped)):
        for row in rows:
            verdict, cell = result.verdicts[row.id], capabilities[row.capability][part]
            cell["counts"][min(int(verdict.score * NUM_BINS), NUM_BINS - 1)] += 1
            cell["tags"][verdict.tag] += 1
    edges = [index / NUM_BINS for index in range(NUM_BINS + 1)]
    return {"edges": edges, "labels": list(labels), "capabilities": dict(sorted(capabilities.items()))}


def statistics(result: FilterResult, wall_s: float) -> dict[str, Any]:
    """Counts and means for metrics.jsonl and the report.

    rows_per_s in the result is over the rows that the judge rated in this run; None if there were none.
    """
    parts = {"kept": result.kept, "dropped": result.dropped}
    num_rows = sum(map(len, parts.values()))
    num_judged = num_rows - result.num_known
    return {
        "num_rows": num_rows,
        **{f"num_{name}": len(rows) for name, rows in parts.items()},
        **{f"score_mean_{name}": _score_mean(result, rows) for name, rows in parts.items()},
        "num_shortened": result.num_shortened,
        "tags": dict(sorted(Counter(verdict.tag for verdict in result.verdicts.values()).items())),
        "num_known": result.num_known,
        "rows_per_s": num_judged / result.judging_s if num_judged else None,
        "judging_s": result.judging_s,
        "wall_s": wall_s,
    }


def _with_difficulty(row: Row, verdict: Verdict, judge: str) -> Row:
    """The row with its verdict in `fields["difficulty"]`. An older `difficulty` is kept in it under "previous"."""
    difficulty = verdict.to_json(judge)
    if "difficulty" in row.fields:
        difficulty["previous"] = row.fields["difficulty"]
    return replace(row, fields={**row.fields, "difficulty": difficulty})


def _score_mean(result: FilterResult, rows: Sequence[Row]) -> float | None:
    return sum(result.verdicts[row.id].score for row in rows) / len(rows) if rows else None
