"""The `filter` stage: a judge gives a verdict on each row, and the hardest part of the rows is kept.

    rows ─► prune (pruning.py) ─► a verdict on each (rating.py) ─► select ─► kept.jsonl, dropped.jsonl

Rows, labels, questions and the endpoint are checked before an engine starts. A row without a verdict ends the stage,
because the selection depends on all scores, and a missing score is not a low score. Left out: the policy's own pass
rate, which measures difficulty better if replies can be scored (see the profile of the RL stage).
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from posttrain.context import StageContext
from posttrain.data.arrays import gathered, numbers_of
from posttrain.data.bad_rows import SeenIds
from posttrain.data.images.files import with_files
from posttrain.data.images.section import image_reader
from posttrain.data.images.store import ImageStore
from posttrain.data.places import Places
from posttrain.data.rows import store_rows, write_rows
from posttrain.data.special import special_token_problem
from posttrain.data.stored import Derived, Stored, store
from posttrain.errors import DataError, StageError
from posttrain.files import write_json
from posttrain.filtering.config import FilterConfig
from posttrain.filtering.pruning import prune
from posttrain.filtering.rating import rate
from posttrain.filtering.selection import num_kept, places_kept
from posttrain.judging.backend import prepare_judge
from posttrain.judging.prompts import JudgePrompts, Question
from posttrain.judging.verdicts import Verdict
from posttrain.records import Row

NUM_BINS = 20
PARTS = ("kept", "dropped")
SHOWN_REASONS = 3


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The result of `filter_rows`. Each row has its verdict in `fields["difficulty"]`.

    verdicts: {row id: verdict}. num_shortened: number of rows of which the judge read only the beginning and the end.
    num_known: number of rows whose verdict came from an earlier run. judging_s: seconds in which the judge rated the
    other rows, without its start.
    """

    kept: Sequence[Row]
    dropped: Sequence[Row]
    verdicts: Mapping[str, Verdict]
    num_shortened: int
    num_known: int = 0
    judging_s: float = 0.0


def run(config: FilterConfig, context: StageContext) -> dict[str, Any]:
    """Filter the configured rows. Returns {"kept": path, "dropped": path, "stats": {...}}.

    Raises what `filter_rows` raises, and `DataError` for bad rows.
    """
    reader = image_reader(config.images, context.dir)
    rows: Sequence[Row] = store_rows(config.data, kind="supervised", stage="filter", context=context, images=reader)
    started = time.time()
    rows, removed = prune(rows, config, context)
    store = reader and reader.store
    result = filter_rows(rows, config, context, images=store)
    paths = {"kept": context.dir / "kept.jsonl", "dropped": context.dir / "dropped.jsonl"}
    for path, part in ((paths["kept"], result.kept), (paths["dropped"], result.dropped)):
        write_rows(path, part if store is None else (with_files(row, store, context.dir) for row in part))
    counted = tally(result, config.labels)
    write_json(context.dir / "histogram.json", histogram(counted))
    stats = {**statistics(result, counted, time.time() - started), **removed}
    context.metrics(0, stats)
    return {**{name: str(path) for name, path in paths.items()}, "stats": stats}


def filter_rows(
    rows: Sequence[Row], config: FilterConfig, context: StageContext, *, images: ImageStore | None = None
) -> FilterResult:
    """Rate `rows` (supervised, at least one) with the judge and split them into kept and dropped ones.

    images: the pictures whose keys the rows have; None for rows without pictures. Of `config.data` only
    `special_tokens_in_text` is read. Verdicts are saved in the run directory, and verdicts saved there earlier are used
    again. A judge on engines needs an initialised Ray session; an endpoint needs none. Raises
    UserError before an engine is started, for labels that cannot be told apart, an endpoint that cannot be used and
    rows that do not fit into the judge's prompt. Raises StageError if a row has no verdict in the end.
    """
    seen = SeenIds()
    if any(seen.add(row.id, "") is not None for row in rows):
        raise DataError("two rows have the same id; every id must be unique")
    if not num_kept(len(rows), config.keep_fraction):
        raise DataError(
            f"keep_fraction {config.keep_fraction} of {len(rows)} rows keeps none of them; raise it or add rows"
        )
    prepared = prepare_judge(config, images)
    questions = ask(rows, config, prepared.prompts, folder=context.dir)
    rated = rate(questions, prepared, config.resources.judge, context=context)
    require_all(rated.undecided, len(rows))
    kept, dropped = split(rows, rated.verdicts, config, seed=context.seed)
    by_id = VerdictsById(rows, rated.verdicts)
    return FilterResult(kept, dropped, by_id, prepared.prompts.num_shortened, rated.num_known, rated.judging_s)


