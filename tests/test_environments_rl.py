"""RL with episodes of several turns: a real engine, trainer, environment processes and agents, some of them killed."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import psutil
import pytest
from gone import is_gone
from test_rl import kill_when, make_config, rows_of, run_stage, start_run
from tiny_policy import ENGINE

from posttrain.context import StageContext
from posttrain.files import read_jsonl
from posttrain.model.tokenizer import load_tokenizer
from posttrain.records import DrawnPrompt, Message, Prompt, Row
from posttrain.reward_tools.episode import checked_episode, episode_config, row_of, try_episode
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.history.recorded import read_rollouts
from posttrain.rl.history.replay import replay, weight_gaps
from posttrain.rl.loop.dispatch import Dispatch
from posttrain.rl.records import Admission

WORLD = '''
import asyncio, pathlib

async def two_turns(session, row):
    """Says how long the first turn was, and pays for the second. One episode waits until its process is dead."""
    first = await session.sample(max_tokens=12)
    marker = pathlib.Path(__file__).with_suffix(".pid")
    if session.turn == 1 and row.id == "game-3":
        if not marker.exists():
            import os
            marker.write_text(str(os.getpid()))
            await asyncio.sleep(1000)
    elif row.id.startswith("game-"):
        await slow_tool(str(session.seed))
    await session.add("user", f"{first.num_tokens} tokens. Again!")
    session.reward(0.001 * (session.seed % 997))
    second = await session.sample(stop="e")
    return len(set(second.text)) / 50

async def slow_tool(seed):
    """Of the first episode that has had a turn it takes two optimizer steps."""
    slow, steps = pathlib.Path(__file__).with_suffix(".slow"), pathlib.Path(__file__).with_name("rl") / "metrics.jsonl"
    if not slow.exists():
        slow.write_text(seed)
    while slow.read_text() == seed and not (steps.exists() and steps.read_text().count("\\n") >= 2):
        await asyncio.sleep(0.05)
'''


def heard_turns(monkeypatch) -> dict[tuple[str, int], list[tuple[int, ...]]]:
    """The token ids of every turn as the engine delivered them, by group and place in it."""
    from posttrain.sampling.turns import Turn

    sampled: dict[tuple[str, int], list[tuple[int, ...]]] = defaultdict(list)
    finish = Turn.finish

    def seen(turn, completion, now):
        sampled[f"g{turn.flight.order}", turn.session.index].append(completion.token_ids)
        finish(turn, completion, now)

    monkeypatch.setattr(Turn, "finish", seen)
    return sampled


def assert_clean_and_replayed(config, tmp_path):
    """The audit of the run in `rl` finds nothing, and a replay gives the same batches and weights."""
    audit = audit_stage(tmp_path / "rl")
    assert audit.is_clean, audit.problems
    again = tmp_path / "again"
    again.mkdir()
    found = replay(config, StageContext("rl", again, again / "events.jsonl", seed=3), tmp_path / "rl")
    assert found["batches_equal"]
    assert found["weights_equal"], found


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_episodes_and_replies_in_one_pool_are_trained_on_as_they_were_sampled(ranks, tiny_model, tmp_path, monkeypatch):
    """Half of each batch are episodes. Their process is killed in mid-episode; nothing is lost, and the run replays.
    The tool of one episode waits for two steps, which do not wait for it."""
    (tmp_path / "world.py").write_text(WORLD)
    sampled = heard_turns(monkeypatch)
    killed: list[int] = []
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row | {"id": f"held-{row['id']}"}) + "\n" for row in rows_of(["game"], n=3)))

    def kill() -> None:
        marker = tmp_path / "world.pid"
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.05)
        os.kill(int(marker.read_text()), signal.SIGKILL)
        killed.append(int(marker.read_text()))

    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["math", "game"], n=6),
        environment={"by_capability": {"game": {"name": f"{tmp_path}/world.py:two_turns"}}, "timeout_s": 400.0},
        mixture={"math": 1, "game": 1},
        advantage_per="turn",
        evaluation={"data": {"path": str(held_out)}, "every": 3},
    )
    threading.Thread(target=kill, daemon=True).start()
    outputs, _ = run_stage(config, tmp_path / "rl")
    assert killed
    assert is_gone(killed[0])
    assert outputs["steps"] == 6
    episodes = [item for item in read_rollouts(tmp_path / "rl") if item.capability == "game"]
    trained = [item for item in episodes if item.status == "trained"]
    assert len(trained) == 6 * 2 * 4  # two groups of four rollouts in each step
    for item in trained:
        first, said, second = item.rollout.segments
        assert [segment.trained for segment in item.rollout.segments] == [True, False, True]
        turns = sampled[item.rollout.group_id, item.rollout.index]
        assert [first.token_ids, second.token_ids] == turns[-2:]  # the very ids of the engine
        assert said.sampler_logprobs is None
        assert 0 <= item.staleness <= config.max_staleness
        versions = [span.policy_version for one in (first, second) for span in one.versions]
        assert item.staleness == item.step - min(versions)
        assert (len(item.turn_advantages), item.turn_advantages[0]) == (2, item.advantage)
    assert any(  # the one with the slow tool
        item.rollout.segments[0].versions[-1].policy_version < item.rollout.segments[2].versions[0].policy_version
        for item in trained
    )
    assert all(item.reward is not None for item in episodes)
    assert all(0 < item.parts["turn 1"] < 1 and item.parts["turns"] == 2 for item in trained)
    told = [line for line in read_jsonl(tmp_path / "rl" / "metrics.jsonl") if "episodes" in line]
    assert sum(line["episodes"] for line in told) >= len(trained)  # each counts in the step after its end
    for line in told:
        assert (line["episode/turns"], line["episode/tool_calls"]) == (2, 0)
        assert line["episode/tokens"] > 2 * 12
    assert max(line["episode/cached"] for line in told if "episode/cached" in line) > 0
    evaluations = list(read_jsonl(tmp_path / "rl" / "evaluations.jsonl"))
    assert evaluations  # on a busy machine the second may not have ended before the training has
    for line in evaluations:
        assert (line["capabilities"]["game"]["n"], line["capabilities"]["game"]["unscored"]) == (3, 0), line
    assert_clean_and_replayed(config, tmp_path)


@pytest.mark.parametrize(("environment", "groups"), [(None, 2), ({"name": "posttrain.environments.store:store"}, 0)])
def test_the_first_step_waits_for_groups_but_for_no_episode(tmp_path, tiny_model, environment, groups):
    config = make_config(tmp_path, tiny_model, rows_of(["math"]), environment=environment)
    row = Row("r", "math", (Message("user", "?"),))
    prompt = DrawnPrompt(row, None, Prompt(row.messages, (1, 2, 3)))
    orders, sent = itertools.count(), []
    book = SimpleNamespace(
        room=lambda version: 8, begins_with=lambda name: None, admit=lambda version: Admission(next(orders), 0, prompt)
    )
    workers = SimpleNamespace(workers=[SimpleNamespace(name="e")], oldest_version=0, send=sent.append)
    dispatch = Dispatch(
        config, book, workers, side=None, steps=None, stop_ids=(0,), changed=asyncio.Event(), is_early=True
    )
    assert dispatch.open() == list(range(groups)) == [flight.order for flight in sent]


ENDLESS = '''
import asyncio, pathlib

async def endless(session, row):
    """The first episode that has had a turn waits until it is given up."""
    first = await session.sample(max_tokens=8)
    waits, ended = (pathlib.Path(__file__).with_suffix(suffix) for suffix in (".waits", ".ended"))
    if not waits.exists():
        waits.write_text(str(session.seed))
        try:
            await asyncio.Event().wait()
        finally:
            ended.touch()
    await session.add("user", "Again!")
    second = await session.sample(max_tokens=8)
    return len(set(first.text + second.text)) / 50 + 0.001 * (session.seed % 97) / 97
'''


@pytest.mark.slow
def test_an_episode_over_the_bound_is_given_up_with_its_group_and_counted(ranks, tiny_model, tmp_path):
    (tmp_path / "world.py").write_text(ENDLESS)
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["game"], n=8),
        environment={"name": f"{tmp_path}/world.py:endless", "timeout_s": 400.0},
        groups_per_step=2,
        sampling={"max_tokens": 8},
        max_staleness=1,
        staleness="drop",
    )
    _, metrics = run_stage(config, tmp_path / "rl")
    assert (tmp_path / "world.ended").exists()
    assert max(line["staleness_max"] for line in metrics) <= 1
    with_stale = [line for line in metrics if line["groups_dropped_stale"]]
    assert with_stale
    assert sum(line["tokens_dropped"] for line in with_stale) > 0
    audit = audit_stage(tmp_path / "rl")
    assert audit.is_clean, audit.problems
    assert audit.totals["dropped:stale"] >= sum(line["groups_dropped_stale"] for line in with_stale)


BLOCKED = '''
import asyncio, pathlib

here = pathlib.Path(__file__).parent

def note(word, session):
    with open(here / "told", "a") as file: file.write(f"{word} {session.seed}\\n")

async def blocked(session, row):
    """From the third step on the first episode that has had a turn waits until the run has been killed."""
    note("begins", session)
    first = await session.sample(max_tokens=8)
    steps, which = here / "rl" / "metrics.jsonl", here / "blocked"
    if steps.exists() and steps.read_text().count("\\n") >= 2 and not which.exists():
        which.write_text(str(session.seed))
    while which.exists() and which.read_text() == str(session.seed) and not (here / "go").exists():
        await asyncio.sleep(0.05)
    await session.add("user", "Again!")
    second = await session.sample(max_tokens=8)
    note("ends", session)
    return len(set(first.text + second.text)) / 50 + 0.001 * (session.seed % 97) / 97
'''


@pytest.mark.slow
@pytest.mark.full  # two starts of a stage
@pytest.mark.timeout(500)
def test_an_episode_in_flight_begins_anew_after_a_crash_of_the_run_and_counts_once(ranks, tiny_model, tmp_path):
    (tmp_path / "world.py").write_text(BLOCKED)
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["game"], n=8),
        environment={"name": f"{tmp_path}/world.py:blocked", "timeout_s": 400.0},
        steps=8,
        groups_per_step=2,
        checkpoint_every=2,
        sampling={"max_tokens": 8},
    )
    folder = tmp_path / "rl"
    child = start_run(config, folder)
    kill_when(
        child,
        lambda: (tmp_path / "blocked").exists() and list((folder / "checkpoints").glob("step_[0-9]*/ledger.sqlite")),
    )
    told = (tmp_path / "told").read_text().split("\n")
    seed = (tmp_path / "blocked").read_text()
    assert (told.count(f"begins {seed}"), told.count(f"ends {seed}")) == (1, 0)
    (tmp_path / "go").touch()
    assert start_run(config, folder).wait(240) == 0
    told = (tmp_path / "told").read_text().split("\n")
    assert (told.count(f"begins {seed}"), told.count(f"ends {seed}")) == (2, 1)
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == list(range(8))
    trained = [item for item in read_rollouts(folder) if item.status == "trained"]
    assert len(trained) == len({(item.rollout.group_id, item.rollout.index) for item in trained}) == 8 * 2 * 4
    for item in trained:
        assert [segment.trained for segment in item.rollout.segments] == [True, False, True]
    assert_clean_and_replayed(config, tmp_path)


WORKSHOP = '''
import asyncio, os, random, signal
from pathlib import Path
from posttrain.episodes.wire import PolicyTurn
from posttrain.records import ToolCall

def calls(*given):
    return PolicyTurn("", tuple(ToolCall(name, arguments, f"c{at}") for at, (name, arguments) in enumerate(given)))

async def workshop(session, row):
    """Keeps what the policy says in a file and in a server, and has both told later. Not every episode is as long."""
    key = str(session.seed)
    first = await session.sample(max_tokens=6)
    await asyncio.sleep(0.1 * random.random())  # so that episodes ask in another order each time
    await session.call_tools(calls(
        ("write_file", {"path": "said", "content": "x" * first.num_tokens}),
        ("put", {"key": key, "value": first.num_tokens}),
    ))
    second = await session.sample(max_tokens=6, seed=5)
    unkilled = Path(__file__).with_name("kill")
    if unkilled.exists():
        unkilled.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    await session.call_tools(calls(
        ("python", {"code": "print(len(open('said').read()))"}), ("get", {"key": key})
    ))
    told = [message.text for message in session.messages if message.role == "tool"]
    assert told == ["wrote %d characters" % first.num_tokens, "kept", *[str(first.num_tokens)] * 2], told
    third = await session.sample() if len(second.text) % 2 else second
    return len(set(first.text + second.text + third.text)) / 50 + 0.001 * (session.seed % 97) / 97
'''
SERVER = """
from mcp.server import MCPServer

