"""Environments of verifiers from version 0.4 on as they are: their tasks, their agents, their tools and their rewards.

    gateway.py ◄── client of verifiers ◄── its interception server ◄── the agent's program ──► tools over MCP
                                                                             │
                                       rewards and metrics of the task ◄─────┘

An environment is a taskset: a file that offers one (`my_tasks.py`), or one that is installed, by its id. It runs in an
interpreter that has the package: `posttrain environments install verifiers_v1`. verifiers.py has those of before 0.4.

verifiers starts its chat program for each episode, in an interpreter that uv makes. Here the same program runs as a
task of this process. Left out: harnesses other than that one need what verifiers says of them (uv, containers).
"""

import asyncio
import importlib
import json
import os
import sys
import traceback
from argparse import Namespace
from contextlib import ExitStack
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from posttrain.episodes.agents.gateway import running_gateway
from posttrain.episodes.session import ContextFullError, Session
from posttrain.errors import PluginError
from posttrain.records import RewardResult, Row

REQUIRES = {"verifiers_v1": ["verifiers"]}
PACKAGES = ["verifiers==0.4.0", "starlette==1.10.0", "uvicorn==0.54.0"]
MODEL = "policy"
_CHAT = "posttrain_chat"  # the harness below, by its id


async def verifiers_v1(
    session: Session, row: Row, *, env: dict[str, Any] | None = None, max_calls: int = 100
) -> RewardResult:
    """One episode of the taskset that made the row; its reward is the task's, and the parts are rewards and metrics.

    env: the `[env]` block of verifiers besides the taskset, such as `{agent: {max_turns: 4}}`. max_calls: how often it
    may ask the policy. Of several agents those that are trained are paid for, with their mean.
    """
    vf: Any = importlib.import_module("verifiers.v1")
    made = row.fields["verifiers"]
    world = _world(made["load"], json.dumps(made["args"], sort_keys=True), json.dumps(env or {}, sort_keys=True))
    await _serving(world)
    gateway = await running_gateway()
    task = world.taskset.task_type()
    task = task(task.data_type().model_validate(made["row"]), world.config.taskset.task)
    client = vf.EvalClientConfig(base_url=gateway.url, api_key_var="POSTTRAIN_NO_KEY")
    with ExitStack() as stack:
        episode = stack.enter_context(
            gateway.episode(session, model=MODEL, max_calls=max_calls, own_temperature=False, takes_reward=False)
        )
        told = await world.run_episode(
            task,
            vf.ModelContext(model=MODEL, client=client),
            on_trace=lambda trace: gateway.alias(episode, trace.id),
        )
    if episode.is_full:
        raise ContextFullError("the context was full")
    if not told.ok:
        errors = [*told.errors, *(error for trace in told.traces for error in trace.errors)]
        raise PluginError(f"the environment ended with an error: {str(errors[-1].message if errors else '?')[:500]}")
    return _result(told.traces, gateway.url)


def _result(traces: list[Any], url: str) -> RewardResult:
    """The mean reward of the traces that are trained. Raises PluginError if another agent was the policy too."""
    for trace in traces:
        if not trace.agent.trainable and trace.agent.config.client.base_url == url:
            raise PluginError(
                f"the agent {trace.agent.name!r} is not to be trained, and is the policy; give it another model: "
                f"environment.args.env.{trace.agent.name}: {{model: ..., client: {{base_url: ...}}}}"
            )
    trained = [trace for trace in traces if trace.agent.trainable]
    if not trained:
        raise PluginError("the environment trains none of its agents")
    parts: dict[str, float] = {}
    for trace in trained:
        before = f"{trace.agent.name}/" if len(trained) > 1 else ""
        rewards = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        parts |= {f"{before}{name}": float(value) for name, value in {**metrics, **rewards}.items()}
    return RewardResult(fmean(trace.reward for trace in trained), parts)


def warm_up() -> None:
    """Import the package, which takes seconds, before the first episode has a deadline."""
    importlib.import_module("verifiers.v1")


def write_rows() -> None:
    """Print rows as JSON lines. The job is read from stdin: dataset (which taskset), size, seed, settings."""
    job = json.load(sys.stdin)
    lines, sys.stdout = sys.stdout, sys.stderr  # packages print too
    tasks = _world(job["dataset"], json.dumps(job["settings"], sort_keys=True), "{}").taskset
    tasks = (tasks.shuffle(job["seed"]) if tasks.bounded else tasks).take(job["size"])
    name = Path(job["dataset"]).stem
    for at, task in enumerate(tasks):
        given = {"load": job["dataset"], "args": job["settings"], "row": task.data.model_dump(mode="json")}
        answer = getattr(task.data, "answer", None)
        line = {"id": f"{name}-{job['seed']}-{at}", "capability": name, "messages": _messages(task.data)}
        print(json.dumps({**line, "answer": answer, "verifiers": given}), file=lines)


