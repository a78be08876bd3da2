"""Keep the evidence of an update whose loss or gradient was not finite, and decide whether training stops.

    evidence/step_N.json       what was not finite, and in which rollouts
    evidence/step_N.parquet    the batch, as the trainer got it; `read_batch` reads it
    evidence/step_N_model/     the policy before the update, if training stops

A skipped update changes no weight. So the policy that is saved after it is the one with which it was computed, and
`PolicyTrainer.step` on the batch computes it again. Left out: the loads by which `model.router` balances experts, which
are in checkpoints only.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from posttrain.decoding import named_field
from posttrain.errors import StageError
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.protocol import SkippedUpdate
from posttrain.rl.training.samples import TrainSample


async def keep_evidence(
    config: TrainingConfig,
    folder: Path,
    trainer: TrainerClient,
    *,
    samples: Sequence[TrainSample],
    nonfinite: SkippedUpdate | None,
) -> None:
    """Write the evidence of a step into the stage's `folder`, if its update was skipped.

    samples: the step's batch. nonfinite: that of the `StepResult` of the step.

    Raises StageError if `on_nonfinite` and `max_skipped` say that training stops; the policy is saved before.
    """
    if nonfinite is None:
        return
    path = write_evidence(folder, samples, nonfinite)
    reason = stop_reason(config, nonfinite)
    if reason is not None:
        await trainer.async_save(path.with_name(f"{path.stem}_model"))
        raise StageError(f"{reason}; {path} and the files beside it hold the batch and the policy")


def stop_reason(config: TrainingConfig, nonfinite: SkippedUpdate) -> str | None:
    """The reason to stop training after a skipped update, or None to continue."""
    skipped = nonfinite.skipped_in_a_row
    what = (
        f"step {nonfinite.step}: the loss is {nonfinite.loss} and the gradient's norm {nonfinite.grad_norm}, "
        "so its update was skipped"
    )
    if config.on_nonfinite == "stop":
        return f"{what}, and on_nonfinite is stop"
    if skipped >= config.max_skipped:
        return f"{what}, the {skipped}th in a row (max_skipped)" if skipped > 1 else f"{what} (max_skipped is 1)"
    return None


def write_evidence(folder: Path, samples: Sequence[TrainSample], nonfinite: SkippedUpdate) -> Path:
    """Write a step's batch and its `SkippedUpdate` into `folder`/evidence. Returns the path of the JSON file.

    The batch keeps values that are not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "evidence" / f"step_{nonfinite.step}.json"
    path.parent.mkdir(exist_ok=True)
    rows = [msgspec.structs.asdict(sample) for sample in samples]
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema(pa)), path.with_suffix(".parquet"))
    path.write_text(json.dumps(msgspec.to_builtins(nonfinite), indent=1) + "\n")
    return path


def read_batch(path: Path) -> list[TrainSample]:
    """Read the batch of a step. path: of the step's JSON file or of its parquet file.

    Raises StageError, which names the column, if the file holds something else.
    """
    import pyarrow.parquet as pq

    rows = pq.read_table(path.with_suffix(".parquet")).to_pylist()
    try:
        return msgspec.convert(rows, list[TrainSample])
    except msgspec.ValidationError as error:
        raise StageError(
            f"{path.with_suffix('.parquet')} holds no batch that can be read: {named_field(error, list[TrainSample])}"
        ) from None


def _schema(pa: Any) -> Any:
    integers, reals = pa.list_(pa.int64()), pa.list_(pa.float64())
    types: dict[str, Any] = {
        "token_ids": integers, "trained": pa.list_(integers), "sampler_logprobs": reals, "staleness": integers,
        "advantage": pa.float64(), "ref_logprobs": reals, "turn_advantages": reals, "pictures": pa.list_(pa.string()),
    }  # fmt: skip
    return pa.schema(list(types.items()))