server, kept = MCPServer("store"), {}

@server.tool()
def put(key: str, value: int) -> str:
    kept[key] = value
    return "kept"

@server.tool()
def get(key: str) -> int:
    return kept[key]

server.run()
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_deterministic_run_of_episodes_with_tools_is_bit_equal(ranks, tiny_model, tmp_path):
    """Two runs: sandboxes and an MCP server that last for an episode, fewer places than episodes, and in the second run
    the environment's process is killed in mid-episode. Weights and rollouts are equal, and the run replays."""
    (tmp_path / "world.py").write_text(WORKSHOP)
    (tmp_path / "server.py").write_text(SERVER)
    shown = [{"type": "function", "function": {"name": "python"}}]  # the engine of other tests has a short context
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["game"], n=8, tools=shown),
        environment={
            "name": f"{tmp_path}/world.py:workshop",
            "tools": [
                "python",
                "files",
                {"mcp": {"command": [sys.executable, f"{tmp_path}/server.py"], "shared": True}},
            ],
            "tool_parser": "pythonic",
            "at_once": 3,
        },
        steps=2,
        groups_per_step=2,
        sampling={"max_tokens": 8},
        max_staleness=0,
        deterministic=True,
    )
    run_stage(config, tmp_path / "rl")
    (tmp_path / "kill").touch()
    run_stage(config, tmp_path / "killed")
    assert not (tmp_path / "kill").exists()
    one, other = ([*read_rollouts(tmp_path / name)] for name in ("rl", "killed"))
    fields = ("step", "status", "reward", "advantage", "parts")
    facts = [
        [(*(getattr(item, name) for name in fields), item.rollout.index, item.rollout.segments) for item in run]
        for run in (one, other)
    ]
    assert facts[0] == facts[1]
    trained = [item for item in one if item.status == "trained"]
    assert len(trained) == 2 * 2 * 4
    assert {item.parts["turns"] for item in trained} == {2, 3}
    assert len({item.rollout.segments for item in trained}) == len(trained)  # no two waves were alike
    assert all(item.rollout.segments[2].trained for item in trained)  # also the turn with a seed of its own
    assert weight_gaps(tmp_path / "rl" / "model", tmp_path / "killed" / "model") == {}
    assert weight_gaps(tiny_model, tmp_path / "rl" / "model") != {}
    assert_clean_and_replayed(config, tmp_path)