def _messages(data: Any) -> list[dict[str, Any]]:
    """What the policy reads first, as the chat program sends it. Raises PluginError for a task without a prompt."""
    if data.prompt is None:
        raise PluginError(f"task {data.idx} has no prompt; those that a user begins are not supported")
    wire = importlib.import_module("verifiers.v1.dialects.chat").message_to_wire
    said = [{"role": "user", "content": data.prompt}] if isinstance(data.prompt, str) else map(wire, data.prompt)
    return [*([{"role": "system", "content": data.system_prompt}] if data.system_prompt else []), *said]


# ---------------------------------------------------------------- what a process makes once


@cache
def _world(taskset: str, settings: str, env: str) -> Any:
    """The environment of a taskset, whose agents run here unless `env` says otherwise."""
    loaders: Any = importlib.import_module("verifiers.v1.utils.loaders")
    agents: Any = importlib.import_module("verifiers.v1.configs.agent")
    sys.modules.setdefault(_CHAT, _chat_harness())
    given: dict[str, Any] = json.loads(env)
    name = _imported(taskset)
    for role, field in loaders.env_config_type(name, given.get("id") or "").model_fields.items():
        if not isinstance(field.default, agents.AgentConfig):
            continue
        chosen = given.setdefault(role, {})
        if isinstance(field.default.runtime, agents.PrimeConfig):  # a paid service, where nothing else is named
            chosen.setdefault("runtime", {"type": "subprocess"})
        own = field.default.harness.id if field.default.harness is not None else loaders.default_harness_id(name)
        if own in ("bash", "null"):
            chosen.setdefault("harness", {"id": _CHAT})
    given["taskset"] = {"id": name, **json.loads(settings)}
    return loaders.load_environment(loaders.resolve_env_config(given))


def _imported(taskset: str) -> str:
    """The id of a taskset. The folder of one that is a file becomes importable."""
    if not taskset.endswith(".py"):
        return taskset
    path = Path(taskset).resolve()
    if not path.is_file():
        raise PluginError(f"{taskset}: there is no such file")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
        # A server of tools is a process that imports the file too.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), folder)))
    return path.stem


_held: dict[int, tuple[asyncio.Task[None], asyncio.Future[None]]] = {}  # by the id of a world, which is cached


async def _serving(world: Any) -> None:
    """Have the servers that the episodes of a world share run, until the process ends."""
    if id(world) not in _held or _held[id(world)][0].done():
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def hold() -> None:
            async with world.serving():
                ready.set_result(None)
                await asyncio.Event().wait()

        _held[id(world)] = asyncio.create_task(hold()), ready
    holding, ready = _held[id(world)]
    await asyncio.wait((holding, ready), return_when=asyncio.FIRST_COMPLETED)
    if holding.done():
        holding.result()


@cache
def _chat_harness() -> ModuleType:
    """A module with the chat harness of verifiers, whose program runs as a task of this process."""
    launch: Any = importlib.import_module("verifiers.v1.harnesses.utils.launch")
    null: Any = importlib.import_module("verifiers.v1.harnesses.null.harness")
    wire = importlib.import_module("verifiers.v1.dialects.chat").message_to_wire
    given: ContextVar[Namespace] = ContextVar("given")
    program: dict[str, Any] = {"__name__": "verifiers_chat"}
    exec(launch.CHAT_PROGRAM_SOURCE, program)
    program["parse_args"] = given.get

    class ChatHarness(null.NullHarness):
        async def setup(self, runtime: Any) -> None:
            """Nothing has to be installed."""

        async def launch(self, ctx: Any, trace: Any, runtime: Any, *given_by_place: Any, **given_by_name: Any) -> Any:
            endpoint, secret, mcp_urls, data = given_by_place
            tool_interception_url = given_by_name.get("tool_interception_url")
            system, prompt = self.resolve_prompt(data)
            path = ""
            if prompt is not None and not isinstance(prompt, str):
                path = str(Path(runtime.workdir) / f"messages-{trace.id}.json")
                Path(path).write_text(json.dumps([wire(message) for message in prompt]), encoding="utf-8")
            servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
            given.set(
                Namespace(
                    base_url=endpoint, api_key=secret, model=ctx.model, system_prompt=system or "",
                    prompt=prompt if isinstance(prompt, str) else "", initial_messages_file=path,
                    mcp_config=json.dumps({"mcpServers": servers}) if servers else "",
                    tool_interception_url=tool_interception_url or "", bash=False, compaction=False,
                    summarize_at_tokens=None, edit=False, search=False, serper_key="",
                )
            )  # fmt: skip
            code, problem = 0, ""
            try:
                await program["main"]()
            except SystemExit as error:
                code = int(error.code or 0)
            except Exception:
                code, problem = 1, traceback.format_exc()
            return launch.ProgramResult(exit_code=code, stdout="", stderr=problem)

    module = ModuleType(_CHAT)
    module.__dict__.update(ChatHarness=ChatHarness, __all__=["ChatHarness"])
    return module
