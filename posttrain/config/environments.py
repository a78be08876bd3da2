"""Sections about environment plug-ins, which talk with the policy over several turns and give the reward."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.fields import PathText, Positive

OF_ENVIRONMENT = "posttrain.rewards.environment:of_environment"  # named where no row needs another reward
AGENT = "posttrain.episodes.agents.environment:agent"  # what `command` is short for
_AGENT_NAMES = ("agent", AGENT)
AGENTS_AT_ONCE = 16
WHOLE = ""  # the name under which the environment of all rows is known


def _leaves_reward(name: str, args: Any) -> bool:
    """Whether an environment leaves the reward to the stage's `reward`."""
    return name in _AGENT_NAMES and isinstance(args, dict) and args.get("scored_by") == "reward"


def _with_command(data: Any) -> Any:
    """The keys of an environment, with `command` as the argument of the built-in environment `agent`."""
    if not isinstance(data, dict) or data.get("command") is None:
        return data
    args = data.get("args") or {}
    if data.get("name") not in (None, *_AGENT_NAMES):
        raise ValueError(f"has both name ({data['name']}) and command, which is short for the name agent; give one")
    if data.get("python") is not None:
        raise ValueError("has both python and command; a command begins with its interpreter: [PYTHON, my_agent.py]")
    if not isinstance(args, dict):
        return data
    return {**data, "name": AGENT, "args": {**args, "command": data["command"]}, "command": None}


_COMMAND = (
    "A program to run for each episode, such as [python, my_agent.py]: an agent that talks with the policy through the "
    "client of OpenAI. Short for `name: agent` with `args.command`; its other arguments are in args."
)