AGENT = """
import json, os, pathlib, signal, sys
from openai import OpenAI

row = json.loads(sys.stdin.readline())
client = OpenAI()

def ask(messages, **given):
    answer = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=messages, **given)
    return answer.choices[0].message

def kill_in_training():
    profile, own = [("profile-0", 0), ("profile-1", 0)], [("gateway", os.getppid()), ("agent", os.getpid())]
    for name, pid in (*profile, *own, ("engine", 0)):  # the test kills the engine
        try:
            pathlib.Path(__file__).with_name(name).open("x")
        except FileExistsError:
            continue
        if pid:
            os.kill(pid, signal.SIGKILL)
        return

messages = row["messages"]
messages += [ask(messages, max_tokens=12), {"role": "user", "content": "Again!"}]
kill_in_training()
detail = ask([{"role": "user", "content": "A detail?"}], max_tokens=8)  # another agent's conversation
second = ask(messages, stop=["e"], temperature=0)
letters = len(set(second.content))
print("tested", letters)
print(json.dumps({"reward": row["seed"] % 997 / 997, "parts": {"letters": letters}}))
"""


@pytest.mark.slow
def test_an_agent_is_trained_on_the_ids_that_the_engine_delivered(ranks, tiny_model, tmp_path, monkeypatch):
    """With the client of OpenAI. The gateway, an agent and the engine are killed in mid-episode; nothing is lost."""
    (tmp_path / "my_agent.py").write_text(AGENT)

    def kill_engine() -> None:
        while not (tmp_path / "engine").exists():
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "EngineCore" in process.name() + " ".join(process.cmdline()):
                    process.kill()

    threading.Thread(target=kill_engine, daemon=True).start()
    sampled = heard_turns(monkeypatch)
    config = make_config(
        tmp_path,
        tiny_model,
        rows_of(["agent"], n=2),
        environment={"command": ["python", f"{tmp_path}/my_agent.py"], "at_once": 4},
        profile={"samples": 1, "band": [0.0, 1.0]},
        steps=2,
        groups_per_step=1,
        max_staleness=0,
    )
    outputs, _ = run_stage(config, tmp_path / "rl")
    assert outputs["steps"] == 2
    assert (tmp_path / "agent").exists()  # after the gateway
    assert [event for event in read_jsonl(tmp_path / "rl" / "events.jsonl") if event["event"] == "engine_replaced"]
    trained = [item for item in read_rollouts(tmp_path / "rl") if item.status == "trained"]
    assert len(trained) == 2 * 4
    for item in trained:
        turns = sampled[item.rollout.group_id, item.rollout.index]
        own = [segment for segment in item.rollout.segments if segment.trained]
        assert [segment.token_ids for segment in own] == turns[-3:]  # the very ids of the engine
        first, detail, again = (branch.token_ids for branch in item.rollout.branches)
        assert detail[-len(turns[-2]) :] == turns[-2]
        assert again[: len(first)] == first
        assert item.parts["turns"] == 3
    assert_clean_and_replayed(config, tmp_path)


