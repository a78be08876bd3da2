"""Scores texts with a reward in its reward processes, as a run does: killable, each text with a deadline.

Left out: a judge. A reward that needs the field `judge` of a row can only be tried inside an RL stage.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.config.rewards import RewardConfig
from posttrain.data.files import read_records
from posttrain.data.rows import load_rows
from posttrain.errors import DataError
from posttrain.metrics.correctness import is_right
from posttrain.metrics.unscored import failures, kind_of
from posttrain.records import FinishReason, Prompt, Rollout, Row, Scored
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward
from posttrain.scoring.plugins.requirements import check_fields
from posttrain.scoring.pool.pool import RewardPool
from posttrain.scoring.pool.stats import PoolStats

TELL_S = 10.0
Tell = Callable[[int, int, PoolStats], None]
Asked = tuple[str, Row, Rollout]  # where the reply comes from, its row, the reply


@dataclass(frozen=True, slots=True)
class Tried:
    """A text that was scored as a reply to a row. what: where the text comes from, in a few words."""

    what: str
    row: Row
    text: str
    scored: Scored

    @property
    def value(self) -> float | None:
        """The reward, or None without one."""
        return None if self.scored.result is None else self.scored.result.value

    def is_right(self, threshold: float) -> bool:
        """True if it has a score of at least `threshold`."""
        return self.value is not None and is_right(self.value, threshold)

    @property
    def why(self) -> str:
        """The reason that the reward gave, or the reason why there is no score."""
        if self.scored.result is not None:
            return self.scored.result.reason
        return f"{self.scored.outcome}: {self.scored.reason}"


def reply_to(row: Row, text: str, *, is_whole: bool = True, index: int = 0) -> Rollout:
    """A rollout as an engine would give it, with this text and without tokens, for a reward function to score.

    is_whole: True if the reply ended by itself, False if it was cut off at the limit of tokens.
    """
    reason = FinishReason.STOP if is_whole else FinishReason.LENGTH
    return Rollout(row.id, f"g-{row.id}", index, Prompt(row.messages, ()), (), text, reason)


def rows_of(path: str, reward: RewardConfig, limit: int | None = None) -> list[Row]:
    """The prompts of a file, folder or dataset. Raises PluginError for the reward, DataError for rows that it cannot
    score."""
    check_reward(reward.name, reward.args, python=reward.python or "")
    rows = load_rows(DataConfig(path=path), kind="prompt", limit=limit)
    check_fields(RewardSpec(reward.name, reward.args), rows)
    return rows


def replies_of(path: str, rows: Sequence[Row]) -> list[Asked]:
    """Replies of a file, each with its row: `{"id": ..., "reply": ...}`, as in an `eval` stage's samples.jsonl, or the
    rollouts of an RL stage, whose id is `prompt_id`. Raises DataError for a reply without a row.
    """
    by_id = {row.id: row for row in rows}
    found = []
    for number, record in enumerate(read_records([path])):
        if record.problem:
            raise DataError(f"{record.where}: {record.problem}")
        value: Mapping[str, Any] = record.value
        name = value.get("id", value.get("prompt_id"))
        if not isinstance(text := value.get("reply"), str):
            raise DataError(f"{record.where}: reply is {text!r}; give the text of a reply, and the id of its row")
        if (row := by_id.get(str(name))) is None:
            raise DataError(f"{record.where}: id is {name!r}; no row has this id (the first has {rows[0].id!r})")
        is_whole = value.get("finish_reason") != FinishReason.LENGTH and value.get("truncated") is not True
        found.append((record.where, row, reply_to(row, text, is_whole=is_whole, index=number)))
    return found


def score(asked: Sequence[Asked], reward: RewardConfig, tell: Tell | None = None) -> list[Tried]:
    """Score every reply, in order. tell: hears every few seconds how many are scored, of how many, and the pool's
    figures. Raises PluginError for a reward that cannot be loaded.
    """

    async def run() -> list[Scored]:
        await pool.start()
        try:
            waiting = pool.begin((rollout, row) for _, row, rollout in asked)
            pending: set[asyncio.Future[Scored]] = set(waiting)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=TELL_S)
                if tell is not None and pending:
                    tell(len(waiting) - len(pending), len(waiting), pool.stats)
            return [future.result() for future in waiting]
        finally:
            await pool.close()

    spec = RewardSpec(reward.name, reward.args, reward.python or "")
    pool = RewardPool(spec, reward.workers, reward.timeout_s)
    scores = asyncio.run(run())
    return [Tried(what, row, rollout.text, scored) for (what, row, rollout), scored in zip(asked, scores, strict=True)]


def unscored_kinds(tried: Sequence[Tried]) -> dict[str, int]:
    """Why replies have no score, each with how often."""
    kinds: dict[str, int] = {}
    for failure in failures(item.scored for item in tried):
        kinds[kind_of(failure)] = kinds.get(kind_of(failure), 0) + 1
    return kinds
