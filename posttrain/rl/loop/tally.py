"""What happened from one optimizer step to the next, counted, and told as the metrics of the step."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.context import BusyLog
from posttrain.files import read_jsonl
from posttrain.metrics.correctness import is_right
from posttrain.records import FinishReason
from posttrain.rl.records import Drop, DropReason, ScoredGroup, num_tokens

# FINISHED has no step that could report it.
REASONS = tuple(reason for reason in DropReason if reason is not DropReason.FINISHED)

# Of every dropped group: the mean length of its replies, up to a power of two; its prompt's pass rate by the profile,
# to the nearest quarter.
DROP_COUNTERS = ("dropped_length/", "dropped_pass_rate/")


def sampled_before(folder: Path, profiled: int) -> int:
    """Tokens sampled before the next step: by the last line of the stage's metrics, else `profiled`, the profile's."""
    lines = list(read_jsonl(folder / "metrics.jsonl"))
    return lines[-1]["tokens_sampled_total"] if lines else profiled


class StepTally:
    """Counts decided groups. logs: of each actor beside the trainer, by its name, from which its idle time is known.

    pass_rates: of the prompts, by the profile. threshold: the least reward of a right reply.
    """

    def __init__(self, logs: Mapping[str, BusyLog], pass_rates: Mapping[str, float], threshold: float):
        self._threshold = threshold
        self._logs = logs
        self._pass_rates = pass_rates
        self._counts: Counter[str] = Counter()
        self._told = time.time()
        self._busy_s = {name: log.busy_s for name, log in logs.items()}  # the profile's, which is no step's

    def decided(self, scored: ScoredGroup, dropped: Drop | None) -> None:
        """A group was sampled and scored; `dropped` says why it is not trained on, None that it is."""
        rollouts, rewards, counts = scored.group.rollouts, scored.scored_rewards, self._counts
        lengths = [rollout.num_sampled for rollout in rollouts]
        counts["groups"] += 1
        counts["tokens"] += sum(lengths)
        counts["rollouts"] += len(rollouts)
        counts["passes"] += sum(is_right(reward, self._threshold) for reward in rewards)
        counts["rewards"] += len(rewards)
        counts["length"] += sum(rollout.finish_reason == FinishReason.LENGTH for rollout in rollouts)
        if dropped is not None:
            self._drop(dropped.reason, scored.group.prompt.row.id, lengths)
        if dropped is not None and dropped.reason is DropReason.ZERO_ADVANTAGE:
            counts["too_easy" if is_right(fmean(rewards), self._threshold) else "too_hard"] += 1

    def expired(self, reason: DropReason, prompt_id: str, lengths: Sequence[int]) -> None:
        """A group is too old, or not needed. lengths: sampled tokens of each of its replies by then."""
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
        """The metrics of optimizer step `step`; what comes after belongs to the next.

        ages_s: how long each group of the batch waited to be trained on. waited_s: how long the trainer waited for the
        batch. trained: the trainer's own metrics.
        """
        counts, self._counts = self._counts, Counter()
        now = time.time()
        wall_s, self._told = now - self._told, now
        staleness = [step - scored.group.oldest_version for scored in batch]
        by_capability: dict[str, list[float]] = {}
        for scored in batch:
            by_capability.setdefault(scored.group.prompt.row.capability, []).extend(scored.scored_rewards)
        rewards = [reward for group in by_capability.values() for reward in group]
        unscored = counts["rollouts"] - counts["rewards"]
        return {
            "policy_version": step + 1,
            "reward_mean": fmean(rewards),
            "pass_rate": counts["passes"] / max(1, counts["rewards"]),
            **{f"reward/{name}": fmean(group) for name, group in sorted(by_capability.items()) if group},
            **trained,
            "staleness_mean": fmean(staleness),
            "staleness_max": max(staleness),
            **{f"staleness/{age}": count for age, count in sorted(Counter(staleness).items())},
            "queue_age_s_mean": fmean(ages_s),
            "queue_age_s_max": max(ages_s),
            "groups_trained": len(batch),
            "groups_generated": counts["groups"],
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
        }

    def _idle(self, wall_s: float) -> dict[str, float]:
        """Share of the time in which an actor finished no work that it was then busy with."""
        shares = {}
        for name, log in self._logs.items():
            busy_s = log.busy_s - self._busy_s[name]
            self._busy_s[name] = log.busy_s
            shares[f"idle/{name}"] = max(0.0, 1 - busy_s / wall_s) if wall_s else 0.0
        return shares


def _power_of_two(length: float) -> int:
    """The smallest that is no less."""
    return 2 ** max(0, math.ceil(math.log2(length))) if length else 0
