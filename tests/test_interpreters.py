"""Plug-ins in an interpreter of their own, which has msgspec and a package that this one lacks, and nothing else."""

import contextlib
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import msgspec
import pytest
from episodes_by_hand import HERMES, play, question

from posttrain.base.tokenizer import build_tokenizer
from posttrain.cli.main import main
from posttrain.config.environments import EnvironmentConfig
from posttrain.data.rows import load_rows
from posttrain.episodes.tools import check_environment_rows
from posttrain.errors import DataError, PluginError
from posttrain.records import FinishReason, Prompt, Rollout
from posttrain.reward_tools.install import adapters, install
from posttrain.scoring.plugins.interpreter import check_python, client_path
from posttrain.scoring.plugins.lookup import RewardSpec, check_environment, check_reward
from posttrain.scoring.pool.pool import RewardPool
from posttrain.serving.server import free_port

PLUGINS = '''
import importlib.util, sys
import only_there

PACKAGES = []
REQUIRES = {"world": ["answer"]}
FOREIGN = ("torch", "ray", "pydantic", "transformers")

async def world(session, row):
    """Name the interpreter."""
    await session.sample()
    await session.add("user", f"{sys.prefix} {[name for name in FOREIGN if importlib.util.find_spec(name)]}")
    turn = await session.sample()
    return only_there.score(turn.text, row.answer)

def reward(rollout, row):
    """Score a reply there."""
    return only_there.score(rollout.text, row.answer)
'''


def told(text: str) -> Rollout:
    return Rollout("p", "g", 0, Prompt((), (1,)), (), text, FinishReason.STOP)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a venv without pip, to whose packages msgspec and a module are added."""
    folder = tmp_path_factory.mktemp("other")
    venv.EnvBuilder(symlinks=True).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    (packages / "only_there.py").write_text("def score(said, answer):\n    return float(said == str(answer))\n")
    return folder


def test_an_interpreter_that_is_none_is_told(tmp_path):
    with pytest.raises(PluginError, match=r"python: .*/nowhere is no interpreter; `posttrain environments install`"):
        check_python(f"{tmp_path}/nowhere")
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    with pytest.raises(PluginError, match="is no interpreter"):
        check_python(str(plain))


def test_a_command_names_its_interpreter_itself():
    with pytest.raises(ValueError, match="has both python and command; a command begins with its interpreter"):
        EnvironmentConfig.model_validate({"command": ["python", "a.py"], "python": "x/bin/python"})


def test_the_other_interpreter_sees_this_package_and_no_other():
    assert [item.name for item in client_path().iterdir()] == ["posttrain"]
    assert (client_path() / "posttrain" / "rewards" / "coding.py").is_file()
    assert (client_path() / "posttrain" / "episodes" / "session.py").is_file()


@pytest.mark.slow  # starts interpreters
def test_environments_and_rewards_run_in_the_interpreter_that_they_name(other, tmp_path, tiny_tokenizer):
    file, python = tmp_path / "plugins.py", f"{other}/bin/python"
    file.write_text(PLUGINS)
    environments: dict[str, Any] = {
        "there": {"name": f"{file}:world", "python": python},
        "here": {"name": "posttrain.environments.tool_use:tool_use"},
    }
    rows = [question("a", capability="there"), question("b", capability="there", answer="5")]
    rows.append(question("c", capability="here"))
    config = EnvironmentConfig.model_validate({"by_capability": environments})
    assert check_environment_rows(config, rows) == []
    found = play(tiny_tokenizer, {"by_capability": environments}, rows, lambda _: "4")
    scores = {name: rollouts[0].scored for name, rollouts in found.items()}
    values = {name: scored.result.value for name, scored in scores.items() if scored and scored.result}
    assert values == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert f"{other} []" in tiny_tokenizer.decode(found["a"][0].segments[1].token_ids)

    pool = RewardPool(RewardSpec(f"{file}:reward", {}, python), 1, 60.0)
    scored = pool.score_all([(told("4"), rows[0]), (told("5"), rows[0])])
    assert [score.result and score.result.value for score in scored] == [1.0, 0.0]


@pytest.mark.slow
def test_what_does_not_fit_the_other_interpreter_is_told_before_a_run(other, tmp_path):
    file, python = tmp_path / "plugins.py", f"{other}/bin/python"
    file.write_text(PLUGINS)
    check_environment(f"{file}:world", python=python)
    check_reward("only_there:score", {}, python=python)
    for problem, name, given in (
        ("imports only_there, which is not installed in", f"{file}:world", ""),
        ("has no module 'not_there'", "not_there:f", python),
        ("no function 'other' in", f"{file}:other", python),
        ("cannot be run: ", f"{file}:world", "/bin/false"),
    ):
        with pytest.raises(PluginError, match=problem):
            check_environment(name, python=given)
    bare = tmp_path / "bare"
    venv.EnvBuilder(symlinks=True).create(bare)
    with pytest.raises(PluginError, match=r"has no msgspec; install it: .*-m pip install msgspec=="):
        check_python(f"{bare}/bin/python")


def test_what_cannot_be_installed_is_told(tmp_path, capsys):
    assert {"reasoning_gym", "verifiers"} <= set(adapters())
    assert main(["environments", "install", "reasoning_gim"]) == 2
    assert "'reasoning_gim' is no adapter and no file" in capsys.readouterr().err
    plain = tmp_path / "plain.py"
    plain.write_text("x = 1\n")
    with pytest.raises(PluginError, match="it names no packages; write PACKAGES"):
        install(str(plain))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("reasoning-gym:leg_counting", "where size is how many rows are made"),
        ("reasoning-gym:leg_counting?size=many", "where size is how many rows are made"),
        ("reasoning-gym:?size=3", r"write reasoning-gym:DATASET\?size=500&seed=1"),
        ("reasoning-gym:leg_counting?size=3", "reasoning-gym is not installed here; `posttrain environments install"),
        ("verifiers:my_env.py:load", r"write verifiers:my_env.py:load\?size=500&seed=1"),
        (
            "verifiers:my_env.py:load?size=3",
            "verifiers is not installed here; `posttrain environments install verifiers`",
        ),
        ("verifiers-v1:my_tasks.py?size=3", "is not installed here; `posttrain environments install verifiers_v1`"),
        ("textarena:GuessTheNumber-v0", r"write textarena:GuessTheNumber-v0\?size=500&seed=1"),
    ],
)
def test_a_generator_that_is_wrongly_named_is_told(source, problem):
    with pytest.raises(DataError, match=problem):
        load_rows(source, kind="prompt")


@pytest.mark.slow
@pytest.mark.full  # installs the real package, which takes minutes and an index
def test_reasoning_gym_makes_rows_and_scores_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    python = install("reasoning_gym", tmp_path / "gym")
    source = f"reasoning-gym:leg_counting?size=4&seed=3&max_animals=3&python={python}"
    rows = load_rows(source, kind="prompt")
    assert len({row.messages[0].text for row in rows}) == 4
    assert rows == load_rows(source, kind="prompt")
    pool = RewardPool(
        RewardSpec("posttrain.environments.reasoning_gym:score", {"marker": "Answer:"}, str(python)), 1, 60.0
    )
    scored = pool.score_all([(told(f"So\nAnswer: {said}"), row) for row in rows for said in (row.answer, "no")])
    assert [score.result and score.result.value for score in scored] == [1.0, 0.0] * 4
    with pytest.raises(DataError, match="cannot make the rows: ValueError: Dataset 'legs' not registered"):
        load_rows(f"reasoning-gym:legs?size=4&python={python}", kind="prompt")
    assert "reasoning_gym" not in sys.modules


WORLDS = """
import datasets
import verifiers as vf

