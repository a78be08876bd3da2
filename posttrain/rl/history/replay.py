"""Train again from what a run left behind: the same batches, without an engine, and on a CPU the same weights.

    rollouts/*.parquet ──► the batch of each step ──► trainer ──► model ──► compared with the run's own
    ledger.sqlite ─────────► says which groups each step was made of

An asynchronous run's timing decided what its batches were; the ledger and the archive hold what was decided. A run that
was killed and went on is replayed as one line of steps: what was rolled back is in neither.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.errors import ConfigError, StageError
from posttrain.rl.history.archive import check_archive, recorded_rollout
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.history.recovery import SNAPSHOT, rl_stages
from posttrain.rl.records import GroupState
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.samples import TrainSample, is_trained_on, train_sample


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """What optimizer step `step` was made of, in order. group_ids: of its groups."""

    step: int
    group_ids: tuple[str, ...]
    samples: tuple[TrainSample, ...]


def recorded_steps(stage: Path) -> Iterator[RecordedStep]:
    """The steps of a finished or interrupted run, from the first. Raises StageError where one cannot be rebuilt."""
    import pyarrow.parquet as pq

    names = ["step", "group_id", "index", "prompt_id", "reply", "finish_reason", "advantage", "versions", "segments",
             "prompt_ids", "token_ids", "sampler_logprobs", "ref_logprobs", "status"]  # fmt: skip
    paths = sorted((stage / "rollouts").glob("step_*.parquet"))
    if not paths:
        raise ConfigError(str(stage), ["has no rollouts to replay; give the folder of an RL stage"])
    for step, path in enumerate(paths):
        check_archive(path)
        rows = [row for row in pq.read_table(path, columns=names).to_pylist() if row["status"] == "trained"]
        if not rows:
            return  # groups that were decided after the last step
        if {row["step"] for row in rows} != {step}:
            raise StageError(f"{path}: expected the rollouts of step {step}, found {sorted({r['step'] for r in rows})}")
        groups = tuple(dict.fromkeys(row["group_id"] for row in rows))
        samples = [
            train_sample(rollout, step, row["advantage"], ref_logprobs=tuple(row["ref_logprobs"]))
            for row, rollout in ((row, recorded_rollout(row)) for row in rows)
            if is_trained_on(rollout, row["advantage"])
        ]
        yield RecordedStep(step, groups, tuple(samples))


def replay(config: TrainingConfig, context: StageContext, source: Path) -> dict[str, Any]:
    """Do the optimizer steps of the RL stage in `source` again, with its config and seed; compare batches and weights.

    Returns figures: steps, batches_equal, weights_equal (None where the run has no model yet).
    """
    wanted = ledger_batches(source)
    trainer = TrainerClient(config, context.seed)
    try:
        differ, steps = [], 0
        for recorded in recorded_steps(source):
            if list(recorded.group_ids) != wanted.get(recorded.step):
                differ.append(recorded.step)
            result = trainer.step(recorded.samples, recorded.step)
            context.metrics(recorded.step, result.metrics)
            context.busy("trainer", "train", start=result.began, end=result.ended)
            steps = recorded.step + 1
            context.progress(steps, config.steps, "steps", values={"loss": result.metrics["loss"]})
        if steps != len(wanted):
            differ += sorted(set(wanted) - set(range(steps)))
        trainer.save(context.dir / "model")
    finally:
        trainer.close()
    found: dict[str, Any] = {"steps": steps, "batches_equal": not differ, "weights_equal": None}
    if steps == config.steps and (source / "model").is_dir():
        gaps = weight_gaps(source / "model", context.dir / "model")
        found["weights_equal"] = not gaps
        found["largest_gap"] = max(gaps.values(), default=0.0)
    context.event("replayed", **found, **({"differing_steps": differ[:20]} if differ else {}))
    return {"model": str(context.dir / "model"), **found}


def ledger_batches(stage: Path) -> dict[int, list[str]]:
    """Group ids of each step, in dispatch order, as the ledger has them."""
    with closing(Ledger(rl_stages(stage)[0] / SNAPSHOT)) as ledger:
        batches: dict[int, list[str]] = {}
        for entry in ledger.entries((GroupState.TRAINED, GroupState.COMMITTED)):
            assert entry.step is not None
            batches.setdefault(entry.step, []).append(f"g{entry.id}")
        return batches


def seed_of(stage: Path) -> int:
    """The seed that the stage ran with."""
    with closing(Ledger(stage / SNAPSHOT)) as ledger:
        return ledger.fact("seed") or 0


def weight_gaps(one: Path, other: Path) -> dict[str, float]:
    """Largest absolute gap of each tensor that is not bit-equal in two model folders; inf where one lacks it."""
    import torch

    from posttrain.sampling.manifests import FolderWeights
    from posttrain.sampling.weights import open_weights

    first, second = (dict(open_weights(FolderWeights(str(folder)))) for folder in (one, other))
    gaps = {name: float("inf") for name in first.keys() ^ second.keys()}
    for name in sorted(first.keys() & second.keys()):
        if first[name].shape != second[name].shape:
            gaps[name] = float("inf")
        elif not torch.equal(first[name], second[name]):
            gaps[name] = float((first[name].double() - second[name].double()).abs().max())
    return gaps