@pytest.mark.slow
def test_an_episode_is_watched_turn_by_turn(ranks, tiny_model, tmp_path):
    """What is heard is what the engine sampled, in the order of the conversation."""
    (tmp_path / "world.py").write_text(WORLD)
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}\n')
    settings = [f"engine.{key}={value}" for key, value in ENGINE.items()]
    settings += ["model.dtype=float32", "sampling.max_tokens=32", "resources.rollout.cpus=0.5"]
    config = episode_config(
        f"{tmp_path}/world.py:two_turns", str(tiny_model), f"{tmp_path}/rows.jsonl", settings=settings
    )
    heard: list[tuple[int, Message]] = []
    context = StageContext("try", tmp_path, tmp_path / "events.jsonl", seed=3, warm_engines=True)
    flight = checked_episode(config, row_of(config, "b"))
    rollout = try_episode(config, flight, context, heard=lambda place, message: heard.append((place, message)))
    assert [place for place, _ in heard] == [0, 1, 2, 3]
    asked, first, said, second = (message for _, message in heard)
    assert [asked.text, said.role] == ["two", "user"]
    tokenizer = load_tokenizer(str(tiny_model), None)
    sampled = [segment.token_ids for segment in rollout.segments if segment.trained]
    assert [first.text, second.text] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in sampled]
    assert said.text == f"{len(sampled[0])} tokens. Again!"
    assert rollout.scored.result.parts["turns"] == 2