def load(largest=9):
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(1, largest) for b in range(1, largest)]

    class Twice(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **kwargs):
            return [{"role": "user", "content": "Again!"}]

    def right(completion, answer, **kwargs):
        return float(completion[-1]["content"].strip() == answer)

    def brief(completion, **kwargs):
        return len(completion) / 6

    rubric = vf.Rubric(funcs=[right, brief], weights=[1.0, 0.5])
    return Twice(dataset=datasets.Dataset.from_list(rows), rubric=rubric, max_turns=2)

def add(a: int, b: int) -> int:
    return a + b

def with_tools():
    rows = [{"question": "1 + 2 =", "answer": "3"}]
    rubric = vf.Rubric(funcs=[lambda completion, answer, **kwargs: float(completion[-1]["content"] == answer)])
    return vf.ToolEnv(tools=[add], dataset=datasets.Dataset.from_list(rows), rubric=rubric)

def broken():
    raise RuntimeError("no world")
"""


@pytest.mark.slow
@pytest.mark.full  # installs the real package, which takes minutes and an index
def test_an_environment_of_verifiers_runs_unchanged(tmp_path, monkeypatch, tiny_tokenizer):
    """By hand: 1 for the right last turn, and half of a metric that counts the three messages after the prompt."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    python = install("verifiers", tmp_path / "worlds")
    (tmp_path / "worlds.py").write_text(WORLDS)
    source = f"verifiers:{tmp_path}/worlds.py:load?size=3&seed=1&largest=5&python={python}"
    rows = load_rows(source, kind="prompt")
    assert [row.messages[0].text.split()[1::2] for row in rows] == [["+", "="]] * 3
    assert {row.capability for row in rows} == {"worlds"}
    environment: dict[str, Any] = {"name": "posttrain.environments.verifiers:verifiers", "python": str(python)}
    assert check_environment_rows(EnvironmentConfig.model_validate(environment), rows) == []
    found = play(tiny_tokenizer, environment, rows, lambda turn: str(turn.session.row.answer) if turn.number else "?")
    for row in rows:
        (rollout,) = found[row.id]
        assert rollout.scored is not None
        assert rollout.scored.result is not None, rollout.scored.reason
        assert rollout.scored.result.value == 1.25
        assert rollout.scored.result.parts.items() >= {"right": 1.0, "brief": 0.5, "turns": 2}.items()
        assert [segment.trained for segment in rollout.segments] == [True, False, True]
    rows = load_rows(f"verifiers:{tmp_path}/worlds.py:with_tools?size=1&python={python}", kind="prompt")
    assert [tool["function"]["name"] for tool in rows[0].fields["tools"]] == ["add"]
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = HERMES
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    found = play(tokenizer, environment, rows, lambda turn: "3" if turn.number else call, max_tokens=200)
    (rollout,) = found[rows[0].id]
    assert rollout.scored is not None
    assert rollout.scored.result is not None, rollout.scored.reason
    assert rollout.scored.result.parts.items() >= {"add_calls": 1.0, "turns": 2, "tool_calls": 1}.items()
    assert (rollout.scored.result.value, rollout.text) == (1.0, "3")
    with pytest.raises(DataError, match="cannot make the rows: RuntimeError: no world"):
        load_rows(f"verifiers:{tmp_path}/worlds.py:broken?size=4&python={python}", kind="prompt")
    assert "verifiers" not in sys.modules


