"""Every rollout that was decided, trained on or dropped, as parquet: one file an optimizer step.

The rows of a step's trained groups, in their order, are what the step was made of: with them it can be done again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.rl.groups import ScoredGroup


class RolloutArchive:
    """Collects decided groups and writes them when a step is done."""

    def __init__(self, folder: Path, tokenizer: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tokenizer = tokenizer
        self._rows: list[dict[str, Any]] = []
        self._pieces: dict[int, str] = {}

    def add(self, scored: ScoredGroup, step: int | None, trainer_version: int, status: str) -> None:
        """status: "trained" or "dropped:<reason>"; step: the optimizer step it was trained in, or None."""
        group = scored.group
        prompt = json.dumps([{"role": item.role, "content": item.content} for item in group.prompt.messages])
        references = scored.ref_logprobs or ((),) * len(group.rollouts)
        for rollout, reward, reason, advantage, reference in zip(
            group.rollouts, scored.rewards, scored.reasons, scored.advantages, references, strict=True
        ):
            oldest = min(span.policy_version for span in rollout.versions)
            self._rows.append(
                {
                    "step": step,
                    "group_id": rollout.group_id,
                    "prompt_id": rollout.prompt_id,
                    "capability": group.prompt.row.capability,
                    "index": rollout.index,
                    "prompt": prompt,
                    "reply": rollout.text,
                    "reward": reward,
                    "reason": reason,
                    "advantage": advantage,
                    "finish_reason": rollout.finish_reason,
                    "policy_version": oldest,
                    "versions": json.dumps([[s.policy_version, s.start, s.end] for s in rollout.versions]),
                    "num_tokens": len(rollout.token_ids),
                    "staleness": trainer_version - oldest if step is not None else None,
                    "status": status,
                    "tokens": json.dumps([self._piece(token) for token in rollout.token_ids]),
                    "system": rollout.system,
                    "prompt_ids": rollout.prompt_ids,
                    "token_ids": rollout.token_ids,
                    "sampler_logprobs": rollout.sampler_logprobs,
                    "ref_logprobs": reference,
                }
            )

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token])
        return self._pieces[token]

    def write(self, step: int) -> None:
        """Write what was collected since the last call as the file of this step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        path = self._folder / f"step_{step:06d}.parquet"
        aside = path.with_suffix(".writing")
        pq.write_table(pa.Table.from_pylist(self._rows, schema=_schema(pa)), aside)
        aside.rename(path)
        self._rows = []

    def forget_after(self, step: int) -> None:
        """Remove files of steps later than a checkpoint that is resumed: they will be written again."""
        for path in self._folder.glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()


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


def num_tokens(groups: Sequence[ScoredGroup]) -> int:
    """Reply tokens of the groups."""
    return sum(len(rollout.token_ids) for scored in groups for rollout in scored.group.rollouts)
