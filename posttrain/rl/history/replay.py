"""`posttrain rl --replay`: train again on the recorded batches of a run, without an engine.

On a CPU the weights come out bit for bit equal.

    rollouts/*.parquet ──► the batch of each step ──► trainer ──► model ──► compared with the run's own
    ledger.sqlite ─────────► says which groups each step was made of

In an asynchronous run the timing decides which groups are in which batch. The ledger and the archive recorded the
batches. If a run was killed and continued, the replay has the steps that count: those that were rolled back are in
neither record. After a kill without more, the last step may be in the archive alone, and is left out.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.data.images.section import STORE
from posttrain.errors import ConfigError, StageError
from posttrain.files import read_jsonl
from posttrain.rl.history.archive import check_archive, recorded_rollout
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.history.recovery import SNAPSHOT, rl_stages
from posttrain.rl.records import GroupState
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.samples import TrainSample, is_trained_on, rollout_samples


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """The samples that optimizer step `step` trained on, in order, and the ids of their groups."""

    step: int
    group_ids: tuple[str, ...]
    samples: tuple[TrainSample, ...]


def recorded_steps(stage: Path) -> Iterator[RecordedStep]:
    """The steps of a finished or interrupted run, from the first.

    Raises ConfigError if there are no rollouts, and StageError if a file holds rollouts of another step.
    """
    import pyarrow.parquet as pq

    names = ["step", "group_id", "index", "prompt_id", "prompt", "reply", "finish_reason", "advantage", "versions",
             "segments", "prompt_ids", "token_ids", "sampler_logprobs", "ref_logprobs", "status",
             "turn_advantages"]  # fmt: skip
    paths = sorted((stage / "rollouts").glob("step_*.parquet"))
    if not paths:
        raise ConfigError(str(stage), ["has no rollouts to replay; give the folder of an RL stage"])
    for step, path in enumerate(paths):
        check_archive(path)
        there = pq.read_schema(path).names  # files of before there were advantages of turns have no such column
        table = pq.read_table(path, columns=[name for name in names if name in there])
        rows = [row for row in table.to_pylist() if row["status"] == "trained"]
        if not rows:
            return  # the last file: groups that were dropped after the last step
        if {row["step"] for row in rows} != {step}:
            raise StageError(f"{path}: expected the rollouts of step {step}, found {sorted({r['step'] for r in rows})}")
        groups = tuple(dict.fromkeys(row["group_id"] for row in rows))
        samples = [
            sample
            for row, rollout in ((row, recorded_rollout(row)) for row in rows)
            if is_trained_on(rollout, row["advantage"])
            for sample in rollout_samples(
                rollout,
                step,
                row["advantage"],
                turn_advantages=tuple(row.get("turn_advantages") or ()),
                ref_logprobs=tuple(row["ref_logprobs"]),
            )
        ]
        yield RecordedStep(step, groups, tuple(samples))


def replay(config: TrainingConfig, context: StageContext, source: Path) -> dict[str, Any]:
    """Do the optimizer steps of the RL stage in `source` again, and compare batches and weights.

    config, and the seed in `context`: those of the stage in `source`. The new model is written into the context's
    folder. Returns {"model", "steps", "batches_equal", "weights_equal"}: with "largest_gap" if weights were compared;
    else weights_equal is None, and "why_not" says why.
    """
    wanted = ledger_batches(source)
    trainer = TrainerClient(config, context.seed, store=None if config.images is None else source / STORE)
    try:
        differ, steps = [], 0
        # Another number of threads may add up the same sums in another order.
        threads = {line["step"]: line.get("train_threads") for line in read_jsonl(source / "metrics.jsonl")}
        now = None
        for recorded in recorded_steps(source):
            if recorded.step not in wanted:  # a kill came before the ledger had it (audit.py), so it does not count
                break
            if list(recorded.group_ids) != wanted.get(recorded.step):
                differ.append(recorded.step)
            if (number := threads.get(recorded.step)) not in (None, now):
                trainer.set_threads(number)
                now = number
            result = trainer.step(recorded.samples, recorded.step)
            context.metrics(recorded.step, result.metrics)
            context.busy("trainer", "train", start=result.began, end=result.ended)
            steps = recorded.step + 1
            context.progress(steps, config.steps, "steps", values={"loss": result.metrics["loss"]})
        if steps != len(wanted):
            differ += sorted(set(wanted) - set(range(steps)))
        trainer.save_result(context.dir, config.lora)
    finally:
        trainer.close()
    found: dict[str, Any] = {"steps": steps, "batches_equal": not differ, "weights_equal": None}
    if steps < config.steps:
        found["why_not"] = f"the run has trained {steps} of its {config.steps} steps, and writes its model at the end"
    elif not (source / "model").is_dir():
        found["why_not"] = f"there is no {source / 'model'}"
    else:
        gaps = weight_gaps(source / "model", context.dir / "model")
        found["weights_equal"] = not gaps
        found["largest_gap"] = max(gaps.values(), default=0.0)
    context.event("replayed", **found, **({"differing_steps": differ[:20]} if differ else {}))
    return {"model": str(context.dir / "model"), **found}


def ledger_batches(stage: Path) -> dict[int, list[str]]:
    """The group ids of each step according to the ledger, in dispatch order."""
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
    """The tensors that are not bit-equal in two model folders, each with its largest absolute difference.

    The difference is inf if one folder lacks the tensor or has it in another shape.
    """
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