class EnvironmentFunctionConfig(Config):
    """An environment plug-in. Example: `{name: calculator, args: {max_turns: 4}}`."""

    command: list[str] | None = Field(default=None, description=_COMMAND)

    name: str = Field(
        description="Which async function: a registered name (`posttrain environments list`), package.module:function, "
        "or path/to/file.py:function."
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments that the function is called with."
    )
    python: PathText | None = Field(
        default=None,
        description="Another interpreter, in which the environment runs with packages of its own, such as "
        ".venv-other/bin/python (`posttrain environments install`). null: this one.",
    )
    tools: list[str | dict[str, Any]] | None = Field(
        default=None,
        description="The tools that the policy may call: python or files, which are built in; functions, as "
        "path/to/file.py:function; MCP servers, as {mcp: {command: [...]}}; or schemas in OpenAI's form. null: those "
        "that the environment's file declares as TOOLS. The column `tools` of a row takes their place.",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_command(cls, data: Any) -> Any:
        return _with_command(data)


class SandboxConfig(Config):
    """What a call of the built-in tools may use. Each episode has a sandbox of its own."""

    wall_s: Positive = Field(default=5.0, description="Seconds that a call may take.")
    cpu_s: Annotated[int, Field(ge=1)] = Field(default=5, description="Seconds of computing of one process.")
    memory_mib: Annotated[int, Field(ge=64)] = Field(default=512, description="Address space of one process.")
    num_processes: Annotated[int, Field(ge=4)] = Field(default=16, description="Processes at a time.")
    disk_mib: Annotated[int, Field(ge=1)] = Field(default=32, description="All files of the episode together.")
    output_bytes: Annotated[int, Field(ge=1000)] = Field(
        default=1 << 20,
        description="What a program may print before it is stopped. The policy reads at most 8,000 characters of it.",
    )


class McpServerConfig(Config):
    """An MCP server over stdio. Example: `{command: [python, server.py], env: {STORE: store.db}}`."""

    command: Annotated[list[str], Field(min_length=1)] = Field(description="The program and its arguments.")
    env: dict[str, str] = Field(
        default_factory=dict, description="Variables of its environment, besides PATH, HOME, LOGNAME, SHELL and USER."
    )
    shared: bool = Field(
        default=False,
        description="Whether all episodes of an environment process share one server. false: each episode has its own.",
    )
    start_s: Positive = Field(default=30.0, description="Seconds until it must have told its tools.")
    call_s: Positive = Field(default=30.0, description="Seconds that a call may take. Then the server is ended.")


class EnvironmentConfig(Config):
    """What rows are episodes of which environment. Example: `{name: calculator}`, or
    `{by_capability: {tools: {name: calculator}}}`, which leaves all other rows to the reward."""

    name: str | None = Field(default=None, description="The environment of every row; see by_capability for some.")
    command: list[str] | None = Field(default=None, description=_COMMAND)
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments that the function `name` is called with."
    )
    python: PathText | None = Field(default=None, description="The interpreter of `name`; see by_capability.python.")
    tools: list[str | dict[str, Any]] | None = Field(
        default=None, description="The tools of `name`; see by_capability.tools."
    )
    by_capability: dict[str, EnvironmentFunctionConfig] = Field(
        default_factory=dict,
        description="The environment of each capability. Rows of other capabilities have one turn and the reward.",
    )
    tool_parser: str | None = Field(
        default=None,
        description="Which of vLLM's parsers reads the policy's calls (hermes, llama4_pythonic, llama4_json, mistral, "
        "...). null: the one that goes with the chat template.",
    )
    workers: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Number of environment processes. Each runs many episodes at once."
    )
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig, description="Limits of the tools python and files.")
    at_once: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="How many episodes run at the same time; others wait for a place. null: any number, and "
        f"{AGENTS_AT_ONCE} if one of the environments is a command, because each of its episodes is a process.",
    )
    timeout_s: Positive = Field(
        default=60.0,
        description="Seconds that an environment may take from one turn of the policy to the next. After that the "
        "episode is tried once more, and is then unscored.",
    )
    max_malformed: Annotated[int, Field(ge=0)] = Field(
        default=2,
        description="How often in a row a call that cannot be read is answered with an error, for the policy to try "
        "again, before the environment gets the turn as text.",
    )

    @property
    def functions(self) -> dict[str, EnvironmentFunctionConfig]:
        """The environments by capability; that of all rows has the name WHOLE."""
        if self.name is None:
            return dict(self.by_capability)
        return {WHOLE: EnvironmentFunctionConfig(name=self.name, args=self.args, tools=self.tools, python=self.python)}

    def key_of(self, capability: str) -> str | None:
        """The key in `functions` of the environment of rows with a capability; None if they have none."""
        if self.name is not None:
            return WHOLE
        return capability if capability in self.by_capability else None

    @property
    def limit(self) -> int | None:
        """How many episodes run at the same time; None if any number may."""
        is_agent = any(item.name in _AGENT_NAMES for item in self.functions.values())
        return self.at_once or (AGENTS_AT_ONCE if is_agent else None)

    def gives_reward(self, capability: str) -> bool:
        """Whether the reward of rows with a capability is given by an environment, and not by the stage's `reward`."""
        key = self.key_of(capability)
        return key is not None and not _leaves_reward(self.functions[key].name, self.functions[key].args)

    @model_validator(mode="before")
    @classmethod
    def _of_command(cls, data: Any) -> Any:
        return _with_command(data)

    @model_validator(mode="after")
    def _one_form(self) -> "EnvironmentConfig":
        if (self.name is None) == (not self.by_capability):
            raise ValueError(
                f"has {'neither' if self.name is None else 'both'} name {'nor' if self.name is None else 'and'} "
                "by_capability; give one: name is the environment of every row, by_capability that of some"
            )
        if self.name is None and (self.args or self.tools is not None or self.python is not None):
            raise ValueError("args, tools and python go with name; under by_capability each environment has its own")
        return self


def with_reward(data: Any) -> Any:
    """The keys of a stage. Where its environment is that of every row, the name of the reward need not be given."""
    environment: Any = data.get("environment") if isinstance(data, dict) else None
    reward = data.get("reward") or {} if isinstance(data, dict) else None
    if isinstance(environment, EnvironmentConfig):
        environment = environment.model_dump()
    if not isinstance(environment, dict):
        return data
    whole = AGENT if environment.get("command") else environment.get("name")
    if (
        whole
        and not _leaves_reward(whole, environment.get("args"))
        and isinstance(reward, dict)
        and "name" not in reward
    ):
        return {**data, "reward": {**reward, "name": OF_ENVIRONMENT}}
    return data