TASKS = """
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str

class SumConfig(vf.TaskConfig):
    bonus: float = 0.5
    tools: vf.ToolsetConfig = vf.ToolsetConfig()

class Adder(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "calc"

    @vf.tool
    def add(self, a: int, b: int) -> int:
        \"\"\"Add two numbers.\"\"\"
        return a + b

class SumTask(vf.Task[SumData, vf.State, SumConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Adder(config.tools)]

    @vf.reward(weight=1.0)
    async def right(self, trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def with_tool(self, trace) -> float:
        return float(bool(trace.tool_messages) and self.config.bonus)

    @vf.metric
    async def said(self, trace) -> float:
        return float(len(trace.assistant_messages))

class SumsConfig(vf.TasksetConfig):
    largest: int = 9
    task: SumConfig = SumConfig()

class Sums(vf.Taskset[SumTask, SumsConfig]):
    def load(self):
        top = range(1, self.config.largest)
        return [
            SumTask(SumData(prompt=f"{a} + {b} =", system_prompt="Add.", answer=str(a + b)), self.config.task)
            for a in top for b in top
        ]

__all__ = ["Sums"]

if __name__ == "__main__":
    Adder.run()
"""


@pytest.mark.slow
@pytest.mark.full  # installs the real package, which takes minutes and an index
def test_an_environment_of_the_later_verifiers_runs_unchanged(tmp_path, monkeypatch):
    """By hand: 1 for the right last turn, and 0.5 times a bonus of 0.5 for a call of the tool, which is its own server.

    The second row's policy never stops to call the tool; `max_turns` of the agent ends it.
    """
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    python = install("verifiers_v1", tmp_path / "tasks")
    (tmp_path / "sums_of_two.py").write_text(TASKS)
    rows = load_rows(f"verifiers-v1:{tmp_path}/sums_of_two.py?size=2&seed=1&largest=5&python={python}", kind="prompt")
    assert [[message.role for message in row.messages] for row in rows] == [["system", "user"]] * 2
    environment: dict[str, Any] = {
        "name": "posttrain.environments.verifiers_v1:verifiers_v1", "python": str(python),
        "args": {"env": {"agent": {"max_turns": 3}}},
    }  # fmt: skip
    assert check_environment_rows(EnvironmentConfig.model_validate(environment), rows) == []
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = HERMES
    call = '<tool_call>{"name": "calc_add", "arguments": {"a": 1, "b": 2}}</tool_call>'

    def said(turn: Any) -> str:
        row, has_result = turn.session.row, "tool<|header_end|>" in tokenizer.decode(turn.request.prompt_ids)
        return str(row.answer) if has_result and row.id == rows[0].id else call

    found = play(tokenizer, environment, rows, said, max_tokens=200, length=4096)
    results = []
    for row in rows:
        (rollout,) = found[row.id]
        assert rollout.scored is not None
        assert rollout.scored.result is not None, rollout.scored.reason
        results.append(rollout.scored.result)
        trained = [segment for segment in rollout.segments if segment.trained]
        assert [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in trained] == (
            [call, str(row.answer)] if row is rows[0] else [call] * 3
        )
    assert [result.value for result in results] == [1.25, 0.25]
    assert results[0].parts.items() >= {"right": 1.0, "with_tool": 0.5, "said": 2.0, "turns": 2}.items()
    assert results[1].parts.items() >= {"right": 0.0, "with_tool": 0.5, "said": 3.0, "turns": 3}.items()
    with pytest.raises(DataError, match=r"cannot make the rows: .*nowhere"):
        load_rows(f"verifiers-v1:nowhere?size=4&python={python}", kind="prompt")
    assert "verifiers" not in sys.modules


