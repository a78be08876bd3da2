"""The frozen records that the parts hand to each other: rows in, rollouts through, results out.

They are msgspec structs: checked when they are read from JSON or MessagePack, and cheap to send between processes.
Nothing here imports torch, and nothing is filled in later: each step makes a new record with
`msgspec.structs.replace`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any

from msgspec import Struct, field


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    """A piece of text in a message: {"type": "text", "text": "What is this?"}."""

    text: str


class ImagePart(Struct, frozen=True, tag_field="type", tag="image"):
    """A picture in a message, by reference: {"type": "image", "image": "pictures/cat.png"}.

    image: a path or a URI; None stands for the next picture of the row's `images` column.
    """

    image: str | None = None


ContentPart = TextPart | ImagePart


class ToolCall(Struct, frozen=True, omit_defaults=True):
    """A call that an assistant turn makes: ToolCall("weather", {"city": "Paris"}, "call_1").

    arguments: by name, any JSON values. id: what the result's `tool_call_id` refers to, or None.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


class Message(Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation, for example Message("user", "2 + 2?").

    role: system, user, assistant or tool (the result of a call).
    content: text; or parts, if one of them is not text. A list of text parts alone is joined when it is read.
    tool_calls: the calls of an assistant turn, whose content may be empty then.
    tool_call_id: on a tool turn, the call that it answers, or None.
    name: of the speaker or the tool, or None.
    trained: whether supervised training learns this assistant turn. None: as the stage does by default, which is
    yes; False: the turn is context only. Always None on other turns, which are never learned.
    """

    role: str
    content: str | tuple[ContentPart, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    trained: bool | None = None

    @property
    def text(self) -> str:
        """The text of the content, without images and tool calls."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


class Row(Struct, frozen=True):
    """One validated row of a dataset.

    id: unique within its dataset (the row's own `id`, else made from its file and line).
    capability: what the row exercises (math, coding, ...); quotas, strata and results are by capability, and
        by modality.
    messages: the conversation. A prompt ends with a user or tool turn; a supervised example with an assistant turn.
    answer: what a reward compares with, or None.
    fields: every other column of the row as it was read, for reward plug-ins.
    """

    id: str
    capability: str
    messages: tuple[Message, ...]
    answer: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)


class FinishReason(StrEnum):
    """How a reply ended."""

    RUNNING = ""  # it has not ended yet
    STOP = "stop"  # the policy ended its turn
    LENGTH = "length"  # it met the limit of tokens
    ABORT = "abort"  # the engine gave it up


class Media(Struct, frozen=True):
    """A picture that a prompt shows, by reference, so that a record stays small.

    uri: FILE#KEY, its key in the store in that file; in what is read back from an archive KEY alone.
    """

    uri: str
    kind: str = "image"

    @property
    def key(self) -> str:
        """The picture's key in its store."""
        return self.uri.rpartition("#")[2]


class Prompt(Struct, frozen=True):
    """What the policy is given: the messages as they were sent, and their token ids, rendered by the chat template.

    media: what the messages refer to, in the order of its places in `token_ids`.
    """

    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]
    media: tuple[Media, ...] = ()

    @property
    def pictures(self) -> tuple[str, ...]:
        """References to the pictures, in order."""
        return tuple(item.uri for item in self.media)


class DrawnPrompt(Struct, frozen=True):
    """A row as it is sent to the policy, with the system instruction that was sampled for it, or None."""

    row: Row
    system: str | None
    prompt: Prompt


class VersionSpan(Struct, frozen=True, array_like=True):
    """Tokens [start, end) of a segment were sampled by this version of the policy."""

    policy_version: int
    start: int
    end: int


class Segment(Struct, frozen=True, omit_defaults=True):
    """Consecutive tokens after the prompt that have one origin: one turn of the policy, or what was put in between.

    token_ids: the very ids that the engine sampled, or the rendered ids of what the world said; text is never
        tokenized again.
    trained: whether the policy is trained on these tokens. Only sampled tokens can be.
    sampler_logprobs: float log-probability of each token under the distribution that it was sampled from; None for
        tokens that nobody sampled (a tool's result, a user's turn).
    versions: spans that cover a sampled segment exactly, in order; () for one that was not sampled.
    keeps: None for a segment that follows everything before it. A number begins a new branch of the rollout: of all
        tokens so far, the prompt's among them, the policy sees the first `keeps` and then this segment. So a
        conversation goes on whose chat template rewrites earlier turns.

    Example: a policy calls a tool, reads the result, and answers.

    >>> call = Segment((5, 6, 7), True, (-0.1, -0.2, -0.1), (VersionSpan(3, 0, 3),))
    >>> result = Segment((8, 9), False)
    >>> answer = Segment((10, 11), True, (-0.3, -0.1), (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)))
    """

    token_ids: tuple[int, ...]
    trained: bool
    sampler_logprobs: tuple[float, ...] | None = None
    versions: tuple[VersionSpan, ...] = ()
    keeps: int | None = None


