"""Measure episodes of several turns: the machinery of sessions alone, their cost in tokens, and the gateway of agents.

  python benchmarks/rl_turns.py [--json FILE] [--only NAME[,NAME]] [--seed N]

session_turns_per_s   turns a second through a real environment process, conversation and session, with an engine that
                      answers at once; 64 episodes of 8 turns at a time
turns8_vs_single      policy tokens a second of 8-turn episodes / of single turns, with one engine, as many sampled
                      tokens, prompts that all differ, and in both twice as many rollouts at a time as the engine has
                      places for
gateway_vs_server     seconds of a call of an agent to the gateway / to vLLM's own server, which run the same model
                      (50m) with the same settings. The agent makes its calls one after the other
tool_latency_cost     the share of its tokens a second that the trainer of a whole RL stage loses where the tool of an
                      episode takes 0 to 2 s (lognormal, median 0.5 s), at a staleness of 4. Pairs of stages, one with
                      the tool and one with a tool that answers at once, because stages that are alike differ by up to
                      9%; the figure is the mean of the pairs, with its interval. A turn has 8 to 40 tokens: if all had
                      as many, replies would begin and end together only where the tool answers at once
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measure import Entry, main
from recipe_table import interval
from rl_models import save, start_engine

from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.base import validate_config
from posttrain.config.engines import EngineConfig
from posttrain.config.environments import EnvironmentConfig
from posttrain.context import BusyLog, StageContext
from posttrain.data.chat import render_prompt
from posttrain.data.ends import end_token_ids
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.files import read_jsonl, write_jsonl
from posttrain.pipeline.ray_session import ray_session
from posttrain.records import DrawnPrompt, FinishReason, Message, Prompt, Row, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.sampling.rollouter import Flight, Rollouter, SingleTurn
from posttrain.sampling.running import RunningRollouters
from posttrain.sampling.turns import Turn
from posttrain.sampling.workers import RolloutWorkers
from posttrain.serving.server import ServeConfig, serving

LIBRARIES = ("torch", "transformers", packages_distributions()["vllm"][0], "ray")
TURNS, TOKENS, EPISODES, ROUNDS = 8, 24, 64, 3
CALLS, CALL_TOKENS = 12, 48
LENGTH = 1024
ENGINE = EngineConfig(max_model_len=LENGTH, kv_cache_gib=1.0, max_num_seqs=64, stream_interval=64)
STALENESS, STEPS = 4, 12  # of the stages with a tool
PAIRS = 6  # of such stages, one with the tool and one without
WARM = STALENESS + 2  # what was sampled before the first step is trained on by then

WORLD = """
import asyncio, math, random

async def talk(session, row, turns):
    for _ in range(turns - 1):
        await session.sample()
        await session.add("user", "Go on.")
    await session.sample()
    return 1.0

async def with_tool(session, row, is_slow):
    drawn = random.Random(session.seed)
    await session.sample(max_tokens=drawn.randint(8, 40))
    seconds = min(2.0, drawn.lognormvariate(math.log(0.5), 1.0))
    await asyncio.sleep(seconds if is_slow else 0.0)
    await session.add("user", "Go on.")
    await session.sample(max_tokens=drawn.randint(8, 40))
    return session.seed % 2
"""
# Calls of one message each, so that both servers read and sample as much; the first one is left out.
AGENT = """
import json, os, sys, time
from openai import OpenAI
calls, tokens = map(int, sys.argv[1:])
client, times = OpenAI(), []
for number in range(calls + 1):
    began = time.perf_counter()
    client.chat.completions.create(model=os.environ["OPENAI_MODEL"], max_tokens=tokens, temperature=1.0,
                                   messages=[{"role": "user", "content": f"{number} + 1 ="}])
    times.append(time.perf_counter() - began)
