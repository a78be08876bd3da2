"""Compares two evaluations row by row, from the samples.jsonl that each wrote.

Only rows with the same id, prompt and answer in both are compared. A row that could not be scored in one of the two is
left out of both. One reply of each row is compared: the greedy reply, or the first sample if there is none. Left out:
the other sampled replies.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.base import read_yaml
from posttrain.errors import ConfigError, DataError
from posttrain.files import read_jsonl
from posttrain.metrics.correctness import is_right
from posttrain.metrics.paired import Difference, mcnemar_p, mean_difference

SAMPLES = "samples.jsonl"

# The lines of a row in A and in B.
_Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation. rows: the lines of its samples.jsonl, by a key of id, prompt and answer.

    reward: the name, arguments and threshold of its reward; {} if it has no config.yaml.
    """

    folder: Path
    rows: Mapping[str, Mapping[str, Any]]
    reward: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """Two evaluations in one capability or modality, or over all.

    rows: number of rows that were scored in both. right_a, right_b: number of these that A and B get right. only_a,
    only_b: number that only A, or only B, gets right. p: of McNemar's exact test. accuracy, reward: B minus A, of the
    share of right rows and of the mean reward.
    """

    rows: int
    right_a: int
    right_b: int
    only_a: int
    only_b: int
    p: float
    accuracy: Difference
    reward: Difference


@dataclass(frozen=True, slots=True)
class Comparison:
    """entries: by capability in order of name, by modality if the rows have several, then "all".

    unscored: shared rows without a reward in one of the two.

    left_out: rows that only one evaluation has.
    """

    entries: Mapping[str, Entry]
    unscored: int
    left_out: int


def find_evaluation(run: Path, stage: str | None) -> Path:
    """The folder of an evaluation. run: a run directory, the folder of a stage, or the folder of the evaluation itself.

    stage: the stage whose model was evaluated, or an evaluation stage; None if the run has only one evaluation. Raises
    `ConfigError` if there is none, or if there are several and `stage` is None.
    """
    if (run / SAMPLES).is_file():
        return run
    found = {path.parent.name: path.parent for path in sorted(run.glob(f"*/{SAMPLES}")) if path.parent.name != "eval"}
    found |= {path.parent.parent.name: path.parent for path in sorted(run.glob(f"*/eval/{SAMPLES}"))}
    if (run / "eval" / SAMPLES).is_file():
        found = {run.name: run / "eval"} if stage is None else found | {"eval": run / "eval"}
    if not found:
        raise ConfigError(str(run), [f"holds no evaluation: no {SAMPLES} in it, nor in the folder of a stage"])
    if stage is None and len(found) > 1:
        names = ", ".join(found)
        raise ConfigError(str(run), [f"holds the evaluations of {names}; choose one with --stage, or name its folder"])
    if stage is not None and stage not in found:
        raise ConfigError("--stage", [f"got {stage!r}: {run} holds the evaluations of {', '.join(found)}"])
    return found[stage] if stage is not None else next(iter(found.values()))


def read_evaluation(folder: Path) -> Evaluation:
    """Read the samples.jsonl and the config.yaml in the folder of an evaluation."""
    rows = {_key(line): line for line in read_jsonl(folder / SAMPLES)}
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    reward = config.get("reward") or {}
    decides = ("name", "args", "correct_threshold") if reward else ()
    return Evaluation(folder, rows, {name: reward.get(name) for name in decides})


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps([line.get("id"), line.get("prompt"), line.get("answer")], sort_keys=True)


def compare(a: Evaluation, b: Evaluation, *, shared: bool = False, seed: int = 0) -> Comparison:
    """Compare evaluation B with evaluation A.

    shared: compare only the rows that both have. Without it, different rows are an error. seed: of the bootstrap.
    Raises `DataError` if the rows differ (or none is the same), and `ConfigError` if the two used different rewards.
    """
    for name in a.reward if a.reward and b.reward else ():
        value, other = a.reward[name], b.reward[name]
        if value != other:
            rule = f"got {value} in {a.folder} and {other} in {b.folder}, so that right has two meanings"
            raise ConfigError(f"reward.{name}", [f"{rule}; evaluate both with one reward"])
    both = [key for key in a.rows if key in b.rows]
    only = len(a.rows) - len(both), len(b.rows) - len(both)
    if not both or (any(only) and not shared):
        found = f"{a.folder} has {len(a.rows)} rows and {b.folder} has {len(b.rows)}, of which {len(both)} are the same"
        way = "; add --shared to compare these" if both else ": there is nothing to compare"
        raise DataError(f"{found} (id, prompt and answer){way}")
    pairs = [(a.rows[key], b.rows[key]) for key in both]
    scored = [pair for pair in pairs if all(line.get("reward") is not None for line in pair)]
    if not scored:
        raise DataError(f"none of the {len(both)} shared rows was scored in both evaluations")
    threshold = a.reward.get("correct_threshold")
    threshold = 0.5 if threshold is None else float(threshold)
    modalities = _parts(scored, "modality") if len({a.get("modality") for a, _ in scored}) > 1 else {}
    parts = _parts(scored, "capability") | {f"modality: {name}": part for name, part in modalities.items()}
    entries = {name: _entry(part, threshold, seed) for name, part in [*parts.items(), ("all", scored)]}
    return Comparison(entries, len(both) - len(scored), sum(only))


def _parts(pairs: Sequence[_Pair], key: str) -> dict[str, list[_Pair]]:
    """The pairs by what A's line says under a key, in order."""
    names = sorted({str(line.get(key)) for line, _ in pairs})
    return {name: [pair for pair in pairs if str(pair[0].get(key)) == name] for name in names}


def _entry(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], threshold: float, seed: int) -> Entry:
    rewards_a, rewards_b = ([float(pair[side]["reward"]) for pair in pairs] for side in (0, 1))
    right_a, right_b = ([float(is_right(reward, threshold)) for reward in side] for side in (rewards_a, rewards_b))
    only_a = sum(x > y for x, y in zip(right_a, right_b, strict=True))
    only_b = sum(y > x for x, y in zip(right_a, right_b, strict=True))
    return Entry(
        rows=len(pairs),
        right_a=int(sum(right_a)),
        right_b=int(sum(right_b)),
        only_a=only_a,
        only_b=only_b,
        p=mcnemar_p(only_a, only_b),
        accuracy=mean_difference(right_a, right_b, seed),
        reward=mean_difference(rewards_a, rewards_b, seed),
    )
