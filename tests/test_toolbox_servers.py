"""MCP servers as tools: real ones, that work, hang, exit and print rubbish."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from episodes_by_hand import question
from test_toolbox import TOOL_USE, called, config_of

from posttrain.episodes.rehearsal import rehearse
from posttrain.episodes.toolbox.servers import ServerConnection
from posttrain.episodes.toolbox.toolbox import Toolbox, ToolKit
from posttrain.episodes.tools import environment_tools
from posttrain.episodes.wire import ServerTool
from posttrain.errors import ConfigError, PluginError

STORE = '''
import os, subprocess, sys, time
from mcp.server import MCPServer

server = MCPServer("store")
kept = {}

@server.tool()
def put(key: str, value: int) -> str:
    """Keep a value."""
    kept[key] = value
    return f"kept {len(kept)}"

@server.tool()
def get(key: str) -> int:
    """Look a value up."""
    return kept[key]

@server.tool()
def misbehave(how: str) -> str:
    """Do what no server should."""
    if how == "exit":
        os._exit(3)
    if how == "hang":
        child = subprocess.Popen(["sleep", "600"])
        open(os.environ["PIDS"], "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    print("rubbish {" * 100, flush=True)
    sys.stdout.buffer.write(b"\\xff\\xfe\\n")
    sys.stdout.flush()
    return "fine"

server.run()
'''
BY_HAND = """
import json, sys
SCHEMA = {"type": "object", "properties": {"x": {"type": "objekt"}}}
for line in sys.stdin:
    asked = json.loads(line)
    if asked["method"] == "initialize":
        result = {"protocolVersion": asked["params"]["protocolVersion"], "capabilities": {"tools": {}}}
        result["serverInfo"] = {"name": "by hand", "version": "1"}
    elif asked["method"] == "tools/list":
        result = {"tools": [{"name": "wrong", "inputSchema": SCHEMA}]}
    else:
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "store.py").write_text(STORE)
    return {"mcp": {"command": [sys.executable, str(tmp_path / "store.py")], "env": {"PIDS": f"{tmp_path}/pids"}}}


def problem_of(*tools: Any) -> str:
    with pytest.raises((PluginError, ConfigError)) as raised:
        environment_tools(config_of(*tools).functions[""])
    return str(raised.value)


def test_a_server_that_is_wrongly_named_is_told():
    assert "write mcp: {command: [program, argument, ...]}" in problem_of({"mcp": "store.py"})
    assert "command" in problem_of({"mcp": {"command": []}})
    assert "comand" in problem_of({"mcp": {"comand": ["x"]}})
    assert "there is no program '/no/such/program'" in problem_of({"mcp": {"command": ["/no/such/program"]}})


@pytest.mark.slow  # starts servers
def test_calls_are_answered_by_the_server_of_the_episode(store):
    said = [
        called("put", key="a", value=3),
        called("put", key="b", value=4),
        called("get", key="a"),
        called("get", key="c"),
        called("misbehave", how="print"),
        called("misbehave", how="exit"),
        called("put", key="a", value=5),  # a new server, which has nothing yet
        "4",
    ]
    told = rehearse(TOOL_USE, question("r", answer=4), said, tools=[store])
    first, second, value, missing, printed, ended, again = (m.text for m in told.messages if m.role == "tool")
    assert (first, second, value, printed, again) == ("kept 1", "kept 2", "3", "fine", "kept 1")
    assert missing.startswith("Error: ")
    assert ended.startswith("Error: the MCP server")
    assert ended.endswith("has ended")
    other = rehearse(TOOL_USE, question("r"), [called("put", key="a", value=1), "4"], tools=[store])
    assert [m.text for m in other.messages if m.role == "tool"] == ["kept 1"]
    assert "two tools have the name 'put'" in problem_of(store, store)


@pytest.mark.slow
def test_a_shared_server_keeps_what_episodes_say_at_once(store):
    names = ("put", "get")
    server = ServerTool(tuple(store["mcp"]["command"]), names=names, is_shared=True)

    async def run() -> list[str]:
        kit = ToolKit([server])
        one, other = Toolbox(kit), Toolbox(kit)
        puts = [one.call("put", {"key": "a", "value": 1}), other.call("put", {"key": "b", "value": 2})]
        said = [*await asyncio.gather(*puts)]
        await one.close()
        said.append(await other.call("get", {"key": "a"}))
        await kit.shared[0].close()
        return said

    assert sorted(asyncio.run(run())) == ["1", "kept 1", "kept 2"]


@pytest.mark.slow
def test_a_server_that_hangs_is_ended_with_its_children(store, tmp_path):
    server = ServerTool(tuple(store["mcp"]["command"]), store["mcp"]["env"], ("misbehave",), call_s=3.0)

    async def run() -> str:
        connection = ServerConnection(server)
        try:
            return await connection.call("misbehave", {"how": "hang"})
        finally:
            await connection.close()

    assert asyncio.run(run()).endswith("did not answer within 3 s, and was ended")
    pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told_before_a_run(tmp_path):
    (tmp_path / "by_hand.py").write_text(BY_HAND)
    (tmp_path / "dies.py").write_text("import sys; sys.exit('no store to open')")
    by_hand = {"mcp": {"command": [sys.executable, str(tmp_path / "by_hand.py")]}}
    assert "the parameters of 'wrong' are no JSON schema" in problem_of(by_hand)
    dies = {"mcp": {"command": [sys.executable, str(tmp_path / "dies.py")]}}
    assert problem_of(dies).endswith("its last words: no store to open")
    silent = {"mcp": {"command": ["sleep", "600"], "start_s": 0.5}}
    assert "'sleep 600' did not answer within 0.5 s" in problem_of(silent)
