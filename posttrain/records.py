"""The frozen records that the parts hand to each other: rows in, rollouts through, results out.

They are msgspec structs: checked when they are read from JSON or MessagePack, and cheap to send between processes.
Nothing here imports torch, and nothing is filled in later: each step makes a new record with
`msgspec.structs.replace`.
"""

from collections.abc import Mapping
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
    capability: what the row exercises (math, coding, ...); quotas, strata and results are by capability.
    messages: the conversation. A prompt ends with a user or tool turn; a supervised example with an assistant turn.
    answer: what a reward compares with, or None.
    fields: every other column of the row as it was read, for reward plug-ins.
    """

    id: str
    capability: str
    messages: tuple[Message, ...]
    answer: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)


class VersionSpan(Struct, frozen=True):
    """Tokens [start, end) of a reply were sampled by this version of the policy."""

    policy_version: int
    start: int
    end: int


class Rollout(Struct, frozen=True):
    """One sampled reply. The ids that the engine sampled are the ids trained on; text is never tokenized again.

    prompt_ids, token_ids: token ids of the prompt and of the reply (with its end-of-turn token, if it got there).
    sampler_logprobs: float log-probability of each reply token under the distribution it was sampled from.
    versions: spans that cover the reply exactly, in order.
    finish_reason: "stop" (ended its turn) or "length" (truncated).
    system: the system instruction that was sampled for the prompt, or None.
    worker: name of the rollout worker; started_s, finished_s: Unix times.
    """

    prompt_id: str
    group_id: str
    index: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    sampler_logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish_reason: str
    system: str | None = None
    worker: str = ""
    started_s: float = 0.0
    finished_s: float = 0.0


class RewardResult(Struct, frozen=True):
    """What a reward function found. `parts` are named components for the log; `reason` says why in a few words."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


class Scored(Struct, frozen=True):
    """The outcome of scoring one rollout. `result` is None when it could not be scored.

    outcome: scored (the reward function returned a number; whether the reply is right is not said here) | unparseable
    (scored 0), else unscored: timeout | error | infrastructure. reason: why it is unparseable or unscored; else the
    result has its own.
    """

    result: RewardResult | None
    outcome: str = "scored"
    reason: str = ""
    wall_s: float = 0.0
