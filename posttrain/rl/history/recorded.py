"""The rollouts that a run recorded, read back as typed records: for notebooks, and whatever looks at a run afterwards.

Example: the rewards of what step 3 was trained on.

    [item.reward for item in read_rollouts("runs/mine/rl") if item.status == "trained" and item.step == 3]
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from posttrain.errors import DataError
from posttrain.records import Message, Rollout, VersionSpan


class RecordedRollout(msgspec.Struct, frozen=True):
    """One rollout, what it was worth and what became of it.

    status: "trained", or "dropped:" with the reason, as "dropped:zero_advantage". step: the optimizer step that it was
    part of; None where it was dropped. prompt: the messages as they were sent. reward, advantage: None where there is
    none. staleness: versions by which the trainer was ahead of the oldest token. ref_logprobs: one a token of the
    reply; empty where no reference policy was used.
    """

    status: str
    step: int | None
    capability: str
    prompt: tuple[Message, ...]
    rollout: Rollout
    reward: float | None
    reason: str
    advantage: float | None
    staleness: int | None
    ref_logprobs: tuple[float, ...]


def read_rollouts(folder: str | Path) -> Iterator[RecordedRollout]:
    """The rollouts of an RL stage in the order in which they were decided, one file (an optimizer step) at a time.

    folder: of the stage, or its `rollouts`. Raises DataError if there are no rollouts, or a file is not of this format.
    """
    folder = Path(folder).expanduser()
    files = sorted(folder.glob("rollouts/*.parquet")) or sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder}: no rollouts (*.parquet); name the folder of an RL stage, as runs/NAME/rl")
    for file in files:
        yield from _read_file(file)


def _read_file(file: Path) -> Iterator[RecordedRollout]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for record in pq.read_table(file).to_pylist():
            yield _to_record(record)
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a whole parquet file: {error}") from None
    except KeyError as error:
        raise DataError(f"{file}: no column {error}; these are not rollouts of an RL stage of this version") from None


def _to_record(row: Mapping[str, Any]) -> RecordedRollout:
    return RecordedRollout(
        status=row["status"],
        step=row["step"],
        capability=row["capability"],
        prompt=msgspec.convert(json.loads(row["prompt"]), tuple[Message, ...]),
        rollout=_to_rollout(row),
        reward=row["reward"],
        reason=row["reason"],
        advantage=row["advantage"],
        staleness=row["staleness"],
        ref_logprobs=tuple(row["ref_logprobs"] or ()),
    )


def _to_rollout(row: Mapping[str, Any]) -> Rollout:
    return Rollout(
        prompt_id=row["prompt_id"],
        group_id=row["group_id"],
        index=row["index"],
        prompt_ids=tuple(row["prompt_ids"]),
        token_ids=tuple(row["token_ids"]),
        text=row["reply"],
        sampler_logprobs=tuple(row["sampler_logprobs"]),
        versions=tuple(VersionSpan(*span) for span in json.loads(row["versions"])),
        finish_reason=row["finish_reason"],
        system=row["system"],
    )
