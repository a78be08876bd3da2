"""Environments of the package verifiers as they are: its rows, its turns and its rubric.

    gateway.py ◄── OpenAI's client ◄── Environment.run_rollout ──► rubric ──► the reward

An environment is a function of a file that returns one (`my_env.py:load`), one of a module (`package.module:load`), or
the name of one that is installed, as `verifiers.load_environment` takes it. It runs in an interpreter that has the
package: `posttrain environments install verifiers`.
"""

import importlib
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.episodes.agents.gateway import running_gateway
from posttrain.episodes.session import ContextFullError, Session
from posttrain.errors import PluginError
from posttrain.records import RewardResult, Row
from posttrain.scoring.plugins.target import Target, import_target

REQUIRES = {"verifiers": ["verifiers"]}
# What `posttrain environments install verifiers` installs. Version 0.3 moves these environments to `legacy`, and 0.4
# has others only (`verifiers.v1`).
PACKAGES = ["verifiers==0.1.14", "starlette==1.10.0", "uvicorn==0.54.0"]
MODEL = "policy"


async def verifiers(session: Session, row: Row, *, max_calls: int = 100) -> RewardResult:
    """One rollout of the environment that made the row; its reward is the rubric's, and the parts are its metrics.

    max_calls: how often it may ask the policy.
    """
    from openai import AsyncOpenAI
    from verifiers.clients import OpenAIChatCompletionsClient  # pyright: ignore[reportMissingImports]

    made = row.fields["verifiers"]
    world = _world(made["load"], json.dumps(made["args"], sort_keys=True))
    gateway = await running_gateway()
    with gateway.episode(
        session, model=MODEL, max_calls=max_calls, own_temperature=False, takes_reward=False
    ) as episode:
        async with AsyncOpenAI(base_url=gateway.url, api_key=episode.key, max_retries=0) as client:
            told = await world.run_rollout(made["row"], OpenAIChatCompletionsClient(client), MODEL, {})
    if episode.is_full:
        raise ContextFullError("the context was full")
    if told.get("error"):
        raise PluginError(f"the environment ended with an error: {str(told['error'])[:500]}")
    metrics = {name: float(value) for name, value in (told.get("metrics") or {}).items() if value is not None}
    return RewardResult(float(told["reward"]), metrics)


def warm_up() -> None:
    """Import the package, which takes seconds, before the first episode has a deadline."""
    importlib.import_module("verifiers")


def write_rows() -> None:
    """Print rows as JSON lines. The job is read from stdin: dataset (which environment), size, seed, settings."""
    job = json.load(sys.stdin)
    lines, sys.stdout = sys.stdout, sys.stderr  # packages print too
    world = _world(job["dataset"], json.dumps(job["settings"], sort_keys=True))
    tools = [_schema(tool) for tool in world.tool_defs or ()]
    name = job["dataset"].rpartition("/")[2].partition(".py:")[0].rpartition(".")[2]
    for at, item in enumerate(world.get_dataset(n=job["size"], seed=job["seed"])):
        given = {"load": job["dataset"], "args": job["settings"], "row": item}
        answer = item.get("answer") or None
        line = {"id": f"{name}-{job['seed']}-{at}", "capability": name, "messages": item["prompt"], "answer": answer}
        print(json.dumps({**line, **({"tools": tools} if tools else {}), "verifiers": given}), file=lines)


def _schema(tool: Any) -> dict[str, Any]:
    """The schema of a tool as the environment's client sends it, so that a prompt begins as its first call."""
    strict = {} if tool.strict is None else {"strict": tool.strict}
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, **strict}
    return {"type": "function", "function": function}


@cache
def _world(load: str, args: str) -> Any:
    given: Mapping[str, Any] = json.loads(args)
    package: Any = importlib.import_module("verifiers")
    place, colon, function = load.rpartition(":")
    if not colon:
        return package.load_environment(load, **given)
    path = str(Path(place).resolve()) if place.endswith(".py") else None
    make: Any = import_target(Target(Path(place).stem if path else place, function, path), "environment")[1]
    world = make(**given)
    if not isinstance(world, package.Environment):
        raise PluginError(f"{load} returned a {type(world).__name__}; it must return a verifiers.Environment")
    return world
