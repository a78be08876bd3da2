"""The messages between a stage and its environment processes: typed records in MessagePack, as `scoring/pool/wire.py`.

stage ── EnvironmentSetup ──► process    loads the environments
      ◄── Loaded ────────────            or why it could not
      ── Begin ─────────────► process    one episode
      ◄── Ask ───────────────            what the world says, and the policy's turn is asked for
      ── Told | Full | Refused ► process what the policy said, that its context is full, or why it was not asked
      ◄── Saved ─────────────            a checkpoint of the environment
      ◄── Ended ─────────────            the reward, or why there is none
      ── Cancel ────────────► process    the episode is not wanted any more
"""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from posttrain.records import Message, Outcome, RewardResult, ToolCall


class BuiltinTool(Struct, frozen=True, tag="builtin"):
    """A group of built-in tools, such as files."""

    group: str


class FunctionTool(Struct, frozen=True, tag="function"):
    """A Python function as a tool. target: the fields of a `plugins.target.Target`."""

    name: str
    target: dict[str, Any]


class ServerTool(Struct, frozen=True, tag="server"):
    """The tools of an MCP server. command: starts it. names: of its tools. is_shared: one for all episodes of a
    process; else each episode has its own. start_s, call_s: seconds for its start, and for a call."""

    command: tuple[str, ...]
    env: Mapping[str, str] = {}
    names: tuple[str, ...] = ()
    is_shared: bool = False
    start_s: float = 30.0
    call_s: float = 30.0


ProvidedTool = BuiltinTool | FunctionTool | ServerTool


class LoadedEnvironment(Struct, frozen=True):
    """What a process loads. target: the fields of a `plugins.target.Target`. args: for the environment. tools: those
    that the session executes."""

    target: dict[str, Any]
    args: dict[str, Any]
    tools: tuple[ProvidedTool, ...] = ()


class EnvironmentSetup(Struct, frozen=True):
    """Tells a process what to load, by name. timeout_s: see `EnvironmentConfig`. notes: the path of the file in which
    the process notes whose code is running (`sampling.progress`). sandbox: the fields of `sandbox.run.Limits`."""

    environments: dict[str, LoadedEnvironment]
    timeout_s: float
    memory_gib: float | None
    notes: str
    sandbox: dict[str, Any] = {}


class Begin(Struct, frozen=True, tag="begin"):
    """Begins an episode under the stage's key. row: the fields of a `Row` as MessagePack has them.

    restored, turn, rewards: if the episode goes on from a checkpoint, its state, the turns that the policy had had, and
    what was paid for them.
    """

    key: int
    environment: str
    row: Any
    messages: tuple[Message, ...]
    tools: list[dict[str, Any]]
    seed: int
    tokens_left: int
    restored: Any = None
    turn: int = 0
    rewards: tuple[tuple[int, float], ...] = ()


class PolicyTurn(Struct, frozen=True):
    """One turn of the policy, as an environment gets it.

    text: without special tokens and without its calls. tool_calls: those that could be read. finish_reason: "stop", or
    "length" for a turn that met its limit of tokens. num_tokens: how many were sampled. num_read: how many tokens the
    policy had read before. tokens: the text and the log-probability of each token, if they were asked for.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    num_tokens: int = 0
    num_read: int = 0
    tokens: tuple[tuple[str, float], ...] = ()


class History(Struct, frozen=True):
    """All that the policy is to answer: a conversation and the tools that are shown with it, or a bare prompt.

    prompt: text, or token ids; None for a conversation.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str | tuple[int, ...] | None = None


class Told(Struct, frozen=True, tag="told"):
    """The answer to `Ask`. messages: what the conversation has gained since, the turn among them."""

    key: int
    turn: PolicyTurn
    messages: tuple[Message, ...]
    tokens_left: int


class Full(Struct, frozen=True, tag="full"):
    """The other answer to `Ask`: no token is left for another turn."""

    key: int


class Refused(Struct, frozen=True, tag="refused"):
    """The answer to an `Ask` after a history that cannot be shown to the policy. The episode may go on."""

    key: int
    why: str


class Cancel(Struct, frozen=True, tag="cancel"):
    """Ends an episode without an answer."""

    key: int


class Ask(Struct, frozen=True, tag="ask"):
    """Asks for a turn of the policy: after `added`, or after a `history`. For the other fields see `Session.sample`."""

    key: int
    added: tuple[Message, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    history: History | None = None
    with_tokens: bool = False


class Saved(Struct, frozen=True, tag="saved"):
    """A checkpoint: after the turns so far and `added`, the environment was in `state`. For the others see `Begin`."""

    key: int
    state: Any
    added: tuple[Message, ...] = ()
    turn: int = 0
    rewards: tuple[tuple[int, float], ...] = ()


class Ended(Struct, frozen=True, tag="ended"):
    """The end of an episode. rewards: (turn, value) of each call of `Session.reward`. result: their sum and the
    returned value; None if there is none, then `outcome` and `reason` say why, or the outcome is SCORED and the stage's
    `reward` is to score the rollout. is_full: the context was full."""

    key: int
    added: tuple[Message, ...] = ()
    rewards: tuple[tuple[int, float], ...] = ()
    result: RewardResult | None = None
    outcome: Outcome = Outcome.SCORED
    reason: str = ""
    is_full: bool = False
