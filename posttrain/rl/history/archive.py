"""Every rollout that was decided, trained on or dropped, as parquet: one file an optimizer step.

The rows of a step's trained groups, in their order, are what the step was made of: with them it can be done again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from posttrain.data.messages import messages_to_json
from posttrain.files import replacing
from posttrain.records import Rollout
from posttrain.rl.records import Group, ScoredGroup


@dataclass(frozen=True, slots=True)
class _Decided:
    """What `RolloutArchive.add` was told."""

    scored: ScoredGroup
    step: int | None
    trainer_version: int
    status: str


class RolloutArchive:
    """Collects decided groups and writes them when a step is done."""

    def __init__(self, folder: Path, tokenizer: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._decided: list[_Decided] = []
        self._pieces = _Pieces(tokenizer)

    def add(self, scored: ScoredGroup, step: int | None, trainer_version: int, status: str) -> None:
        """status: "trained" or "dropped:<reason>"; step: the optimizer step it was trained in, or None."""
        self._decided.append(_Decided(scored, step, trainer_version, status))

    def write(self, step: int) -> None:
        """Write what was collected since the last call as the file of this step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._decided:
            return
        path = self._folder / f"step_{step:06d}.parquet"
        with replacing(path) as aside:
            pq.write_table(pa.table(self._columns(), schema=_schema(pa)), aside)
        self._decided = []

    def _columns(self) -> dict[str, list[Any]]:
        """One value a rollout in each: a table is made of columns, rows would only be taken apart again."""
        rows = [(item, rollout) for item in self._decided for rollout in item.scored.group.rollouts]
        oldest = [min(span.policy_version for span in rollout.versions) for _, rollout in rows]

        def of_each(values: Callable[[_Decided], Sequence[Any]]) -> list[Any]:
            return [value for item in self._decided for value in values(item)]

        def of_rollouts(name: str) -> list[Any]:
            value = attrgetter(name)
            return [value(rollout) for _, rollout in rows]

        return {
            "step": [item.step for item, _ in rows],
            "group_id": of_rollouts("group_id"),
            "prompt_id": of_rollouts("prompt_id"),
            "capability": [item.scored.group.prompt.row.capability for item, _ in rows],
            "index": of_rollouts("index"),
            "prompt": of_each(lambda item: [_prompt_json(item.scored.group)] * len(item.scored.group.rollouts)),
            "reply": of_rollouts("text"),
            "reward": of_each(lambda item: item.scored.rewards),
            "reason": of_each(lambda item: item.scored.reasons),
            "advantage": of_each(lambda item: item.scored.advantages),
            "finish_reason": of_rollouts("finish_reason"),
            "policy_version": oldest,
            "versions": [_versions_json(rollout) for _, rollout in rows],
            "num_tokens": [len(rollout.token_ids) for _, rollout in rows],
            "staleness": [
                None if item.step is None else item.trainer_version - first
                for (item, _), first in zip(rows, oldest, strict=True)
            ],
            "status": [item.status for item, _ in rows],
            "tokens": [f"[{', '.join(map(self._pieces.__getitem__, rollout.token_ids))}]" for _, rollout in rows],
            "system": of_rollouts("system"),
            "prompt_ids": of_rollouts("prompt_ids"),
            "token_ids": of_rollouts("token_ids"),
            "sampler_logprobs": of_rollouts("sampler_logprobs"),
            "ref_logprobs": of_each(lambda item: item.scored.ref_logprobs or [()] * len(item.scored.group.rollouts)),
        }

    def forget_after(self, step: int) -> None:
        """Remove files of steps later than a checkpoint that is resumed: they will be written again."""
        for path in self._folder.glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()


class _Pieces(dict[int, str]):
    """The text of each token, as JSON; made when it is first looked up."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        piece = self[token] = json.dumps(self._tokenizer.decode([token]))
        return piece


def _prompt_json(group: Group) -> str:
    return json.dumps(messages_to_json(group.prompt.messages))


def _versions_json(rollout: Rollout) -> str:
    return f"[{', '.join(f'[{span.policy_version}, {span.start}, {span.end}]' for span in rollout.versions)}]"


def _schema(pa: Any) -> Any:
    text, integer, real = pa.string(), pa.int64(), pa.float64()
    types: dict[str, Any] = {
        "step": integer, "group_id": text, "prompt_id": text, "capability": text, "index": integer, "prompt": text,
        "reply": text, "reward": real, "reason": text, "advantage": real, "finish_reason": text,
        "policy_version": integer, "versions": text, "num_tokens": integer, "staleness": integer, "status": text,
        "tokens": text, "system": text, "prompt_ids": pa.list_(pa.int32()), "token_ids": pa.list_(pa.int32()),
        "sampler_logprobs": pa.list_(real), "ref_logprobs": pa.list_(real),
    }  # fmt: skip
    return pa.schema(list(types.items()))
