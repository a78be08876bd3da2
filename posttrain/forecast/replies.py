"""The groups of a run that was made, and draws of groups like them for a forecast.

A forecast may plan groups of another size. Fewer replies are drawn from those of a group. For more, a group is thought
to have a pass rate of its own, whose prior is the Beta distribution that fits the run's groups (rl/prompts/prior.py):
further replies pass at a rate drawn from the posterior. A group whose rewards are equal then is not trained on. So
small groups are dropped more often than large ones, as in a run.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.errors import DataError
from posttrain.forecast.simulation import Draw
from posttrain.metrics.correctness import is_right
from posttrain.rl.config import RlConfig
from posttrain.rl.prompts.prior import Prior, fit_prior

UNDECIDED = ("dropped:finished", "dropped:surplus", "dropped:stale")  # dropped for other reasons than their rewards
KEPT, EQUAL = "trained", ("dropped:zero_advantage", "dropped:stopped")


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """A group of a run. replies: (tokens, reward) of each; the reward is None if it has none. status: `trained`, or why
    the group was dropped, as in the archive. prompt_tokens: of its prompt.
    """

    replies: tuple[tuple[int, float | None], ...]
    status: str
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SampledGroups:
    """The groups of a run. config: of its RL stage. by_step: by step and capability. shares: of each capability in what
    was trained on. prior: of the pass rates of groups.
    """

    config: RlConfig
    by_step: Mapping[tuple[int, str], Sequence[SampledGroup]]
    shares: Mapping[str, float]
    prior: Prior

    @property
    def prompt_tokens(self) -> float:
        """The mean over the groups."""
        return fmean(group.prompt_tokens for pool in self.by_step.values() for group in pool)

    def num_scorings(self) -> int:
        """How often rewards were waited for: twice for a group that has more than its first replies.

        A run does not tell which of these were sampled whole at once, and so waited for rewards once.
        """
        first = self.config.first_replies
        sizes = (len(group.replies) for pool in self.by_step.values() for group in pool)
        return sum(2 if first is not None and size > first else 1 for size in sizes)

    def draw(self, config: RlConfig) -> Draw:
        """Draws groups of the same step or the nearest one before it. config: the one that is planned.

        A group that was stopped by its first replies has only these, unless the planned run samples groups whole. If
        the run did that and the planned one does not, the first replies stop each group that is dropped.
        """
        last = max(step for step, _ in self.by_step)
        most, first, size = config.sampling.max_tokens, config.first_replies, config.group_size
        # The size of the groups that went on though they were dropped in the end.
        of_dropped = self.config.group_size if self.config.first_replies is not None else None

        def draw(source: random.Random, capability: str, step: int) -> tuple[list[int], bool]:
            pool = next(
                found
                for at in (*range(min(step, last), -1, -1), *range(last + 1))
                if (found := self.by_step.get((at, capability)))
            )
            group = source.choice(pool)
            may_stop = first is not None and group.status != KEPT and len(group.replies) != of_dropped
            replies = group.replies if may_stop else self._resized(group, size, source)
            lengths = [min(most, tokens) for tokens, _ in replies]
            if may_stop:
                return lengths[:first], False
            are_mixed = len({reward for _, reward in replies if reward is not None}) > 1
            return lengths, group.status in (KEPT, *EQUAL) and (are_mixed or not config.drop_zero_advantage)

        return draw

    def _resized(self, group: SampledGroup, size: int, source: random.Random) -> Sequence[tuple[int, float | None]]:
        """So many replies: some of the group's, or these and others like them."""
        replies, threshold = group.replies, self.config.reward.correct_threshold
        if size <= len(replies):
            return replies if size == len(replies) else source.sample(replies, size)
        right = [reply for reply in replies if reply[1] is not None and is_right(reply[1], threshold)]
        wrong = [reply for reply in replies if reply not in right]
        a, b = self.prior
        rate = source.betavariate(a + len(right), b + len(wrong))
        more: list[tuple[int, float | None]] = []
        for _ in range(size - len(replies)):
            passes = source.random() < rate
            alike, others = (right, wrong) if passes else (wrong, right)
            tokens, reward = source.choice(alike or others)
            more.append((tokens, reward if alike else float(passes)))
        return [*replies, *more]


def read_groups(folder: Path, config: RlConfig) -> SampledGroups:
    """The groups in the archive of an RL stage that were decided by their rewards. Raises DataError if there are none.

    folder: of the stage. config: of the stage.
    """
    import pyarrow.parquet as pq

    found: dict[tuple[int, str], list[SampledGroup]] = defaultdict(list)
    trained: Counter[str] = Counter()
    columns = ["group_id", "num_tokens", "reward", "status", "capability", "prompt_ids"]
    for number, file in enumerate(sorted((folder / "rollouts").glob("*.parquet"))):
        groups: dict[object, list[dict[str, Any]]] = defaultdict(list)
        for row in pq.read_table(file, columns=columns).to_pylist():
            groups[row["group_id"]].append(row)
        for rows in groups.values():
            status, capability = rows[0]["status"], rows[0]["capability"]
            if status not in UNDECIDED:
                replies = tuple((row["num_tokens"], row["reward"]) for row in rows)
                found[number, capability].append(SampledGroup(replies, status, len(rows[0]["prompt_ids"] or ())))
                trained[capability] += status == KEPT
    capabilities = {capability for _, capability in found}
    shares = {name: trained[name] / trained.total() for name in capabilities if trained[name]}
    kept = {key: value for key, value in found.items() if key[1] in shares}
    if not kept:
        raise DataError(f"{folder}: no rollouts to draw replies from")
    return SampledGroups(config, kept, shares, _prior(kept, config.reward.correct_threshold))


def _prior(by_step: Mapping[tuple[int, str], Sequence[SampledGroup]], threshold: float) -> Prior:
    counts: Counter[tuple[int, int]] = Counter()
    for pool in by_step.values():
        for group in pool:
            rewards = [reward for _, reward in group.replies if reward is not None]
            counts[sum(is_right(reward, threshold) for reward in rewards), len(rewards)] += 1
    return fit_prior(counts)
