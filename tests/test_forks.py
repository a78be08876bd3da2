"""Environments, agents and rewards that start processes without end: these are killed, and the episode or the score
alone is lost.

The processes stop at once, so that a machine with few processors can go on.
"""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from episodes_by_hand import play, question
from rollout_records import one_turn

from posttrain.errors import PluginError
from posttrain.records import Message, Outcome, Row, Scored
from posttrain.scoring.pool.pool import RewardPool

WORLD = """
import os

async def forks(session, row):
    await session.sample()
    while row.id == "forks":
        if not os.fork(): os.kill(os.getpid(), 19)
    await session.add("user", "more")
    await session.sample()
    return 1.0
"""
AGENT = """
import json, os, sys, urllib.request

row = json.loads(sys.stdin.readline())
body = json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": row["messages"]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
urllib.request.urlopen(urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers))
while row["id"] == "forks":
    if not os.fork(): os.kill(os.getpid(), 19)
print(1.0)
"""
REWARD = """
import os, time

def fork_without_end():
    while True:
        if not os.fork(): os.kill(os.getpid(), 19)

def plain(rollout, row):
    if rollout.text == "forks": fork_without_end()
    return 1.0

async def at_once(rollout, row):
    return plain(rollout, row)
"""


def scores(tokenizer: Any, environment: dict[str, Any], beside: Any = None) -> dict[str, Scored]:
    found = play(tokenizer, environment, [question("forks"), question("fine")], lambda _: "4 4", beside=beside)
    scored = {name: rollout.scored for name, (rollout,) in found.items()}
    assert all(scored.values())
    return {name: one for name, one in scored.items() if one is not None}


def alive(groups: list[int]) -> list[psutil.Process]:
    """The processes of these process groups that have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.slow
def test_an_environment_that_forks_without_end_costs_its_own_episode(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("posttrain.scoring.pool.process.MAX_PROCESSES", 60)
    (tmp_path / "world.py").write_text(WORLD)
    pids: list[int] = []

    async def note(rollouter: Any) -> None:
        pids.extend(rollouter.pool.pids)

    found = scores(tiny_tokenizer, {"name": f"{tmp_path}/world.py:forks", "timeout_s": 30.0}, note)
    assert found["fine"].result is not None
    assert (found["forks"].outcome, found["forks"].result) == (Outcome.ERROR, None)
    assert "the environment had more than 60 processes, in 2 tries" in found["forks"].reason
    assert pids
    assert not alive(pids)


@pytest.mark.slow
def test_an_agent_that_forks_without_end_costs_its_own_episode(tmp_path: Path, tiny_tokenizer: Any):
    (tmp_path / "my_agent.py").write_text(AGENT)
    environment = {"command": ["python", f"{tmp_path}/my_agent.py"], "timeout_s": 30.0}
    found = scores(tiny_tokenizer, environment)
    assert found["fine"].result is not None
    assert (found["forks"].outcome, found["forks"].result) == (Outcome.ERROR, None)
    assert "the agent had more than 512 processes" in found["forks"].reason


@pytest.mark.slow
@pytest.mark.parametrize("function", ["plain", "at_once"])
def test_a_reward_that_forks_without_end_costs_its_own_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
):
    monkeypatch.setattr("posttrain.scoring.pool.process.MAX_PROCESSES", 60)
    (tmp_path / "mine.py").write_text(REWARD)
    texts, row = ["a", "forks", "b"], Row("r1", "math", (Message("user", "?"),))
    pids: list[int] = []

    async def run() -> list[Scored]:
        pool = RewardPool(f"{tmp_path}/mine.py:{function}", timeout_s=30.0)
        await pool.start()
        pids.extend(pool.pids)
        pairs = [(one_turn("p", "g", i, (1,), (2,), text, (0.0,), (), "stop"), row) for i, text in enumerate(texts)]
        found = await asyncio.gather(*pool.begin(pairs))
        assert not alive(pids)  # those of the first try; the second one's process is another
        await pool.close()
        return found

    first, forks, last = asyncio.run(run())
    assert first.result is not None
    assert last.result is not None
    assert (forks.outcome, forks.result) == (Outcome.ERROR, None)
    assert forks.reason == "the reward had more than 60 processes"
    assert pids


@pytest.mark.slow
def test_a_reward_that_forks_without_end_when_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("posttrain.scoring.pool.process.MAX_PROCESSES", 60)
    (tmp_path / "mine.py").write_text(REWARD + "\nfork_without_end()\n")
    with pytest.raises(PluginError, match="the reward had more than 60 processes"):
        asyncio.run(RewardPool(f"{tmp_path}/mine.py:plain").start())
