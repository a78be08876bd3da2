"""The records of RL: a prompt that was drawn, the group of its rollouts, and the group with rewards and advantages."""

from dataclasses import dataclass

from posttrain.records import Message, Rollout, Row

PASS_THRESHOLD = 0.5  # a rollout with a larger reward has passed


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """A prompt as it is sent: the row, the system instruction sampled for it, the messages and their token ids."""

    row: Row
    system: str | None
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """The G rollouts of one prompt. `order` is the place in which it was dispatched, from 0."""

    order: int
    prompt: DrawnPrompt
    rollouts: tuple[Rollout, ...]

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among all tokens of the group."""
        return min(span.policy_version for rollout in self.rollouts for span in rollout.versions)


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with what its rewards said. Where a rollout could not be scored, reward and advantage are None.

    A rollout that has a reward but is not to be trained on has no advantage either. outcomes: as in `Scored`.
    ref_logprobs: of each rollout's tokens under the reference policy; empty where there is none.
    """

    group: Group
    rewards: tuple[float | None, ...]
    reasons: tuple[str, ...]
    advantages: tuple[float | None, ...]
    outcomes: tuple[str, ...] = ()
    ref_logprobs: tuple[tuple[float, ...], ...] = ()

    @property
    def scored_rewards(self) -> list[float]:
        """The rewards that are known."""
        return [reward for reward in self.rewards if reward is not None]
