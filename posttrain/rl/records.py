"""The records of RL: a prompt that was drawn, the group of its rollouts, and the group with rewards and advantages."""

from collections.abc import Sequence

from msgspec import Struct

from posttrain.records import Message, Rollout, Row
from posttrain.sampling.requests import Completion


class DrawnPrompt(Struct, frozen=True):
    """A prompt as it is sent: the row, the system instruction sampled for it, the messages and their token ids."""

    row: Row
    system: str | None
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]


class Group(Struct, frozen=True):
    """The G rollouts of one prompt. `order` is the place in which it was dispatched, from 0."""

    order: int
    prompt: DrawnPrompt
    rollouts: tuple[Rollout, ...]

    @property
    def oldest_version(self) -> int:
        """The oldest policy version among all tokens of the group."""
        return min(span.policy_version for rollout in self.rollouts for span in rollout.versions)


class ScoredGroup(Struct, frozen=True):
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


def num_tokens(groups: Sequence[ScoredGroup]) -> int:
    """Reply tokens of the groups."""
    return sum(len(rollout.token_ids) for scored in groups for rollout in scored.group.rollouts)