def ask(
    rows: Sequence[Row], config: FilterConfig, prompts: JudgePrompts, *, folder: Path | None = None
) -> Stored[Question]:
    """The question about each row. folder: where they are stored.

    Raises DataError for special tokens in a row, if `config.data` refuses them.
    """
    if config.data.special_tokens_in_text == "refuse":
        for row in rows:
            if (token := prompts.special_token_in(row)) is not None:
                raise DataError(special_token_problem(f"row {row.id!r}", token))
    return store(map(prompts.render, rows), Question, folder)


def require_all(undecided: Counter[str], num_rows: int) -> None:
    """Raise StageError, with the most frequent reasons, if rows are without a verdict."""
    if undecided:
        most = "; ".join(f"{reason} ({count})" for reason, count in undecided.most_common(SHOWN_REASONS))
        raise StageError(
            f"the judge gave no verdict on {undecided.total()} of {num_rows} rows, and nothing was filtered: {most}"
        )


def split(
    rows: Sequence[Row], verdicts: Sequence[Verdict], config: FilterConfig, *, seed: int
) -> tuple[Sequence[Row], Sequence[Row]]:
    """(kept, dropped) rows, each with its verdict."""
    scores = gathered((verdict.score for verdict in verdicts), "d")
    parts = places_kept(rows, numbers_of(scores), config.keep_fraction, stratify=config.stratify, seed=seed)

    def rated(place: int) -> Row:
        return _with_difficulty(rows[place], verdicts[place], config.judge_name)

    kept, dropped = (Derived(numbers_of(part), rated) for part in parts)
    return kept, dropped


class VerdictsById(Mapping[str, Verdict]):
    """The verdict on each row, by the row's id. All is on disk, if rows and verdicts are."""

    def __init__(self, rows: Sequence[Row], verdicts: Sequence[Verdict]):
        self._places, self._verdicts = Places(rows, lambda row: row.id), verdicts

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Verdict:
        return self._verdicts[self._places[name]]


@dataclass(frozen=True, slots=True)
class Tally:
    """What is counted in one pass over the rows of a result.

    labels: those that the judge chooses from. cells: for each capability, and for "kept" and "dropped": {"counts": rows
    by score [NUM_BINS], "tags": {label: rows}}. score_means: of the kept and the dropped rows; None if there are none.
    """

    labels: Sequence[str]
    cells: Mapping[str, Mapping[str, Any]]
    score_means: Mapping[str, float | None]


def tally(result: FilterResult, labels: Sequence[str]) -> Tally:
    """Count the rows of a result by score and tag."""
    cells: dict[str, dict[str, Any]] = {}
    means: dict[str, float | None] = {}
    for part, rows in (("kept", result.kept), ("dropped", result.dropped)):
        total = 0.0
        for row in rows:
            verdict = result.verdicts[row.id]
            if row.capability not in cells:
                tags = dict.fromkeys(labels, 0)
                cells[row.capability] = {name: {"counts": [0] * NUM_BINS, "tags": {**tags}} for name in PARTS}
            cell = cells[row.capability][part]
            cell["counts"][min(int(verdict.score * NUM_BINS), NUM_BINS - 1)] += 1
            cell["tags"][verdict.tag] += 1
            total += verdict.score
        means[part] = total / len(rows) if rows else None
    return Tally(labels, dict(sorted(cells.items())), means)


def histogram(counted: Tally) -> dict[str, Any]:
    """The numbers of kept and dropped rows by score and capability, as a JSON object.

    Returns {"edges": [NUM_BINS + 1 scores], "labels": [...], "capabilities": `Tally.cells`}; a bin holds its lower
    edge, the last one both.
    """
    edges = [index / NUM_BINS for index in range(NUM_BINS + 1)]
    return {"edges": edges, "labels": list(counted.labels), "capabilities": counted.cells}


def statistics(result: FilterResult, counted: Tally, wall_s: float) -> dict[str, Any]:
    """Counts and means for metrics.jsonl and the report.

    rows_per_s in the result is over the rows that the judge rated in this run; None if there were none.
    """
    parts = {"kept": result.kept, "dropped": result.dropped}
    num_rows = sum(map(len, parts.values()))
    num_judged = num_rows - result.num_known
    tags = Counter[str]()
    for cells in counted.cells.values():
        for cell in cells.values():
            tags.update(cell["tags"])
    return {
        "num_rows": num_rows,
        **{f"num_{name}": len(rows) for name, rows in parts.items()},
        **{f"score_mean_{name}": mean for name, mean in counted.score_means.items()},
        "num_shortened": result.num_shortened,
        "tags": dict(sorted((+tags).items())),
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
