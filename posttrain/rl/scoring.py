"""From sampled completions to scored groups: rewards, then advantages. A failure to score is never a reward of 0."""

import asyncio
from collections.abc import Sequence

from posttrain.records import Rollout, Scored
from posttrain.rl.advantages import ADVANTAGES, is_zero
from posttrain.rl.config import RlConfig
from posttrain.rl.groups import DrawnPrompt, Group, ScoredGroup
from posttrain.sampling.requests import Completion
from posttrain.scoring.pool import RewardPool


def make_group(
    order: int, prompt: DrawnPrompt, completions: Sequence[Completion], worker: str, began: float, ended: float
) -> Group:
    """The rollouts of one prompt as records."""
    rollouts = tuple(
        Rollout(
            prompt_id=prompt.row.id,
            group_id=f"g{order}",
            index=index,
            prompt_ids=prompt.prompt_ids,
            token_ids=completion.token_ids,
            text=completion.text,
            sampler_logprobs=completion.logprobs,
            versions=completion.versions,
            finish_reason=completion.finish_reason,
            system=prompt.system,
            worker=worker,
            started_s=began,
            finished_s=ended,
        )
        for index, completion in enumerate(completions)
    )
    return Group(order, prompt, rollouts)


async def score_group(group: Group, pool: RewardPool, config: RlConfig) -> ScoredGroup:
    """Score every rollout; advantages are computed over those that have a reward."""
    scores = await asyncio.gather(*(pool.score(rollout, group.prompt.row) for rollout in group.rollouts))
    return scored_group(group, scores, config)


def scored_group(group: Group, scores: Sequence[Scored], config: RlConfig) -> ScoredGroup:
    """The group with its rewards, and advantages if at least `min_group` rollouts have one."""
    rewards = tuple(None if scored.result is None else scored.result.value for scored in scores)
    known = [reward for reward in rewards if reward is not None]
    advantages: list[float | None] = [None] * len(rewards)
    if len(known) >= config.min_group:
        values = iter(ADVANTAGES[config.advantage](known))
        advantages = [None if reward is None else next(values) for reward in rewards]
    return ScoredGroup(group, rewards, tuple(_reason(scored) for scored in scores), tuple(advantages))


def _reason(scored: Scored) -> str:
    if scored.result is not None and scored.outcome == "ok":
        return scored.result.reason
    return f"{scored.outcome}: {scored.reason}"


def drop_reason(scored: ScoredGroup, config: RlConfig) -> str | None:
    """Why the group is not trained on: unscored, zero_advantage, or None."""
    known = [advantage for advantage in scored.advantages if advantage is not None]
    if not known:
        return "unscored"
    return "zero_advantage" if config.drop_zero_advantage and is_zero(known) else None
