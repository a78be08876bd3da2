"""The records of RL: a prompt that was drawn, the group of its rollouts, and the group with rewards and advantages."""

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from posttrain.records import DrawnPrompt, Outcome, Rollout
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.rollouts import Reply, make_rollout


class GroupState(StrEnum):
    """Where a group stands in the ledger. A group only moves forward, but for a crash: see `history.ledger`."""

    RESERVED = "reserved"  # admitted: it is sampled, or about to be
    GENERATED = "generated"  # all its replies are there
    SCORED = "scored"  # its rewards are there
    TRAINED = "trained"  # it was part of an optimizer step
    COMMITTED = "committed"  # that step is part of a committed checkpoint
    DROPPED = "dropped"  # it will never be trained on


class LedgerEvent(StrEnum):
    """What the ledger's log says: first the transitions of a group, then what concerns no single group."""

    RESERVED = "reserved"
    GENERATED = "generated"
    SCORED = "scored"
    TRAINED = "trained"
    DROPPED = "dropped"
    RESTARTED = "restarted"  # it is sampled again, from what a crash or a lost version left of it
    COMMITTED = "committed"  # value: the policy version
    ROLLED_BACK = "rolled_back"  # the steps after the last commit were undone
    FORGOTTEN = "forgotten"  # a deterministic run starts again from the group of this order
    WEIGHTS_TAKEN = "took"  # value: [worker, policy version]
    ENGINE_REPLACED = "replaced"  # value: [worker, reason]
    PROBED = "probed"  # value: [prompt, passes, failures, policy version]
    EVALUATION_STARTED = "evaluation"  # value: [worker, policy version]
    EVALUATED = "evaluated"  # value: the policy version
    EVALUATION_ABANDONED = "evaluation_left"  # training ended before it; value: the policy version
    FINISHED = "finished"  # value: the policy version


class DropReason(StrEnum):
    """Why a group is not trained on."""

    ZERO_ADVANTAGE = "zero_advantage"  # all its rewards are equal
    UNSCORED = "unscored"  # too few of its rollouts have a reward
    TRUNCATED = "truncated"  # every rollout met the limit of tokens, and such rollouts are masked
    STALE = "stale"  # too old for every batch to come
    SURPLUS = "surplus"  # a spare group that was not needed
    FINISHED = "finished"  # training ended before it was decided


class Drop(Struct, frozen=True):
    """A reason, and for UNSCORED the outcome that most rollouts without a reward had, such as "timeout"."""

    reason: DropReason
    detail: str = ""

    def __str__(self) -> str:
        """As the ledger and the archive write it: "zero_advantage", "unscored:timeout"."""
        return f"{self.reason}:{self.detail}" if self.detail else str(self.reason)


class Group(Struct, frozen=True):
    """The G rollouts of one prompt. `order` is the place in which it was dispatched, from 0."""

    order: int
    prompt: DrawnPrompt
    rollouts: tuple[Rollout, ...]

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among all sampled tokens of the group."""
        return min(version for rollout in self.rollouts for version in rollout.versions)


class ScoredGroup(Struct, frozen=True):
    """A group with what its rewards said. Where a rollout could not be scored, reward and advantage are None.

    A rollout that has a reward but is not to be trained on has no advantage either. outcomes: as in `Scored`.
    ref_logprobs: of each rollout's trained tokens under the reference policy; empty where there is none.
    """

    group: Group
    rewards: tuple[float | None, ...]
    reasons: tuple[str, ...]
    advantages: tuple[float | None, ...]
    outcomes: tuple[Outcome, ...] = ()
    ref_logprobs: tuple[tuple[float, ...], ...] = ()

    @property
    def scored_rewards(self) -> list[float]:
        """The rewards that are known."""
        return [reward for reward in self.rewards if reward is not None]


def make_group(
    order: int,
    prompt: DrawnPrompt,
    replies: Sequence[Reply],
    *,
    worker: str = "",
    started_s: float = 0.0,
    finished_s: float = 0.0,
) -> Group:
    """The group of a prompt's finished replies. worker: that sampled them; the times are Unix times."""
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
    """Tokens that the policy sampled for the groups."""
    return sum(rollout.num_sampled for scored in groups for rollout in scored.group.rollouts)
