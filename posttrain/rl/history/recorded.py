"""Read the rollouts that a run recorded as typed records, for notebooks and other analysis of a run.

Example: the rewards of the rollouts that step 3 trained on.

    [item.reward for item in read_rollouts("runs/mine/rl") if item.status == "trained" and item.step == 3]
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from posttrain.data.messages import to_messages
from posttrain.errors import DataError
from posttrain.records import Rollout
from posttrain.rl.history.archive import check_archive, recorded_rollout


class RecordedRollout(msgspec.Struct, frozen=True):
    """One rollout, its reward, and what became of it.

    rollout: its prompt has the messages as they were sent. status: "trained", or "dropped:" and the reason, such as
    "dropped:zero_advantage". step: the optimizer step that trained on it, or None. reward, advantage: None if the
    rollout has none. staleness: by how many versions the trainer was ahead of the rollout's oldest token; None for a
    dropped rollout. ref_logprobs: one for each trained token; empty without a reference policy. parts: of an episode's
    reward, such as {"turn 1": 0.25, "turns": 2}; empty for other rollouts.
    turn_advantages: one for each turn of the policy, with `advantage_per: turn`; else empty.
    """

    rollout: Rollout
    capability: str
    status: str
    step: int | None
    reward: float | None
    reason: str
    advantage: float | None
    staleness: int | None
    ref_logprobs: tuple[float, ...]
    parts: Mapping[str, float]
    turn_advantages: tuple[float, ...]


def read_rollouts(folder: str | Path) -> Iterator[RecordedRollout]:
    """The rollouts of an RL stage, in the order in which they were trained on or dropped. Files are read one by one.

    folder: the stage's folder, or the `rollouts` folder in it. Raises DataError if there are no rollouts or a file
    cannot be read, and CheckpointError for a file that another version of this package wrote.
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
        check_archive(file)
        rows = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a whole parquet file: {error}") from None
    yield from map(_to_record, rows)


def _to_record(row: Mapping[str, Any]) -> RecordedRollout:
    rollout = recorded_rollout(row)
    prompt = replace(rollout.prompt, messages=to_messages(json.loads(row["prompt"]), "prompt"))
    return RecordedRollout(
        rollout=replace(rollout, prompt=prompt, system=row["system"]),
        capability=row["capability"],
        status=row["status"],
        step=row["step"],
        reward=row["reward"],
        reason=row["reason"],
        advantage=row["advantage"],
        staleness=row["staleness"],
        ref_logprobs=tuple(row["ref_logprobs"] or ()),
        parts=json.loads(row.get("parts") or "{}"),
        turn_advantages=tuple(row.get("turn_advantages") or ()),
    )
