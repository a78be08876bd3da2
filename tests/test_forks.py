"""Environments and agents that start processes without end: these are killed, and the episode alone is lost.

The processes stop at once, so that a machine with few processors can go on.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from episodes_by_hand import play, question

from posttrain.records import Outcome, Scored

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


def scores(tokenizer: Any, environment: dict[str, Any], beside: Any = None) -> dict[str, Scored]:
    found = play(tokenizer, environment, [question("forks"), question("fine")], lambda _: "4 4", beside=beside)
    scored = {name: rollout.scored for name, (rollout,) in found.items()}
    assert all(scored.values())
    return {name: one for name, one in scored.items() if one is not None}


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
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            assert os.getpgid(process.pid) not in pids or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_an_agent_that_forks_without_end_costs_its_own_episode(tmp_path: Path, tiny_tokenizer: Any):
    (tmp_path / "my_agent.py").write_text(AGENT)
    environment = {"command": ["python", f"{tmp_path}/my_agent.py"], "timeout_s": 30.0}
    found = scores(tiny_tokenizer, environment)
    assert found["fine"].result is not None
    assert (found["forks"].outcome, found["forks"].result) == (Outcome.ERROR, None)
    assert "the agent had more than 512 processes" in found["forks"].reason
