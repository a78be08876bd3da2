"""Tools that a run provides: what the YAML may name, calls in the sandbox of an episode, and what is left of them."""

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from episodes_by_hand import question

from posttrain.config.environments import EnvironmentConfig
from posttrain.episodes.pool import EnvironmentPool
from posttrain.episodes.process import EpisodeLost
from posttrain.episodes.rehearsal import rehearse
from posttrain.episodes.toolbox.builtin import MAX_CHARS, cut
from posttrain.episodes.toolbox.sources import provided_tools
from posttrain.episodes.toolbox.toolbox import Toolbox, ToolKit
from posttrain.episodes.tools import environment_tools, row_tools
from posttrain.episodes.wire import BuiltinTool, Ended, FunctionTool, PolicyTurn, Told
from posttrain.errors import PluginError
from posttrain.records import Message, ToolCall
from posttrain.scoring.pool.wire import plain_row
from posttrain.scoring.sandbox.kept import KeptSandbox
from posttrain.scoring.sandbox.run import Limits, SandboxError

TOOL_USE = "posttrain.environments.tool_use:tool_use"
FUNCTIONS = '''
async def price(item: str) -> dict:
    """Look up a price.

    Args:
        item: Its name.
    """
    return {"item": item, "price": {"tea": 3}[item]}

def size(item: str):
    """Tell the size of an item.

    Args:
        item: Its name.
    """
    return float("inf") if item == "sky" else len(item)

def untyped(item):
    """Do."""
'''


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "shop.py"
    path.write_text(FUNCTIONS)
    return str(path)


def config_of(*tools: Any) -> EnvironmentConfig:
    return EnvironmentConfig.model_validate({"name": TOOL_USE, "tools": list(tools)})


def called(name: str, **arguments: Any) -> PolicyTurn:
    return PolicyTurn("", (ToolCall(name, arguments, "c1"),))


# ---------------------------------------------------------------- what the YAML may name


def test_the_tools_of_the_yaml_are_found_by_reading(functions):
    written = {"type": "function", "function": {"name": "written"}}
    config = config_of("python", "files", f"{functions}:price", written)
    names = [tool["function"]["name"] for tool in row_tools(config, question("r"))]
    assert names == ["python", "read_file", "write_file", "list_files", "price", "written"]
    python, files, price = provided_tools(config.tools or ())
    assert (python, files) == (BuiltinTool("python"), BuiltinTool("files"))
    assert isinstance(price, FunctionTool)
    assert price.target["path"] == functions


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        (["pyhton"], "'pyhton' is no tool; a tool is one of python, files, a function"),
        (["python", "python"], "two tools have the name 'python'"),
        ([{"name": "bare"}], "is no tool"),
        (["{file}:untyped"], "tool 'untyped'.*a tool has a type for every parameter"),
        (["{file}:missing"], "tool 'missing' is no function of this file"),
        (["nowhere.py:f"], "tool 'nowhere.py:f': there is no file"),
        (
            ["no_such_package.tools:f"],
            "there is no source of module 'no_such_package.tools'",
        ),
    ],
)
def test_a_tool_that_is_wrong_is_told_before_a_run(functions, tools, problem):
    tools = [tool.format(file=functions) if isinstance(tool, str) else tool for tool in tools]
    with pytest.raises(PluginError, match=problem):
        environment_tools(config_of(*tools).functions[""])


# ---------------------------------------------------------------- calls


def test_functions_answer_calls_and_their_failures_are_results(functions):
    said = [called("price", item="tea"), called("price", item="gold"), called("size", item="sky"), called("size"), "3"]
    told = rehearse(TOOL_USE, question("r", answer=3), said, tools=[f"{functions}:price", f"{functions}:size"])
    results = [message.text for message in told.messages if message.role == "tool"]
    assert results[0] == '{"item": "tea", "price": 3}'
    assert results[1].startswith("Error: KeyError: 'gold' (shop.py:")
    assert results[2].startswith("Error: ValueError: Out of range float values are not JSON compliant")
    assert results[3].startswith("Error: TypeError: size() missing 1 required positional argument")
    assert told.result is not None
    assert told.result.value == 1.0
    with pytest.raises(RuntimeError, match="the tool 'other' is declared by its schema only"):
        rehearse(TOOL_USE, question("r"), [called("other")], tools=[f"{functions}:price"])


