"""The records of RL: a group that is admitted, its rollouts, its rewards and advantages, and a batch of groups."""

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from posttrain.records import DrawnPrompt, Outcome, Rollout
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.rollouts import Reply, make_rollout


class GroupState(StrEnum):
    """The state of a group in the ledger. Only after a crash can it move back; see `history.ledger`."""

    RESERVED = "reserved"  # admitted: it is being sampled, or will be next
    GENERATED = "generated"  # all its replies are sampled
    SCORED = "scored"  # it has its rewards
    TRAINED = "trained"  # it was part of an optimizer step
    COMMITTED = "committed"  # that step is part of a committed checkpoint
    DROPPED = "dropped"  # it will never be trained on


class LedgerEvent(StrEnum):
    """An event in the ledger's log: first the transitions of a group, then events that concern no single group."""

    RESERVED = "reserved"
    GENERATED = "generated"
    SCORED = "scored"
    TRAINED = "trained"
    DROPPED = "dropped"
    RESTARTED = "restarted"  # it is sampled again, from the tokens that a crash or a lost version left
    COMMITTED = "committed"  # value: the policy version
    ROLLED_BACK = "rolled_back"  # the steps after the last commit were undone
    FORGOTTEN = "forgotten"  # the groups from this order on were removed; a deterministic run dispatches them again
    WEIGHTS_TAKEN = "took"  # value: [worker, policy version]
    ENGINE_REPLACED = "replaced"  # value: [worker, reason]
    EVALUATION_STARTED = "evaluation"  # value: [worker, policy version]
    EVALUATED = "evaluated"  # value: the policy version
    EVALUATION_ABANDONED = "evaluation_left"  # training ended before the evaluation; value: the policy version
    FINISHED = "finished"  # value: the policy version


class DropReason(StrEnum):
    """Why a group is not trained on."""

    ZERO_ADVANTAGE = "zero_advantage"  # all its rewards are equal
    UNSCORED = "unscored"  # too few of its rollouts have a reward
    STOPPED = "stopped"  # its first replies were equal, and the others would hardly have made a difference
    TRUNCATED = "truncated"  # every rollout was cut off at the limit of tokens, and such rollouts are masked
    STALE = "stale"  # too old for every later batch
    SURPLUS = "surplus"  # a spare group that was not needed
    FINISHED = "finished"  # training ended before it was trained on or dropped


EQUAL_REWARDS = (DropReason.ZERO_ADVANTAGE, DropReason.STOPPED)  # of the replies that were sampled


class Drop(Struct, frozen=True):
    """The reason why a group was dropped. detail: for UNSCORED, the commonest outcome without a reward, "timeout"."""

    reason: DropReason
    detail: str = ""

    def __str__(self) -> str:
        """The text in the ledger and the archive, such as "zero_advantage" or "unscored:timeout"."""
        return f"{self.reason}:{self.detail}" if self.detail else str(self.reason)


class Admission(Struct, frozen=True):
    """A group that was admitted by the queue and is to be sampled now.

    stamp: the oldest policy version that may sample for it. recorded: the replies as far as they were sampled before a
    crash, or ().
    """

    order: int
    stamp: int
    prompt: DrawnPrompt
    recorded: tuple[Reply, ...] = ()


class Group(Struct, frozen=True):
    """The G rollouts of one prompt. order: the group's place in the order of dispatch, from 0."""

    order: int
    prompt: DrawnPrompt
    rollouts: tuple[Rollout, ...]

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among all sampled tokens of the group; 0 if nothing was sampled."""
        oldest = [version for rollout in self.rollouts if (version := rollout.oldest_version) is not None]
        return min(oldest, default=0)


class ScoredGroup(Struct, frozen=True):
    """A group with its rewards. Each sequence has one entry for each rollout.

    rewards, advantages: None for a rollout that could not be scored. A rollout that has a reward but is not trained on
    has no advantage either. outcomes: as in `Scored`. ref_logprobs: of the trained tokens under the reference policy;
    empty without a reference. turn_advantages: one for each turn of each rollout, empty for a rollout without an
    advantage; empty as a whole unless `advantage_per` is turn.

    Example: four rollouts, of which the last one could not be scored, have rewards (1.0, 0.0, 0.5, None) and, by
    `group_mean`, advantages (0.5, -0.5, 0.0, None).
    """

    group: Group
    rewards: tuple[float | None, ...]
    reasons: tuple[str, ...]
    advantages: tuple[float | None, ...]
    outcomes: tuple[Outcome, ...] = ()
    ref_logprobs: tuple[tuple[float, ...], ...] = ()
    turn_advantages: tuple[tuple[float, ...], ...] = ()

    @property
    def scored_rewards(self) -> list[float]:
        """The rewards that are known."""
        return [reward for reward in self.rewards if reward is not None]


class Batch(Struct, frozen=True):
    """The groups of one optimizer step, in dispatch order. ready_since: the Unix time at which each was ready."""

    groups: list[ScoredGroup]
    ready_since: list[float]


def make_group(
    order: int,
    prompt: DrawnPrompt,
    replies: Sequence[Reply],
    *,
    worker: str = "",
    started_s: float = 0.0,
    finished_s: float = 0.0,
) -> Group:
    """The group of a prompt's finished replies. worker: which sampled them. started_s, finished_s: Unix times."""
    rollouts = tuple(
        make_rollout(
            prompt.prompt,
            reply,
            prompt_id=prompt.row.id,
            group_id=f"g{order}",
            index=index,
            system=prompt.system,
            worker=worker,
            started_s=started_s,
            finished_s=finished_s,
        )
        for index, reply in enumerate(replies)
    )
    return Group(order, prompt, rollouts)


def group_of_flight(flight: Flight) -> Group:
    """The group of finished rollouts."""
    return Group(flight.order, flight.prompt, flight.rollouts)


def num_tokens(groups: Sequence[ScoredGroup]) -> int:
    """How many tokens the policy sampled for the groups."""
    return sum(rollout.num_sampled for scored in groups for rollout in scored.group.rollouts)
