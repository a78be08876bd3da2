"""From sampled completions to scored groups: rewards, then advantages. A failure to score is never a reward of 0."""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

from msgspec.structs import replace

from posttrain.records import FinishReason, Outcome, Rollout, Scored, turn_part
from posttrain.rl.advantages import ADVANTAGES, OVER_BATCH, Rule, is_zero, of_turns
from posttrain.rl.grading.config import GradingConfig, OverlongConfig
from posttrain.rl.records import Drop, DropReason, Group, ScoredGroup
from posttrain.scoring.remote.client import TakeScores
from posttrain.scoring.remote.messages import Pair

FIRST_PAUSE_S = 0.25


class Scorer(Protocol):
    """The interface of a scorer, such as `RewardClient`."""

    async def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        """The scores in order."""
        ...

    async def score_each(self, groups: Sequence[Sequence[Pair]], take: TakeScores) -> None:
        """Have `take` called with the place and the scores of each group, as soon as it has them."""
        ...


async def score_group(group: Group, scorer: Scorer, config: GradingConfig) -> ScoredGroup:
    """Score every rollout, and compute advantages."""
    scores = all_scores(group, await scorer.score(pairs_to_score(group)))
    return scored_group(group, await scored_again(group, scores, scorer, rescores=config.reward.rescores), config)


def pairs_to_score(group: Group, num_known: int = 0) -> list[Pair]:
    """The rollouts that the reward scores, with their row. An episode has its score from its environment.

    num_known: how many of the first rollouts have their scores already.
    """
    return [(rollout, group.prompt.row) for rollout in group.rollouts[num_known:] if rollout.scored is None]


def all_scores(group: Group, scores: Sequence[Scored], known: Sequence[Scored] = ()) -> list[Scored]:
    """The score of every rollout. scores: of `pairs_to_score`. known: of the first rollouts."""
    given = iter(scores)
    return [*known, *(rollout.scored or next(given) for rollout in group.rollouts[len(known) :])]


async def scored_again(
    group: Group, scores: Sequence[Scored], scorer: Scorer, *, rescores: int, num_known: int = 0
) -> Sequence[Scored]:
    """The scores, after rollouts without one were scored again, up to `rescores` times: see `worth_a_try`."""
    for pause_s in rescore_pauses(rescores):
        if not (places := worth_a_try(group, scores, num_known)):
            break
        await asyncio.sleep(pause_s)
        pairs = [(group.rollouts[place], group.prompt.row) for place in places]
        again = dict(zip(places, await scorer.score(pairs), strict=True))
        scores = [again.get(place, scored) for place, scored in enumerate(scores)]
    return scores


def worth_a_try(group: Group, scores: Sequence[Scored], num_known: int = 0) -> list[int]:
    """The places of rollouts without a score that the reward may score next time.

    Those on which the reward function hung, though it scored others, are not: it was tried on them more than once. Nor
    are the first `num_known`, which were scored before, nor episodes.
    """
    return [
        place
        for place, scored in enumerate(scores)
        if scored.result is None
        and place >= num_known
        and scored.outcome is not Outcome.UNSCORABLE
        and group.rollouts[place].scored is None
    ]


def rescore_pauses(rescores: int) -> list[float]:
    """Seconds to wait before each further scoring. They grow, so that a service that is down has time to recover."""
    return [FIRST_PAUSE_S * 2**attempt for attempt in range(rescores)]


def scored_group(group: Group, scores: Sequence[Scored], config: GradingConfig) -> ScoredGroup:
    """The group with its rewards, and advantages if at least `min_group` rollouts have one.

    A rollout with a sampler log-probability that is not finite cannot be trained on, and counts as unscored.

    `rewards` are what the reward function returned. Advantages are computed from the rewards with the penalty of
    `overlong`, which the reason names. A truncated reply that is masked counts in its group's baseline, but has no
    advantage.
    """
    scores = [_refused(rollout) or scored for rollout, scored in zip(group.rollouts, scores, strict=True)]
    rewards = tuple(None if scored.result is None else scored.result.value for scored in scores)
    penalties = _penalties(group, config)
    known = [reward + penalty for reward, penalty in zip(rewards, penalties, strict=True) if reward is not None]
    advantages: list[float | None] = [None] * len(rewards)
    if len(known) >= config.min_group:
        values = iter(ADVANTAGES[config.advantage](known))
        advantages = [None if reward is None else next(values) for reward in rewards]
    if config.loss.truncated == "mask":
        advantages = [
            None if rollout.finish_reason == FinishReason.LENGTH else advantage
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        ]
    reasons = tuple(_reason(item, penalty) for item, penalty in zip(scores, penalties, strict=True))
    outcomes = tuple(scored.outcome for scored in scores)
    scored = ScoredGroup(group, rewards, reasons, tuple(advantages), outcomes)
    if config.advantage_per == "episode" or len(known) < config.min_group:
        return scored
    return _by_turn(scored, known, ADVANTAGES[config.advantage])