class Branch(Struct, frozen=True):
    """One sequence of tokens that the policy saw, from the first token of the prompt to the end of a branch.

    segments: those of this branch, each with the place of its first token in `token_ids`. What the branch shares with
    the one before belongs to that one.
    """

    token_ids: tuple[int, ...]
    segments: tuple[tuple[int, Segment], ...]


def branches(prompt_ids: Sequence[int], segments: Iterable[Segment]) -> list[Branch]:
    """The branches of a rollout in order: one, if no segment says otherwise by `keeps`.

    Example: `branches((1, 2), [Segment((3, 4), True, ...), Segment((9,), False, keeps=3), Segment((5,), True, ...)])`
    has the token ids (1, 2, 3, 4) and (1, 2, 3, 9, 5).
    """
    ids, placed, found = list(prompt_ids), [], []
    for segment in segments:
        if segment.keeps is not None:
            if placed:
                found.append(Branch(tuple(ids), tuple(placed)))
            del ids[segment.keeps :]
            placed = []
        placed.append((len(ids), segment))
        ids += segment.token_ids
    return [*found, Branch(tuple(ids), tuple(placed))]


def num_sampled(segments: Sequence[Segment]) -> int:
    """How many tokens of the segments the policy sampled."""
    count = 0
    for segment in segments:  # asked several times for each rollout: a generator would take twice as long
        if segment.sampler_logprobs is not None:
            count += len(segment.token_ids)
    return count


class RewardResult(Struct, frozen=True):
    """The result of a reward function. value: the reward, a finite number. parts: named components of it, for the log.

    reason: a few words on why. Example: RewardResult(0.5, {"lowercase": 1.0, "max_words": 0.0}, "broken: max_words")
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


# What is counted in every episode, by the names that the counts have in `RewardResult.parts`.
EPISODE_COUNTS = ("turns", "tool_calls", "malformed_calls", "tool_failures")


def turn_part(number: int) -> str:
    """The name in `RewardResult.parts` of what an environment paid for the policy's turn, counted from 1."""
    return f"turn {number}"


class Outcome(StrEnum):
    """How the scoring of one rollout ended. All but the first leave it unscored, which is never a reward of 0."""

    SCORED = "scored"  # the reward function returned a number; whether the reply is right is not said here
    UNSCORABLE = "unscorable"  # the reward function hung on this rollout in every try, though others were scored
    TIMEOUT = "timeout"  # the reward function was not done by its deadline
    ERROR = "error"  # the reward function raised, or the judge's answer is no verdict
    INFRASTRUCTURE = "infrastructure"  # a process, an actor or a server was lost: scoring it again may succeed


class Scored(Struct, frozen=True):
    """The outcome of scoring one rollout. `result` is None when it could not be scored.

    reason: why it is unscored; a result has a reason of its own. wall_s: seconds that the scoring took.
    """

    result: RewardResult | None
    outcome: Outcome = Outcome.SCORED
    reason: str = ""
    wall_s: float = 0.0


class Rollout(Struct, frozen=True):
    """One answer of the policy to a prompt, of one segment or several.

    prompt_id: the row's id. group_id: the G rollouts of one prompt share it. index: place in the group, from 0.
    text: what the policy said, without special tokens; of several turns the last.
    system: the system instruction that was sampled for the prompt, or None.
    worker: name of the rollout worker; started_s, finished_s: Unix times.
    scored: the score that the rollout's environment gave it; None for a rollout without an environment.

    Example: `Rollout("p1", "g7", 0, prompt, (Segment((5, 6), True, (-0.1, -0.2), (VersionSpan(0, 0, 2),)),), "4",
    FinishReason.STOP)`.
    """

    prompt_id: str
    group_id: str
    index: int
    prompt: Prompt
    segments: tuple[Segment, ...]
    text: str
    finish_reason: FinishReason
    system: str | None = None
    worker: str = ""
    started_s: float = 0.0
    finished_s: float = 0.0
    scored: Scored | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.prompt.token_ids

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of all segments, one after the other. Of several branches they are no sequence: see `branches`."""
        if len(self.segments) == 1:
            return self.segments[0].token_ids
        return tuple(chain.from_iterable(segment.token_ids for segment in self.segments))

    @property
    def num_sampled(self) -> int:
        """How many tokens the policy sampled."""
        return num_sampled(self.segments)

    @property
    def versions(self) -> Iterator[int]:
        """Every policy version that sampled a part of it."""
        return (span.policy_version for segment in self.segments for span in segment.versions)

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version that sampled a part of it; None if nothing was sampled."""
        oldest = None
        for segment in self.segments:  # loops, as in `num_sampled`
            for span in segment.versions:
                if oldest is None or span.policy_version < oldest:
                    oldest = span.policy_version
        return oldest

    @property
    def branches(self) -> list[Branch]:
        """The sequences of tokens that the policy saw, in order; most rollouts have one."""
        return branches(self.prompt.token_ids, self.segments)
