"""Count what happened between two optimizer steps, and compute the metrics of a step from the counts."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.context import BusyLog
from posttrain.data.images.modality import modality_of
from posttrain.files import read_jsonl
from posttrain.metrics.correctness import is_right
from posttrain.records import FinishReason, Rollout
from posttrain.rl.records import EQUAL_REWARDS, Drop, DropReason, ScoredGroup, num_tokens

# Groups are dropped as FINISHED after the last step, so no step could report them.
REASONS = tuple(reason for reason in DropReason if reason is not DropReason.FINISHED)

# Names of the counters of dropped groups. One kind counts groups by the mean length of their replies, rounded up to a
# power of two. The other counts them by the prompt's pass rate in the profile, rounded to a quarter.
DROP_COUNTERS = ("dropped_length/", "dropped_pass_rate/")

# Means over the episodes of a step: of counts, by their name in `RewardResult.parts`, and of the length.
EPISODE_PARTS = {
    "episode/turns": "turns",
    "episode/tool_calls": "tool_calls",
    "episode/malformed_calls": "malformed_calls",
    "episode/tool_failures": "tool_failures",
}
EPISODE_TOKENS = "episode/tokens"
EPISODE_CACHED = "episode/cached"  # the share of the tokens read by later turns that the engines had in their caches


def sampled_before(folder: Path, profiled: int) -> int:
    """How many tokens were sampled so far: by the last line of the metrics, or `profiled` if there is none yet."""
    lines = list(read_jsonl(folder / "metrics.jsonl"))
    return lines[-1]["tokens_sampled_total"] if lines else profiled


def unscored_totals(folder: Path) -> dict[str, int]:
    """How many replies of all steps have no score: of the training and of evaluations."""
    columns = {"training": "rollouts_unscored", "evaluations": "evaluated_unscored"}
    totals = dict.fromkeys(columns, 0)
    for line in read_jsonl(folder / "metrics.jsonl"):
        for name, column in columns.items():
            totals[name] += line.get(column, 0)
    return totals


class StepTally:
    """Counts the groups that were scored or dropped since the last step.

    logs: the busy times of each actor other than the trainer, by its name; its idle time is computed from them.
    pass_rates: those of the profile, by prompt. threshold: the least reward of a right reply. reads: how many tokens
    turns after the first ones have read so far, and how many of them were cached.
    """

    def __init__(
        self,
        logs: Mapping[str, BusyLog],
        pass_rates: Mapping[str, float],
        threshold: float,
        *,
        reads: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ):
        self._threshold = threshold
        self._logs = logs
        self._pass_rates = pass_rates
        self._counts: Counter[str] = Counter()
        self._told = time.time()
        self._reads = reads
        self._reads_told = reads()
        self._busy_s = {name: log.busy_s for name, log in logs.items()}  # the profile's, which is no step's

    def watch(self, name: str, log: BusyLog) -> None:
        """Compute the idle time of one more actor."""
        self._logs = {**self._logs, name: log}
        self._busy_s[name] = log.busy_s

    def forget(self, log: BusyLog) -> None:
        """Compute the idle time of an actor no more."""
        self._logs = {name: other for name, other in self._logs.items() if other is not log}

    def decided(self, scored: ScoredGroup, dropped: Drop | None, *, in_parts: bool = False) -> None:
        """Count a group that was sampled and scored. dropped: why it is not trained on, None if it is. in_parts:
        whether its first replies were sampled before the others, which these may have stopped.
        """
        rollouts, rewards, counts = scored.group.rollouts, scored.scored_rewards, self._counts
        lengths = [rollout.num_sampled for rollout in rollouts]
        counts["groups"] += 1
        counts["in_parts"] += in_parts
        counts["tokens"] += sum(lengths)
        counts["rollouts"] += len(rollouts)
        counts["passes"] += sum(is_right(reward, self._threshold) for reward in rewards)
        counts["rewards"] += len(rewards)
        counts["length"] += sum(rollout.finish_reason == FinishReason.LENGTH for rollout in rollouts)
        self._episodes(rollouts)
        if dropped is not None:
            self._drop(dropped.reason, scored.group.prompt.row.id, lengths)
        if dropped is not None and dropped.reason in EQUAL_REWARDS:
            counts["too_easy" if is_right(fmean(rewards), self._threshold) else "too_hard"] += 1

    def _episodes(self, rollouts: Sequence[Rollout]) -> None:
        """Count the episodes among the rollouts that have a score, and what happened in them."""
        for rollout in rollouts:
            if rollout.scored is None or (result := rollout.scored.result) is None:
                continue
            self._counts["episodes"] += 1
            for name, part in EPISODE_PARTS.items():
                self._counts[name] += round(result.parts.get(part, 0))
            self._counts[EPISODE_TOKENS] += max(len(branch.token_ids) for branch in rollout.branches)

    def _cached(self) -> dict[str, float]:
        """The share of cached tokens since the last step; nothing if no later turn has read any."""
        now, before = self._reads(), self._reads_told
        self._reads_told = now
        read, cached = (new - old for new, old in zip(now, before, strict=True))
        return {EPISODE_CACHED: cached / read} if read else {}

    def expired(self, reason: DropReason, prompt_id: str, lengths: Sequence[int]) -> None:
        """Count a group that was dropped as too old or not needed. lengths: sampled tokens of each of its replies."""
        self._drop(reason, prompt_id, lengths)

    def _drop(self, reason: DropReason, prompt_id: str, lengths: Sequence[int]) -> None:
        counts = self._counts
        counts[f"dropped_{reason}"] += 1
        counts["dropped_tokens"] += sum(lengths)
        counts["dropped_rollouts"] += len(lengths)
        counts[f"dropped_length/{_power_of_two(fmean(lengths))}"] += 1
        rate = self._pass_rates.get(prompt_id)
        counts[f"dropped_pass_rate/{'unknown' if rate is None else f'{round(4 * rate) / 4:g}'}"] += 1

    def values(
        self,
        step: int,
        batch: Sequence[ScoredGroup],
        *,
        ages_s: Sequence[float],
        waited_s: float,
        trained: dict[str, Any],
    ) -> dict[str, Any]:
        """The metrics of optimizer step `step`. The counts start again from zero.

        ages_s: how long each group of the batch waited to be trained on. waited_s: how long the trainer waited for the
        batch. trained: the trainer's own metrics.
        """
        counts, self._counts = self._counts, Counter()
        now = time.time()
        wall_s, self._told = now - self._told, now
        staleness = [step - scored.group.oldest_version for scored in batch]
        by_capability: dict[str, list[float]] = {}
        by_modality: dict[str, list[float]] = {}
        for scored in batch:
            row = scored.group.prompt.row
            by_capability.setdefault(row.capability, []).extend(scored.scored_rewards)
            by_modality.setdefault(modality_of(row), []).extend(scored.scored_rewards)
        rewards = [reward for group in by_capability.values() for reward in group]
        unscored = counts["rollouts"] - counts["rewards"]
        return {
            "policy_version": step + 1,
            "reward_mean": fmean(rewards),
            "pass_rate": counts["passes"] / max(1, counts["rewards"]),
            **{f"reward/{name}": fmean(group) for name, group in sorted(by_capability.items()) if group},
            **(
                {}
                if set(by_modality) == {"text"}
                else {f"reward_modality/{name}": fmean(group) for name, group in sorted(by_modality.items()) if group}
            ),
            **trained,
            "staleness_mean": fmean(staleness),
            "staleness_max": max(staleness),
            **{f"staleness/{age}": count for age, count in sorted(Counter(staleness).items())},
            "queue_age_s_mean": fmean(ages_s),
            "queue_age_s_max": max(ages_s),
            "groups_trained": len(batch),
            "groups_generated": counts["groups"],
            "groups_in_parts": counts["in_parts"],
            **{f"groups_dropped_{reason}": counts[f"dropped_{reason}"] for reason in REASONS},
            **{f"groups_{name}": count for name, count in sorted(counts.items()) if name.startswith(DROP_COUNTERS)},
            "groups_too_easy": counts["too_easy"],
            "groups_too_hard": counts["too_hard"],
            "rollouts_unscored": unscored,
            "unscored_fraction": unscored / max(1, counts["rollouts"]),
            "tokens_generated": counts["tokens"],
            "tokens_dropped": counts["dropped_tokens"],
            "generate_tokens_per_s": counts["tokens"] / wall_s if wall_s else 0.0,
            "step_wall_s": wall_s,
            "wait_s": waited_s,
            "idle/trainer": min(1.0, waited_s / wall_s) if wall_s else 0.0,
            **self._idle(wall_s),
            "reply_tokens_mean": num_tokens(batch) / sum(len(scored.group.rollouts) for scored in batch),
            "dropped_reply_tokens_mean": counts["dropped_tokens"] / max(1, counts["dropped_rollouts"]),
            "truncated_fraction": counts["length"] / max(1, counts["rollouts"]),
            **_episode_means(counts),
            **self._cached(),
        }

    def _idle(self, wall_s: float) -> dict[str, float]:
        """For each actor, the share of the last `wall_s` seconds in which it was not busy.

        Work is counted when it ends. So long work may count in a later step than the one in which it was done.
        """
        shares = {}
        for name, log in self._logs.items():
            busy_s = log.busy_s - self._busy_s[name]
            self._busy_s[name] = log.busy_s
            shares[f"idle/{name}"] = max(0.0, 1 - busy_s / wall_s) if wall_s else 0.0
        return shares


def _episode_means(counts: Counter[str]) -> dict[str, float]:
    """The number of episodes, and means over them; nothing if there were none."""
    if not (episodes := counts["episodes"]):
        return {}
    return {"episodes": episodes, **{name: counts[name] / episodes for name in (*EPISODE_PARTS, EPISODE_TOKENS)}}


def _power_of_two(length: float) -> int:
    """The smallest power of two that is at least `length`; 0 for 0."""
    return 2 ** max(0, math.ceil(math.log2(length))) if length else 0
