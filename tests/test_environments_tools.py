"""`posttrain environments`: a new plug-in with its test, rehearsed episodes, what is refused and what is shown."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from episodes_by_hand import question

from posttrain.cli.environments import _Printer, episode_lines
from posttrain.cli.main import main
from posttrain.episodes.conversation import Conversation
from posttrain.episodes.rehearsal import rehearse
from posttrain.episodes.wire import PolicyTurn
from posttrain.errors import DataError, PluginError
from posttrain.records import (
    FinishReason,
    Message,
    Outcome,
    Prompt,
    RewardResult,
    Rollout,
    Scored,
    Segment,
    ToolCall,
    VersionSpan,
)
from posttrain.reward_tools.episode import file_and_id
from posttrain.reward_tools.template import write_plugin

CALCULATOR = "posttrain.environments.calculator:calculator"
CALL = PolicyTurn("", (ToolCall("calculate", {"expression": "6 * 7"}, "c1"),))


def test_an_episode_is_rehearsed_with_a_script(tmp_path: Path):
    told = rehearse(CALCULATOR, question("r", answer=42), [CALL, "42"])
    assert told.result.value == 1.0
    assert [(turn.role, turn.text) for turn in told.messages[1:]] == [
        ("assistant", ""), ("tool", "42"), ("assistant", "42")
    ]  # fmt: skip
    assert rehearse(CALCULATOR, question("r", answer=42), [CALL], args={"max_turns": 1}).result.value == 0.0
    full = rehearse(CALCULATOR, question("r", answer=42), [CALL])
    assert (full.result.value, full.result.reason) == (0.0, "the context was full")
    (tmp_path / "world.py").write_text(
        "async def pays(session, row):\n    await session.sample()\n    session.reward(0.5)\n    return 1.0\n"
        "async def silent(session, row):\n    return 1.0\n"
    )
    paid = rehearse(f"{tmp_path}/world.py:pays", question("r"), ["x"])
    assert (paid.result.value, paid.rewards) == (1.5, ((1, 0.5),))
    with pytest.raises(PluginError, match="returned before the policy had a turn"):
        rehearse(f"{tmp_path}/world.py:silent", question("r"), [])


def test_a_new_environment_comes_with_a_test_that_passes(tmp_path: Path, capsys):
    assert main(["environments", "new", "again", "--dir", str(tmp_path)]) == 0
    plugin, test = tmp_path / "again.py", tmp_path / "test_again.py"
    assert f"posttrain environments try {plugin}:again --model" in capsys.readouterr().out
    written = load(test)
    (cases,) = (mark.args[1] for mark in written.test_reward.pytestmark)
    for said, reward in cases:
        written.test_reward(said, reward)
    written.test_what_the_policy_is_told()
    written.test_cut_off()
    plugin.write_text(plugin.read_text().replace("1.0 / number", "1.0"))  # a mistake, which the test finds
    with pytest.raises(AssertionError):
        written.test_reward(["5", "4"], 0.5)
    assert main(["environments", "new", "again", "--dir", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in write_plugin("other", tmp_path, "environment")] == ["other.py", "test_other.py"]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calculater", "--model", "{model}", "--row", "p.jsonl"], "environment 'calculater' is not known"),
        ([CALCULATOR, "--model", "{model}", "--row", "p.jsonl:p7"], "no row of p.jsonl has the id 'p7'; the first has"),
        ([CALCULATOR, "--model", "{model}", "--row", "q.jsonl"], "q.jsonl"),
        ([CALCULATOR, "--model", "nowhere", "--row", "p.jsonl"], "nowhere"),
        ([CALCULATOR, "--model", "{model}", "--row", "p.jsonl:p2"], "answer"),
        ([CALCULATOR, "environment.arg=1", "--model", "{model}", "--row", "p.jsonl"], "environment.arg"),
        ([CALCULATOR, "samples=4", "--model", "{model}", "--row", "p.jsonl"], "one episode is sampled"),
        ([CALCULATOR, "environment.args.turns=1", "--model", "{model}", "--row", "p.jsonl"], "'turns'"),
        ([CALCULATOR, "engine.max_model_len=64", "--model", "{model}", "--row", "p.jsonl"], "max_tokens"),
    ],
)
def test_bad_input_is_one_message_before_an_engine_starts(
    arguments, message, tiny_model, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [{"id": "p1", "prompt": "2 + 2?", "answer": "4"}, {"id": "p2", "prompt": "2 + 2?"}]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [argument.format(model=tiny_model) for argument in arguments]
    assert main(["environments", "try", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_row_is_named_by_its_file_and_id(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b.jsonl").touch()
    assert file_and_id("p.jsonl") == ("p.jsonl", None)
    assert file_and_id("p.jsonl:p7") == ("p.jsonl", "p7")
    assert file_and_id("a:b.jsonl") == ("a:b.jsonl", None)
    assert file_and_id("a:b.jsonl:7") == ("a:b.jsonl", "7")


def test_each_turn_is_heard_once_and_one_that_cannot_be_rendered_never():
    from posttrain.base.tokenizer import build_tokenizer

    tokenizer: Any = build_tokenizer()
    heard: list[tuple[int, str]] = []
    prompt = Prompt((Message("user", "a question"),), (1,))
    conversation = Conversation(
        tokenizer, prompt, (), checked=set(), heard=lambda place, message: heard.append((place, message.text))
    )
    conversation.next((1,))
    assert heard == [(0, "a question")]
    conversation.add_said(Message("assistant", "one"))
    assert heard[1:] == [(1, "one")]
    conversation.add([Message("user", "go on")])
    assert len(heard) == 2
    conversation.next((1, 2))
    assert heard[2:] == [(2, "go on")]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    conversation.add([Message("user", "never")])
    with pytest.raises(DataError):
        conversation.next((1, 2))
    assert len(heard) == 3


def test_what_the_terminal_shows(capsys):
    printer = _Printer(2)
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c\x1b[2J")]
    turns.append(Message("assistant", "", CALL.tool_calls))
    for place, turn in enumerate(turns):
        printer(place, turn)
    printer(0, turns[0])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "[user]\na\n\n[assistant]\nb\n\n[user]\nc\N{REPLACEMENT CHARACTER}[2J\n\n[policy, turn 1]\n"
    )
    assert 'calculate({"expression": "6 * 7"})' in shown
    assert shown.endswith("begins again ---\n\n[user]\na\n\n")
    said = Segment((9, 2), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),))
    fields = ("p", "g0", 0, Prompt((), (1,)), (said, Segment((7,), False, keeps=1), said), "", FinishReason.STOP)
    result = RewardResult(1.25, {"turn 1": 0.25, "tool_calls": 2}, "right")
    assert episode_lines(Rollout(*fields, scored=Scored(result))) == [
        "reward 1.25 (right)", "turn 1 0.25, tool calls 2", "4 tokens sampled in 2 branches; ended by stop"
    ]  # fmt: skip
    lost = Rollout(*fields, scored=Scored(None, Outcome.ERROR, "KeyError: 'x'"))
    assert episode_lines(lost)[0] == "no reward: error: KeyError: 'x'"
