"""Every rollout that was decided, trained on or dropped, as parquet: one file an optimizer step.

The rows of a step's trained groups, in their order, are what the step was made of: with them it can be done again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.records import Rollout
from posttrain.rl.groups import Group, ScoredGroup


class RolloutArchive:
    """Collects decided groups and writes them when a step is done."""

    def __init__(self, folder: Path, tokenizer: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._decided: list[tuple[ScoredGroup, int | None, int, str]] = []
        self._pieces = _Pieces(tokenizer)

    def add(self, scored: ScoredGroup, step: int | None, trainer_version: int, status: str) -> None:
        """status: "trained" or "dropped:<reason>"; step: the optimizer step it was trained in, or None."""
        self._decided.append((scored, step, trainer_version, status))

    def write(self, step: int) -> None:
        """Write what was collected since the last call as the file of this step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._decided:
            return
        path = self._folder / f"step_{step:06d}.parquet"
        aside = path.with_suffix(".writing")
        pq.write_table(pa.table(self._columns(), schema=_schema(pa)), aside)
        aside.rename(path)
        self._decided = []

    def _columns(self) -> dict[str, list[Any]]:
        """One value a rollout in each: tables are made of columns, and a row would only be taken apart again."""
        groups = [(scored, scored.group, _prompt_json(scored.group), *rest) for scored, *rest in self._decided]
        rollouts = [rollout for _, group, *_ in groups for rollout in group.rollouts]
        of_group = [item for item in groups for _ in item[1].rollouts]
        oldest = [min(span.policy_version for span in rollout.versions) for rollout in rollouts]
        no_reference = ((),) * max(len(group.rollouts) for _, group, *_ in groups)

        def of_each(name: str) -> list[Any]:
            return [value for scored, *_ in self._decided for value in getattr(scored, name)]

        return {
            "step": [step for _, _, _, step, _, _ in of_group],
            "group_id": [rollout.group_id for rollout in rollouts],
            "prompt_id": [rollout.prompt_id for rollout in rollouts],
            "capability": [group.prompt.row.capability for _, group, *_ in of_group],
            "index": [rollout.index for rollout in rollouts],
            "prompt": [prompt for _, _, prompt, *_ in of_group],
            "reply": [rollout.text for rollout in rollouts],
            "reward": of_each("rewards"),
            "reason": of_each("reasons"),
            "advantage": of_each("advantages"),
            "finish_reason": [rollout.finish_reason for rollout in rollouts],
            "policy_version": oldest,
            "versions": [_versions_json(rollout) for rollout in rollouts],
            "num_tokens": [len(rollout.token_ids) for rollout in rollouts],
            "staleness": [
                version - first if step is not None else None
                for (_, _, _, step, version, _), first in zip(of_group, oldest, strict=True)
            ],
            "status": [status for *_, status in of_group],
            "tokens": [f"[{', '.join(map(self._pieces.__getitem__, rollout.token_ids))}]" for rollout in rollouts],
            "system": [rollout.system for rollout in rollouts],
            "prompt_ids": [rollout.prompt_ids for rollout in rollouts],
            "token_ids": [rollout.token_ids for rollout in rollouts],
            "sampler_logprobs": [rollout.sampler_logprobs for rollout in rollouts],
            "ref_logprobs": [
                values
                for scored, group, *_ in groups
                for values in scored.ref_logprobs or no_reference[: len(group.rollouts)]
            ],
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
    return json.dumps([{"role": item.role, "content": item.content} for item in group.prompt.messages])


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


def num_tokens(groups: Sequence[ScoredGroup]) -> int:
    """Reply tokens of the groups."""
    return sum(len(rollout.token_ids) for scored in groups for rollout in scored.group.rollouts)