print(json.dumps({"reward": sum(times[1:]) / calls}))
"""


def flights(tokenizer: Any, first: int, count: int, *, max_tokens: int, ends: tuple[int, ...]) -> list[Flight]:
    """Groups of one rollout each. No two have the same prompt, which the engine would have to read only once."""
    made = []
    for order in range(first, first + count):
        row = Row(f"p{order}", "sums", (Message("user", f"{order} + 1 ="),))
        ids = tuple(render_prompt(tokenizer, row.messages))
        request = SampleRequest(ids, max_tokens=max_tokens, stop_token_ids=ends)
        made.append(Flight(order, 0, DrawnPrompt(row, None, Prompt(row.messages, ids)), request))
    return made


# ---------------------------------------------------------------- an engine that answers at once


def session_turns_per_s() -> tuple[float, dict[str, Any]]:
    tokenizer = build_tokenizer()
    said = tuple(tokenizer.encode(" 4" * TOKENS, add_special_tokens=False))[: TOKENS - 1]
    ids = (*said, end_token_ids(tokenizer)[0])
    spans = (VersionSpan(0, 0, len(ids)),)
    answer = Completion(ids, tokenizer.decode(said), (-0.5,) * len(ids), FinishReason.STOP, spans)

    async def one_round(rollouter: Rollouter) -> None:
        done, left = asyncio.Event(), EPISODES

        def asked(turns: list[Turn]) -> None:
            for turn in turns:
                turn.finish(answer, 0.0)
                running.can_go_on(turn.session)

        def finished(flight: Flight) -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set()

        running = RunningRollouters(rollouter, asked=asked, finished=finished)
        for flight in flights(tokenizer, 0, EPISODES, max_tokens=TOKENS, ends=(ids[-1],)):
            running.start(flight)
        await done.wait()

    async def rounds(folder: Path) -> tuple[list[float], list[float]]:
        config = EnvironmentConfig(name=f"{folder}/world.py:talk", args={"turns": TURNS})
        rates, micros = [], []
        async with EnvironmentRollouter(config, tokenizer, length=LENGTH, seed=0) as rollouter:
            for _ in range(1 + ROUNDS):
                began, cpu = time.perf_counter(), time.process_time()
                await one_round(rollouter)
                rates.append(EPISODES * TURNS / (time.perf_counter() - began))
                micros.append(1e6 * (time.process_time() - cpu) / (EPISODES * TURNS))
        return rates[1:], micros[1:]

    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "world.py").write_text(WORLD)
        rates, micros = asyncio.run(rounds(Path(scratch)))
    return statistics.median(rates), {"rates": rates, "processor_us_per_turn": statistics.median(micros)}


# ---------------------------------------------------------------- with an engine


class Sampler:
    """One engine, and the groups that are sampled on it."""

    def __init__(self, actor: Any, folder: Path):
        self._context = StageContext("rl", folder, folder / "events.jsonl")
        log = BusyLog(self._context, "ours", "generate")
        self._engines: Any = SimpleNamespace(
            names=["ours"], seats=[0], actors=[actor], logs={"ours": log}, places=[None], is_ready=lambda seat: True
        )
        self._next = 0

    async def sampled(self, rollouter: Rollouter, made: Callable[[int], list[Flight]]) -> tuple[list[Flight], float]:
        """The finished groups, and the seconds that they took. made: the groups, from an order on."""
        done, asked = asyncio.Event(), made(self._next)
        self._next += len(asked)
        left = len(asked)

        def finished(flight: Flight) -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set()

        workers = RolloutWorkers(self._context, self._engines, deadline_s=60.0, finished=finished, rollouter=rollouter)
        running = asyncio.ensure_future(workers.run())
        began = time.perf_counter()
        for flight in asked:
            workers.send(flight)
        waiting = asyncio.ensure_future(done.wait())
        await asyncio.wait({waiting, running}, return_when=asyncio.FIRST_COMPLETED)
        took = time.perf_counter() - began
        if running.done():
            running.result()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return asked, took


def with_engine(size: str, measure: Callable[[Sampler, Path, Path], Coroutine[Any, Any, Any]]) -> Any:
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = Path(scratch)
        (folder / "world.py").write_text(WORLD)
        (folder / "agent.py").write_text(AGENT)
        sampler = Sampler(start_engine("ours", save(size, folder / "model"), ENGINE), folder)
        return asyncio.run(measure(sampler, folder, folder / "model"))


def turns8_vs_single() -> tuple[float, dict[str, Any]]:
    async def measure(sampler: Sampler, folder: Path, model: Path) -> tuple[float, dict[str, Any]]:
        tokenizer = build_tokenizer()
        rates: dict[str, list[float]] = {"turns8": [], "single": []}
        config = EnvironmentConfig(name=f"{folder}/world.py:talk", args={"turns": TURNS})
        together = 2 * ENGINE.max_num_seqs
        async with EnvironmentRollouter(config, tokenizer, length=LENGTH, seed=0) as rollouter:
            for _ in range(1 + ROUNDS):
                for name, kind, count in (("turns8", rollouter, together), ("single", SingleTurn(), together * TURNS)):
                    made = lambda first, count=count: flights(tokenizer, first, count, max_tokens=TOKENS, ends=())  # noqa: E731
                    groups, took = await sampler.sampled(kind, made)
                    rates[name].append(sum(group.rollouts[0].num_sampled for group in groups) / took)
        ratio = statistics.median(a / b for a, b in zip(rates["turns8"][1:], rates["single"][1:], strict=True))
        return ratio, {f"{name}_tokens_per_s": statistics.median(values[1:]) for name, values in rates.items()}

    return with_engine("1m", measure)


def gateway_vs_server() -> tuple[float, dict[str, Any]]:
    async def measure(sampler: Sampler, folder: Path, model: Path) -> tuple[float, dict[str, Any]]:
        tokenizer = build_tokenizer()
        agent = [sys.executable, str(folder / "agent.py"), str(CALLS), str(CALL_TOKENS)]
        config = EnvironmentConfig.model_validate({"command": agent, "timeout_s": 300.0})
        seconds: dict[str, list[float]] = {"gateway": [], "server": []}
        settings = ServeConfig(dtype="float32", engine=ENGINE.model_copy(update={"stream_interval": 1}))
        with serving(model, settings, host="127.0.0.1", port=0, name="policy") as server:
            given = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "none", "OPENAI_MODEL": "policy"}
            async with EnvironmentRollouter(config, tokenizer, length=LENGTH, seed=0) as rollouter:
                for _ in range(1 + ROUNDS):
                    made = lambda first: flights(tokenizer, first, 1, max_tokens=CALL_TOKENS, ends=())  # noqa: E731
                    ((group,), _) = await sampler.sampled(rollouter, made)
                    scored = group.rollouts[0].scored
                    assert scored is not None
                    assert scored.result is not None, scored.reason
                    seconds["gateway"].append(scored.result.value)
                    answer = subprocess.run(agent, env=given, capture_output=True, text=True, check=True).stdout
                    seconds["server"].append(json.loads(answer.splitlines()[-1])["reward"])
        ratio = statistics.median(a / b for a, b in zip(seconds["gateway"][1:], seconds["server"][1:], strict=True))
        return ratio, {f"{name}_ms": 1000 * statistics.median(values[1:]) for name, values in seconds.items()}

    return with_engine("50m", measure)


# ---------------------------------------------------------------- a whole stage


def tool_latency_cost() -> tuple[float, dict[str, Any]]:
    rates: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = Path(scratch)
        (folder / "world.py").write_text(WORLD)
        model = save("1m", folder / "model").path
        rows = [{"id": f"r{at}", "messages": [{"role": "user", "content": f"{at} + 1 ="}]} for at in range(64)]
        write_jsonl(folder / "prompts.jsonl", rows)
        for number, is_slow in enumerate((False, True, True, False) * (PAIRS // 2)):
            rates[is_slow].append(_trained_per_s(folder / f"{number}", model, f"{folder}/world.py", is_slow=is_slow))
    costs = [1 - slow / fast for slow, fast in zip(rates[True], rates[False], strict=True)]
    return statistics.fmean(costs), {
        "interval": interval(costs),
        "with_tool_tokens_per_s": rates[True],
        "at_once_tokens_per_s": rates[False],
    }


def _trained_per_s(folder: Path, model: str, world: str, *, is_slow: bool) -> float:
    """Sampled tokens that the stage trains on a second, after its first steps."""
    from posttrain.rl.stage import run

    folder.mkdir()
    data = {
        "model": {"path": model, "dtype": "float32"}, "prompts": {"path": str(folder.parent / "prompts.jsonl")},
        "environment": {"name": f"{world}:with_tool", "args": {"is_slow": is_slow}},
        "steps": WARM + STEPS, "groups_per_step": 16, "group_size": 8, "max_staleness": STALENESS,
        "sampling": {"max_tokens": 40}, "optimizer": {"learning_rate": 1e-6}, "checkpoint_every": WARM + STEPS,
        "engine": {"max_model_len": 512, "kv_cache_gib": 0.5},
        "resources": {"rollout": {"cpus": 0.9}, "trainer": {"cpus": 0.9}},
    }  # fmt: skip
    run(validate_config(RlConfig, data, "benchmark"), StageContext("rl", folder, folder / "events.jsonl", 0, True))
    steps = list(read_jsonl(folder / "metrics.jsonl"))[WARM:]
    return sum(step["tokens_trained"] for step in steps) / sum(step["step_wall_s"] for step in steps)


def entries() -> dict[str, Entry]:
    return {
        "session_turns_per_s": Entry(session_turns_per_s, ">= 1000"),
        "turns8_vs_single": Entry(turns8_vs_single, ">= 0.85"),
        "gateway_vs_server": Entry(gateway_vs_server, "<= 1.15"),
        "tool_latency_cost": Entry(tool_latency_cost, "< 0.1"),
    }


if __name__ == "__main__":
    main(__doc__, entries(), LIBRARIES)