MEETING = '''
import asyncio

door = None

async def wait_for(who: str) -> str:
    """Wait until the others have come.

    Args:
        who: Who comes.
    """
    global door
    door = door or asyncio.Barrier(3)
    await asyncio.wait_for(door.wait(), 30)
    return who

def note(who: str) -> str:
    """Note at once.

    Args:
        who: Who is noted.
    """
    return f"noted {who}"
'''


def test_the_calls_of_a_turn_run_side_by_side_and_their_results_keep_their_order(tmp_path):
    (tmp_path / "meeting.py").write_text(MEETING)
    given = [("wait_for", "a"), ("note", "b"), ("wait_for", "c"), ("wait_for", "d")]
    calls = tuple(ToolCall(name, {"who": who}, f"c{who}") for name, who in given)
    tools = [f"{tmp_path}/meeting.py:wait_for", f"{tmp_path}/meeting.py:note"]
    told = rehearse(TOOL_USE, question("r", answer=3), [PolicyTurn("", calls), "3"], tools=tools)
    results = [(message.tool_call_id, message.text) for message in told.messages if message.role == "tool"]
    assert results == [("ca", "a"), ("cb", "noted b"), ("cc", "c"), ("cd", "d")]


def test_functions_that_the_file_declares_share_its_state(tmp_path):
    (tmp_path / "shelf.py").write_text(SHELF)
    told = rehearse(f"{tmp_path}/shelf.py:shelf", question("r"), [called("take", item="tea"), "done"])
    assert [message.text for message in told.messages if message.role == "tool"] == ["3 left"]
    assert told.result is not None
    assert told.result.value == 3.0


SHELF = '''
left = {}

def take(item: str) -> str:
    """Take an item.

    Args:
        item: Its name.
    """
    left[item] -= 1
    return f"{left[item]} left"

async def shelf(session, row):
    left["tea"] = 4
    assert [tool["function"]["name"] for tool in session.tools] == ["take", "look"]
    await session.call_tools(await session.sample())
    await session.sample()
    return left["tea"]

TOOLS = {"shelf": [take, {"type": "function", "function": {"name": "look"}}]}
'''


def test_a_long_result_is_cut_in_its_middle():
    assert cut("x" * MAX_CHARS) == "x" * MAX_CHARS
    short = cut("a" * 5000 + "b" * 5000)
    assert short == "a" * 4000 + "\n... 2000 characters are left out ...\n" + "b" * 4000