@pytest.mark.slow
@pytest.mark.full  # installs the real package, which takes minutes and an index
def test_a_game_of_textarena_is_an_environment(tmp_path, monkeypatch, tiny_tokenizer):
    """Halving finds each number; a text that is no move, said twice, ends a game with what the last guess was worth."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    python = install("textarena", tmp_path / "arena")
    source = f"textarena:GuessTheNumber-v0?size=4&seed=3&python={python}"
    rows = load_rows(source, kind="prompt")
    assert "between 1 and 20" in rows[0].messages[0].text
    environment: dict[str, Any] = {"name": "posttrain.environments.textarena:textarena", "python": str(python)}
    ranges = {row.id: [1, 20] for row in rows}

    def halve(turn: Any) -> str:
        row, asked = turn.session.row, tiny_tokenizer.decode(turn.request.prompt_ids)
        low_high = ranges[row.id]
        middle = sum(low_high) // 2
        if turn.number:
            low_high[:] = [middle + 1, low_high[1]] if "higher" in asked[-60:] else [low_high[0], middle - 1]
        return f"[{sum(low_high) // 2}]"

    found = play(tiny_tokenizer, environment, rows, halve, length=4096)
    for row in rows:
        (rollout,) = found[row.id]
        assert rollout.scored is not None
        assert rollout.scored.result is not None, rollout.scored.reason
        assert rollout.scored.result.value == 1.0
    (lost,) = play(tiny_tokenizer, environment, rows[:1], lambda _: "hm", length=4096)[rows[0].id]
    assert lost.scored is not None
    assert lost.scored.result is not None
    assert lost.scored.result.value == 0.0
    assert lost.scored.result.parts["turns"] == 2
    with pytest.raises(DataError, match=r"cannot make the rows: .*is no game for one player"):
        load_rows(f"textarena:TicTacToe-v0?size=4&python={python}", kind="prompt")
    assert "textarena" not in sys.modules


SERVER = """
import sys
import uvicorn
from openenv.core.env_server.http_server import HTTPEnvServer
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from fastapi import FastAPI

class Said(Action):
    said: str

class Heard(Observation):
    heard: str

class Guess(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, number=5, **other):
        self.number = number
        return Heard(heard="Guess a number.")

    def step(self, action):
        right = action.said == str(self.number)
        return Heard(heard="right" if right else "wrong", done=right, reward=1.0 if right else -0.25)

    @property
    def state(self):
        return State()

app = FastAPI()
HTTPEnvServer(Guess, Said, Heard, max_concurrent_envs=8).register_routes(app)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


@pytest.mark.slow
@pytest.mark.full  # installs the real package, which takes minutes and an index
def test_a_server_of_openenv_is_an_environment(tmp_path, tiny_tokenizer):
    """By hand: a wrong guess costs a quarter, a right one earns 1. A server that is gone is a lost world."""
    python = install("openenv", tmp_path / "client")
    subprocess.run([python, "-m", "pip", "install", "-q", "openenv-core==0.2.3"], check=True)
    (tmp_path / "server.py").write_text(SERVER)
    port = free_port("127.0.0.1", 0)
    args = {"url": f"http://127.0.0.1:{port}", "action": "said", "shown": "heard", "max_turns": 3}
    environment: dict[str, Any] = {
        "name": "posttrain.environments.openenv:openenv", "python": str(python), "args": args
    }  # fmt: skip
    rows = [question("three", reset={"number": 3}), question("never")]
    assert check_environment_rows(EnvironmentConfig.model_validate(environment), rows) == []
    server = subprocess.Popen([python, str(tmp_path / "server.py"), str(port)])
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        found = play(tiny_tokenizer, environment, rows, lambda turn: "3" if turn.number > 2 else "7")
    finally:
        server.kill()
        server.wait()
    scores = {name: rollouts[0].scored for name, rollouts in found.items()}
    values = {name: scored and scored.result and scored.result.value for name, scored in scores.items()}
    assert values == {"three": 0.75, "never": -0.75}
    assert "wrong" in tiny_tokenizer.decode([token for one in found["three"][0].segments for token in one.token_ids])
    (lost,) = play(tiny_tokenizer, environment, rows[:1], lambda _: "7")["three"]
    assert lost.scored is not None
    assert (lost.scored.result, str(lost.scored.outcome)) == (None, "infrastructure")