def _penalties(group: Group, config: GradingConfig) -> list[float]:
    """What is added to the reward of each rollout for its length."""
    if config.overlong is None:
        return [0.0] * len(group.rollouts)
    longest = [longest_turn(rollout) for rollout in group.rollouts]
    return [overlong_penalty(length, config.overlong, config.sampling.max_tokens) for length in longest]


def _by_turn(scored: ScoredGroup, known: Sequence[float], rule: Rule) -> ScoredGroup:
    """The group with an advantage for each turn. known: the rewards that there are, with the penalty of `overlong`."""
    pairs = list(zip(scored.group.rollouts, scored.rewards, strict=True))
    by_turn = iter(of_turns(rule, known, [paid_turns(rollout) for rollout, reward in pairs if reward is not None]))
    of_rollouts = [() if reward is None else next(by_turn) for _, reward in pairs]
    pairs = zip(of_rollouts, scored.advantages, strict=True)
    return replace(scored, turn_advantages=tuple(() if value is None else turns for turns, value in pairs))


def paid_turns(rollout: Rollout) -> list[float]:
    """What the environment paid for each turn of the policy, in order."""
    result = rollout.scored.result if rollout.scored is not None else None
    parts = result.parts if result is not None else {}
    turns = sum(segment.sampler_logprobs is not None for segment in rollout.segments)
    return [parts.get(turn_part(number), 0.0) for number in range(1, turns + 1)]


def _refused(rollout: Rollout) -> Scored | None:
    """The result for a rollout that cannot be trained on, or None if it can."""
    bad = 0
    for segment in rollout.segments:
        logprobs = segment.sampler_logprobs
        if logprobs is not None and not math.isfinite(sum(logprobs)):  # the sum of finite ones is finite, and quick
            bad += sum(not math.isfinite(value) for value in logprobs)
    if not bad:
        return None
    return Scored(None, Outcome.INFRASTRUCTURE, f"{bad} of the sampler's log-probabilities are not finite")


def longest_turn(rollout: Rollout) -> int:
    """The number of tokens of the policy's longest turn, to which `sampling.max_tokens` applies."""
    sampled = (len(segment.token_ids) for segment in rollout.segments if segment.sampler_logprobs is not None)
    return max(sampled, default=0)


def overlong_penalty(num_tokens: int, overlong: OverlongConfig, max_tokens: int) -> float:
    """weight * max(-1, min(-(n - (L - b)) / b, 0)): 0 up to L - b tokens, then falling to -weight at L.

    n is num_tokens, of one reply; L is max_tokens, the longest reply; b is overlong.buffer_tokens.

    Source: DAPO, arXiv 2503.14476, equation 13.
    """
    buffer = overlong.buffer_tokens
    beyond = num_tokens - (max_tokens - buffer)
    return -overlong.weight * min(1.0, max(0.0, beyond / buffer))


def _reason(scored: Scored, penalty: float) -> str:
    if scored.result is None:
        reason = f"{scored.outcome}: {scored.reason}"
    else:
        reason = scored.result.reason
    return f"{reason}; overlong {penalty:.3g}".removeprefix("; ") if penalty else reason


def over_batch(groups: Sequence[ScoredGroup], advantage: str) -> list[ScoredGroup]:
    """The groups of a batch with the advantages to train on. They differ if the rule needs the whole batch.

    It is called once, before the batch is divided among the ranks. The rule is applied to the rollouts that are trained
    on.
    """
    rule = OVER_BATCH.get(advantage)
    if rule is None:
        return list(groups)
    values = iter(rule([value for scored in groups for value in scored.advantages if value is not None]))
    return [
        replace(scored, advantages=tuple(None if value is None else next(values) for value in scored.advantages))
        for scored in groups
    ]


def drop_reason(scored: ScoredGroup, config: GradingConfig) -> Drop | None:
    """Why the group is not trained on, or None. Only the rollouts that would be trained on are considered."""
    known = [advantage for advantage in scored.advantages if advantage is not None]
    if len(scored.scored_rewards) < config.min_group:
        outcomes = Counter(unscored_outcomes(scored)).most_common(1)
        return Drop(DropReason.UNSCORED, outcomes[0][0] if outcomes else "")
    if not known:
        return Drop(DropReason.TRUNCATED)
    of_turn = list(chain.from_iterable(scored.turn_advantages))  # those of the first turns are those of the rollouts
    return Drop(DropReason.ZERO_ADVANTAGE) if config.drop_zero_advantage and is_zero(of_turn or known) else None


def unscored_outcomes(scored: ScoredGroup) -> list[Outcome]:
    """The outcome of each rollout that has no reward."""
    return [outcome for outcome, reward in zip(scored.outcomes, scored.rewards, strict=False) if reward is None]