@pytest.mark.slow  # starts sandboxes
def test_files_last_for_an_episode_and_no_program_outlives_its_call():
    """Each is one call, in this order, in one sandbox; the second part of each is what the policy reads."""
    calls: list[tuple[str, dict[str, Any], str]] = [
        ("python", {"code": "x = 6 * 7\nopen('a.txt', 'w').write('one\\ntwo\\n')"}, "(no output)"),
        ("python", {"code": "print(x)"}, "Error: the program ended with exit code 1\n.*NameError: name 'x'"),
        ("read_file", {"path": "a.txt", "first_line": 2}, "two"),
        ("write_file", {"path": "lib/count.py", "content": "def up(n):\n    return n + 1\n"}, "wrote 28 characters"),
        ("python", {"code": "from lib.count import up\nprint(up(41))"}, "42"),
        ("write_file", {"path": "json.py", "content": "1 / 0"}, "wrote 5 characters"),
        ("list_files", {}, "a.txt .8 bytes.\njson.py .5 bytes.\nlib/count.py .28 bytes."),
        ("read_file", {"path": "missing"}, "Error: read_file ended with exit code 1\nmissing: No such file"),
        ("write_file", {"path": "/etc/motd", "content": "x"}, "Error: write_file ended.*/etc/motd: "),
        ("read_file", {"path": "/dev/zero"}, "Error: read_file needs more than 200 MiB of memory|Error: read_file was"),
        (
            "python",
            {"code": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"},
            "Error: the program was stopped after 5 seconds",
        ),
        (
            "python",  # in a session of its own, and without its parent
            {"code": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        while True: open('late', 'a').write('x')\n    os._exit(0)\nprint('left')"},
            "left",
        ),
        ("python", {"code": "import os, time\nn = os.path.exists('late') and os.path.getsize('late')\ntime.sleep(0.3)\n"
                    "print(n == (os.path.exists('late') and os.path.getsize('late')))"}, "True"),
        ("python", {"code": "import os\nos.kill(1, 9)\nos.kill(os.getppid(), 9)\nprint('still here')"}, "still here"),
        ("python", {"code": "print('x' * 50_000)"}, "Error: the program was stopped because it printed more than 20"),
        ("python", {"code": "open('big', 'w').write('x' * 10**7)"}, "Error: the program found no room: .* 4 MiB"),
        ("python", {"code": "import socket; socket.create_connection(('127.0.0.1', 22), 1)"}, "Error: .*OSError"),
        ("python", {"code": "print(open('a.txt').read())"}, "one\ntwo"),
    ]  # fmt: skip
    limits = Limits(wall_s=5.0, cpu_s=5, memory_mib=200, num_processes=8, disk_mib=4, output_bytes=20_000)

    async def run() -> list[str]:
        toolbox = Toolbox(ToolKit([BuiltinTool("python"), BuiltinTool("files")], limits))
        try:
            return [await toolbox.call(name, arguments) for name, arguments, _ in calls]
        finally:
            await toolbox.close()

    for result, (name, arguments, expected) in zip(asyncio.run(run()), calls, strict=True):
        plain = result == expected
        assert plain or re.match(expected, result, re.DOTALL), (name, arguments, result)


@pytest.mark.slow
def test_a_sandbox_ends_with_the_call_that_is_given_up_and_the_next_one_is_new():
    async def run() -> None:
        sandbox = KeptSandbox(Limits(wall_s=60.0))
        await sandbox.run("open('a', 'w')")
        pid = sandbox.pid
        assert pid is not None
        hanging = asyncio.create_task(sandbox.run("import time; time.sleep(60)"))
        await asyncio.sleep(0.2)
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert not Path(f"/proc/{pid}").exists()
        again = await sandbox.run("import os; print(os.listdir())")
        assert again.stdout == b"['.program.py']\n"
        pid = sandbox.pid
        assert pid is not None
        os.kill(pid, 9)  # from outside, as the kernel does when memory is short
        with pytest.raises(SandboxError, match="the sandbox was lost with its files"):
            await sandbox.run("print(1)")
        assert (await sandbox.run("print(1)")).stdout == b"1\n"
        await sandbox.close()

    asyncio.run(run())


KEEPS = """
import os
import re
import time
from pathlib import Path

async def keeps(session, row):
    turn = await session.sample()
    await session.call_tools(turn)
    if row.id == "raises":
        raise ValueError("in mid-episode")
    if row.id == "dies":
        os._exit(3)
    await session.sample()
    return 1.0
"""


@pytest.mark.slow
def test_no_sandbox_outlives_its_episode_however_that_ends(tmp_path):
    (tmp_path / "keeps.py").write_text(KEEPS)
    config = EnvironmentConfig.model_validate({"name": f"{tmp_path}/keeps.py:keeps", "tools": ["python"]})
    code = (
        "import os\nopen('mine', 'a').write('x')\nif os.fork() == 0:\n    while True: pass\nprint(open('mine').read())"
    )

    async def play(pool: EnvironmentPool, name: str) -> Any:
        begun = await pool.begin(
            environment="", row=plain_row(question(name)), messages=(), tools=[], seed=0, tokens_left=100
        )
        await begun.next()
        turn = called("python", code=code)
        begun.answer(Told(begun.key, turn, (Message("assistant", "", turn.tool_calls),), 100))
        told = await begun.next()
        if isinstance(told, Ended):
            return told
        begun.answer(Told(begun.key, PolicyTurn("done"), (Message("assistant", "done"),), 100))
        return told.added, await begun.next()

    async def run() -> list[Any]:
        pool = EnvironmentPool(config)
        await pool.start()
        try:
            found = [*await asyncio.gather(play(pool, "raises"), play(pool, "fine"), play(pool, "another"))]
            with pytest.raises(EpisodeLost, match="exited with code 3"):
                await play(pool, "dies")
            return found
        finally:
            await pool.close()

    raises, *others = asyncio.run(run())
    assert raises.reason.startswith("ValueError: in mid-episode")
    for (result,), ended in others:  # neither sees the other's file
        assert (result.text, ended.result.value) == ("x", 1.0)
    for _ in range(200):  # the kernel ends that of the process that died
        if not (left := [pid for pid in os.listdir("/proc") if pid.isdigit() and is_sandbox_of(int(pid))]):
            break
        time.sleep(0.1)
    assert left == []


def is_sandbox_of(pid: int) -> bool:
    """Whether a process is the first one of a sandbox that this process, or one of its children, has started."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return b"inside.py" in words and int(stat[1]) in (1, os.getpid()) and stat[0] != "Z"
