"""Environments: finding and checking them, conversations as token ids, and episodes in real, killable processes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from episodes_by_hand import HERMES, completion, play, question
from rollout_records import drawn
from template_families import FAMILIES, tokenizer_of
from test_rollouter import REQUEST, flight_of, played
from test_rollouter import completion as sampled

from posttrain.config.environments import EnvironmentConfig
from posttrain.data.chat import render_prompt
from posttrain.environments.calculator import calculate
from posttrain.episodes.conversation import Conversation
from posttrain.episodes.tools import declared_tools, row_tools, tools_problem
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
    VersionSpan,
    branches,
)
from posttrain.rl.history.archive import _segments_json
from posttrain.rl.loop.tally import StepTally
from posttrain.rl.records import Group, ScoredGroup
from posttrain.rl.training.samples import rollout_samples
from posttrain.sampling.rollouter import Session
from posttrain.sampling.rollouts import UNBEGUN, Reply
from posttrain.scoring.plugins.lookup import check_environment


@pytest.fixture
def chat_tokenizer() -> Any:
    """Of a family whose template cuts the thinking of earlier turns."""
    return tokenizer_of(FAMILIES["qwen3"])


CALCULATOR = "posttrain.environments.calculator:calculator"

# ---------------------------------------------------------------- branches are training samples


def test_each_branch_is_a_sample_and_a_token_is_trained_on_once():
    """By hand: after the first turn the template cuts it down, so the second turn has a prefix of its own."""
    first = Segment((5, 6, 9), True, (-0.1, -0.2, -0.3), (VersionSpan(2, 0, 3),))
    cut = Segment((6, 9, 20, 21), False, keeps=3)  # of (1, 2, 3, 5, 6, 9) the first three stay
    second = Segment((7, 9), True, (-0.4, -0.5), (VersionSpan(3, 0, 2),))
    rollout = Rollout("p", "g0", 0, Prompt((), (1, 2, 3)), (first, cut, second), "", FinishReason.STOP)
    one, other = rollout_samples(rollout, 4, 0.5, ref_logprobs=(-1.0, -2.0, -3.0, -4.0, -5.0))
    assert (one.token_ids, one.trained, one.staleness) == ((1, 2, 3, 5, 6, 9), ((3, 6),), (2, 2, 2))
    assert (other.token_ids, other.trained) == ((1, 2, 3, 6, 9, 20, 21, 7, 9), ((7, 9),))
    assert (other.sampler_logprobs, other.staleness) == ((-0.4, -0.5), (1, 1))
    assert (one.ref_logprobs, other.ref_logprobs) == ((-1.0, -2.0, -3.0), (-4.0, -5.0))
    assert _segments_json(rollout) == "[[0,3,true],[3,7,false,3],[7,9,true]]"
    assert [branch.token_ids for branch in branches((1, 2, 3), rollout.segments[:1])] == [(1, 2, 3, 5, 6, 9)]


def test_a_turn_at_another_temperature_or_by_request_is_context():
    class Colder:
        async def run(self, prompt: Prompt, session: Session) -> Rollout:
            await session.sample(temperature=0.5)
            await session.sample(temperature=1.0, stop=["x"])
            await session.sample(seed=7, trained=False)
            return session.rollout()

    said = [sampled(9, 2)] * 3
    rollout, turns = played(Colder(), UNBEGUN, *said)
    assert [segment.trained for segment in rollout.segments] == [False, True, False]
    assert [turn.request.temperature for turn in turns] == [0.5, 1.0, REQUEST.temperature]
    assert [turn.request.seed for turn in turns] == [None, None, 7]
    assert turns[1].request.stop == ("x",)


def test_an_episode_that_begins_again_has_the_turns_that_it_had():
    """No engine is asked for them, as long as the world says the same; from where it says something else, it is."""

    class Twice:
        def __init__(self, said: tuple[int, ...]):
            self._said = said

        async def run(self, prompt: Prompt, session: Session) -> Rollout:
            for said in ((30,), self._said):
                session.begin_again()
                await session.sample()
                session.add(said)
                await session.sample()
            return session.rollout(Scored(None, Outcome.ERROR, "why"))

    same, turns = played(Twice((30,)), UNBEGUN, sampled(9, 2), sampled(8, 4))
    assert (len(turns), same.token_ids, same.scored) == (2, (9, 2, 30, 8, 4), Scored(None, Outcome.ERROR, "why"))
    other, turns = played(Twice((31,)), UNBEGUN, sampled(9, 2), sampled(8, 4), sampled(7, 4))
    assert (len(turns), other.token_ids) == (3, (9, 2, 31, 7, 4))


def test_a_step_tells_what_happened_in_its_episodes():
    """By hand: two episodes with a score, one without, and a reply that is no episode."""
    turn = Segment((9, 2), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),))
    branch = Segment((7, 7, 7), False, keeps=1)  # of (1, 9, 2) the first token stays
    counts = {"turns": 2, "tool_calls": 1, "malformed_calls": 1, "tool_failures": 0, "turn 1": 0.5}
    scored = [
        Scored(RewardResult(1.0, counts)),
        Scored(RewardResult(0.0, {**counts, "turns": 1, "tool_failures": 3})),
        Scored(None, Outcome.ERROR, "why"),
        None,
    ]
    rollouts = tuple(
        Rollout("p", "g0", index, Prompt((), (1,)), segments, "", FinishReason.STOP, scored=score)
        for index, (segments, score) in enumerate(
            zip([(turn, branch, turn), (turn,), (turn,), (turn,)], scored, strict=True)
        )
    )
    group = Group(0, drawn(question("p"), (), (1,)), rollouts)
    reads = [(100, 20)]  # tokens that later turns have read, and those that were cached: before this stage's first step
    tally = StepTally({}, {}, 0.5, reads=lambda: reads[-1])
    reads.append((180, 80))
    tally.decided(ScoredGroup(group, (1.0, 0.0, None, 1.0), ("",) * 4, (0.5, -0.5, None, 0.5)), None)
    batch = [ScoredGroup(group, (1.0, 0.0), ("",) * 2, (0.5, -0.5))]
    found = tally.values(0, batch, ages_s=[0.0], waited_s=0.0, trained={})
    assert {name: value for name, value in found.items() if name.startswith("episode")} == {
        "episodes": 2,
        "episode/turns": 1.5,
        "episode/tool_calls": 1.0,
        "episode/malformed_calls": 1.0,
        "episode/tool_failures": 1.5,
        "episode/cached": 0.75,
        "episode/tokens": 4.5,  # the longest branches are (1, 7, 7, 7, 9, 2) and (1, 9, 2)
    }
    assert not any(name.startswith("episode") for name in tally.values(0, batch, ages_s=[0], waited_s=0, trained={}))


def test_an_episode_that_had_ended_before_a_crash_is_what_was_recorded():
    segment = Segment((9, 2), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),))
    recorded = Reply((segment,), "text", FinishReason.STOP, Scored(None, Outcome.TIMEOUT, "late"))
    session = Session(flight_of(3, REQUEST.prompt_ids, REQUEST), 0, recorded)
    assert session.is_over
    assert (session.rollout().segments, session.rollout().scored) == (recorded.segments, recorded.scored)


# ---------------------------------------------------------------- conversations


class NothingKnown(set[str]):
    """For a conversation that learns nothing of the template."""

    def add(self, element: str) -> None:
        pass


def talked(tokenizer: Any, *said_and_added: str, tools: Any = (), checked: set[str] | None = None) -> list[Any]:
    """What is added after each of the policy's turns: its text, then what the world says, and so on."""
    asked = (Message("user", "a question"),)
    prompt = Prompt(asked, tuple(render_prompt(tokenizer, asked)))
    checked = set() if checked is None else checked
    conversation, ids, found = Conversation(tokenizer, prompt, tools, checked=checked), list(prompt.token_ids), []
    assert conversation.next(ids).token_ids == ()
    for said, added in zip(said_and_added[::2], said_and_added[1::2], strict=True):
        ids += completion(tokenizer, said).token_ids
        conversation.add_said(Message("assistant", said))
        conversation.add([Message("user", added)])
        following = conversation.next(ids)
        if following.keeps is not None:
            del ids[following.keeps :]
        ids += following.token_ids
        found.append((following, list(ids)))
    return found


def test_what_is_added_is_a_suffix_and_sampled_ids_stay(tiny_tokenizer):
    """The second line of the sampled turn would be trimmed by the template: the ids of the engine stay all the same."""
    (first, _), (second, ids) = talked(tiny_tokenizer, "one  \n", "go on", "two", "and on")
    assert (first.keeps, second.keeps) == (None, None)
    text = tiny_tokenizer.decode(ids)
    assert "one  \n<|eot|><|header_start|>user<|header_end|>\n\ngo on<|eot|>" in text
    assert text.endswith("two<|eot|><|header_start|>user<|header_end|>\n\nand on<|eot|>"
                         "<|header_start|>assistant<|header_end|>\n\n")  # fmt: skip


def test_a_suffix_that_is_found_in_the_text_equals_that_of_both_renderings(tiny_tokenizer, monkeypatch):
    """The second conversation is of forms that the first has shown, so it is rendered once a turn."""
    said = ["one", "  two  ", "three. four", "5", "six"]
    turns = [text for pair in zip(said, ["go on", "héllo\n\nworld", " 7 + 8 ", "x", "y"], strict=True) for text in pair]
    slow = talked(tiny_tokenizer, *turns, checked=NothingKnown())
    checked: set[str] = set()
    talked(tiny_tokenizer, "one", "go on", "two", "and on", checked=checked)
    monkeypatch.setattr("posttrain.episodes.conversation.conversation_ids", None)
    assert talked(tiny_tokenizer, *turns, checked=checked) == slow


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_both_ways_to_a_suffix_are_equal_for_templates_of_model_families(family):
    tokenizer = tokenizer_of(family)
    turns = ["one", "go on", " two ", "so\n", "<think>\nhm\n</think>\n\nthree", "and?", "four", "é 𝛑", "five", "end"]
    checked: set[str] = set()
    for _ in range(2):  # at first nothing is known
        assert talked(tokenizer, *turns, checked=checked) == talked(tokenizer, *turns, checked=NothingKnown())


def test_a_template_that_cuts_thinking_makes_a_branch(chat_tokenizer):
    (first, ids), (second, _) = talked(chat_tokenizer, "<think>hmm</think>one", "go on", "two", "and on")
    assert first.keeps is not None
    assert "hmm" not in chat_tokenizer.decode(ids)
    asked = [Message("user", "a question"), Message("assistant", "<think>hmm</think>one"), Message("user", "go on")]
    assert ids == render_prompt(chat_tokenizer, asked)  # the template's own prompt
    assert second.keeps is not None


def test_a_turn_that_was_cut_off_gets_the_token_that_ends_it(tiny_tokenizer):
    asked = (Message("user", "a question"),)
    prompt = Prompt(asked, tuple(render_prompt(tiny_tokenizer, asked)))
    conversation = Conversation(tiny_tokenizer, prompt, (), checked=set())
    ids = [*prompt.token_ids, *tiny_tokenizer.encode("one", add_special_tokens=False)]
    conversation.add_said(Message("assistant", "one"))
    conversation.add([Message("user", "go on")])
    assert tiny_tokenizer.decode(conversation.next(ids).token_ids).startswith("<|eot|><|header_start|>user")


def test_a_template_that_does_not_show_results_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endfor %}"
    prompt = Prompt((Message("user", "?"),), (1,))
    conversation = Conversation(chat_tokenizer, prompt, (), checked=set())
    conversation.add([Message("tool", "4")])
    with pytest.raises(DataError, match="leaves out the result in message 1"):
        conversation.next((1,))


# ---------------------------------------------------------------- finding, checking, tools


@pytest.fixture
def worlds(tmp_path: Path) -> Path:
    path = tmp_path / "worlds.py"
    path.write_text(WORLDS)
    return path


def test_environments_are_checked_by_reading(worlds):
    check_environment(f"{worlds}:by_id")
    for name, args, problem in (
        ("plain", {}, "is a plain function; write async def plain"),
        ("by_id", {"size": 1}, "unexpected keyword argument 'size'|cannot be called with"),
        ("other", {}, "no function 'other'"),
    ):
        with pytest.raises(PluginError, match=problem):
            check_environment(f"{worlds}:{name}", args)
    with pytest.raises(PluginError, match="environment 'calculater' is not known"):
        check_environment("calculater")
    with pytest.raises(PluginError, match=r"as in .*:\w+; a program is run by .* agent, args.command=\[python, .*py\]"):
        check_environment(str(worlds))


def test_tools_come_from_the_row_the_yaml_or_the_file(worlds):
    (tool,) = declared_tools(CALCULATOR)
    assert tool["function"]["name"] == "calculate"
    assert tool["function"]["parameters"]["required"] == ["expression"]
    look = {"type": "function", "function": {"name": "look"}}
    config = EnvironmentConfig(name=CALCULATOR)
    assert row_tools(config, question("r", tools=[look])) == [look]
    assert row_tools(config, question("r")) == [tool]
    assert row_tools(EnvironmentConfig(name=CALCULATOR, tools=[look]), question("r")) == [look]
    assert row_tools(None, question("r")) == []
    with pytest.raises(DataError, match="row 'r': tools: two tools have the name 'look'"):
        row_tools(config, question("r", tools=[look, look]))
    with pytest.raises(PluginError, match="tool 'missing' is no function of this file"):
        declared_tools(f"{worlds}:no_tool")
    with pytest.raises(PluginError, match="tool 'untyped'"):
        declared_tools(f"{worlds}:bad_tool")


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (None, "a tool is"),
        ({"name": ""}, "must be a name"),
        ({"name": "f", "parameters": {"type": "objekt"}}, "the parameters of 'f' are no JSON schema"),
    ],
)
def test_a_schema_that_does_not_parse_is_told(function, problem):
    assert problem in tools_problem([{"type": "function", "function": function}])


@pytest.mark.parametrize(
    ("expression", "value"),
    [("(3 + 4) * 12", "84"), ("1.5 * 2", "3"), ("1 / 3", "0.333333333333"), ("2 ** -3", "0.125"), ("-7 // 2", "-4")],
)
def test_the_calculator_computes_exactly(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression", ["9**9**9", "10**3000", "__import__('os')", "1/0", "((", "x", "True + 1", "1" * 600]
)
def test_the_calculator_refuses_everything_else(expression):
    assert calculate(expression).startswith("Error: ")


# ---------------------------------------------------------------- episodes in processes

WORLDS = '''
import asyncio, os, resource
from posttrain.episodes.wire import PolicyTurn
from posttrain.records import ToolCall

missing = None

def untyped(x):
    """Do."""

async def spins():
    """Never end."""
    while True: pass

TOOLS = {"no_tool": [missing], "bad_tool": [untyped], "by_id": [spins]}

def plain(session, row): ...
async def no_tool(session, row): ...
async def bad_tool(session, row): ...

async def by_id(session, row):
    """Does what the id of the row says."""
    what = row.id
    if what == "silent": return 1.0
    if what == "exit at once": os._exit(3)
    before = session.tokens_left
    turn = await session.sample()
    match what:
        case "left":
            assert (session.turn, before - session.tokens_left) == (1, turn.num_tokens)
            assert [message.text for message in session.messages] == ["a question", turn.text]
        case "text": return "1"
        case "role": await session.add("wizard", "x")
        case "content": await session.add("user", {"a": 1})
        case "spin":
            while True: pass
        case "spins in a call":
            await session.call_tools(PolicyTurn("", (ToolCall("spins", {}, "1"), ToolCall("spins", {}, "2"))))
        case "sleep": await asyncio.sleep(1000)
        case "raise":
            for _ in range(2):
                await session.add("user", "go on")
                await session.sample()
            raise ValueError("bad thing")
        case "for ever":
            while True:
                await session.add("user", "go on")
                await session.sample()
        case "files":  # of a machine that allows few, because a million take longer than the deadline
            resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            kept = [open("/dev/null") for _ in range(10_000)]
        case "prints":
            for _ in range(1000): print("x" * 1000)
            os.write(1, b"y" * 100_000)
        case "memory": kept = bytearray(20 << 30)
        case "huge": await session.add("user", "x" * 10**7)
        case "twice":
            await asyncio.gather(session.sample(), session.sample())
        case "waits":
            while not os.path.exists(__file__ + ".go"):
                await asyncio.sleep(0.02)
    await session.add("user", "more")
    session.reward(0.25)
    await session.sample()
    return 1.0
'''


@pytest.mark.slow
def test_what_an_environment_does_costs_its_own_episode(worlds, tiny_tokenizer):
    """All at once in one process, which one of them hangs and another one ends."""
    names = ["silent", "exit at once", "text", "role", "content", "spin", "spins in a call", "sleep", "raise"]
    names += ["for ever", "files", "prints", "memory", "huge", "twice", "left", "fine"]
    rows = [question(name) for name in names]
    environment = {"name": f"{worlds}:by_id", "timeout_s": 1.0, "tool_parser": "pythonic"}
    found = play(tiny_tokenizer, environment, rows, lambda _: "4 4")
    ended = {name: rollouts[0] for name, rollouts in found.items()}
    scored = {name: rollout.scored for name, rollout in ended.items()}
    for name, outcome, reason in (
        ("silent", Outcome.ERROR, "the environment returned before the policy had a turn"),
        ("exit at once", Outcome.INFRASTRUCTURE, "the environment's process exited with code 3"),
        ("text", Outcome.ERROR, "text: the environment returned str '1'; it must return a float"),
        ("role", Outcome.ERROR, "role is 'wizard'; a turn of the world is one of user, tool, system"),
        ("content", Outcome.ERROR, "content is a dict; it must be text"),
        ("spin", Outcome.TIMEOUT, "the environment did nothing for 1 s"),
        ("spins in a call", Outcome.TIMEOUT, "the environment did nothing for 1 s"),
        ("sleep", Outcome.TIMEOUT, "the environment did nothing for 1 s"),
        ("raise", Outcome.ERROR, "ValueError: bad thing (worlds.py:"),
        ("files", Outcome.ERROR, "Too many open files"),
        ("memory", Outcome.ERROR, "MemoryError"),
        ("huge", Outcome.ERROR, "content has 10000000 characters"),
        ("twice", Outcome.ERROR, "cannot sample while a turn of the policy is sampled"),
    ):
        assert scored[name].outcome == outcome, (name, scored[name])
        assert scored[name].result is None
        assert reason in scored[name].reason
    assert len(ended["raise"].segments) == 5  # what it had is kept
    full = ended["for ever"]
    assert (scored["for ever"].result.value, full.finish_reason) == (0.0, FinishReason.LENGTH)
    for name in ("prints", "left", "fine"):
        assert scored[name].result.value == 1.25
        assert scored[name].result.parts == {
            "turn 1": 0.25,
            "turns": 2,
            "tool_calls": 0,
            "malformed_calls": 0,
            "tool_failures": 0,
        }


LATE = """
import asyncio, pathlib

async def late(session, row):
    told = pathlib.Path(__file__).with_suffix(".told")

    async def go_on():
        errors = []
        for again in (session.sample(), session.add("user", "more")):
            try:
                await again
            except RuntimeError as error:
                errors.append(str(error))
        told.with_suffix(".part").write_text("\\n".join(errors))
        told.with_suffix(".part").rename(told)

    await session.sample()
    if row.id == "late":
        kept.append(asyncio.create_task(go_on()))
        return 1.0
    while not told.exists():
        await asyncio.sleep(0.02)
    return 0.5

kept = []
"""


@pytest.mark.slow
def test_an_environment_that_goes_on_after_its_end_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "late.py").write_text(LATE)
    rows = [question("late"), question("waits")]  # the other one keeps the process
    found = play(tiny_tokenizer, {"name": f"{tmp_path}/late.py:late"}, rows, lambda _: "4 4")
    assert {name: rollout.scored.result.value for name, (rollout,) in found.items()} == {"late": 1.0, "waits": 0.5}
    first, second = (tmp_path / "late.told").read_text().splitlines()
    assert first == "an environment cannot sample any more: the episode has ended"
    assert second == "an environment cannot add a turn any more: the episode has ended"
    assert len(found["late"][0].segments) == 1


@pytest.mark.slow
def test_episodes_begin_again_when_their_process_is_killed(worlds, tiny_tokenizer):
    async def kill(rollouter: Any) -> None:
        import asyncio

        await asyncio.sleep(0.5)
        (pid,) = rollouter.pool.pids
        os.kill(pid, signal.SIGKILL)
        while not rollouter.pool.num_restarts:
            await asyncio.sleep(0.02)
        Path(f"{worlds}.go").touch()

    asked: list[tuple[str, int]] = []

    def says(turn: Any) -> str:
        asked.append((turn.session.row.id, turn.number))
        return "4"

    environment = {"name": f"{worlds}:by_id", "tool_parser": "pythonic"}
    found = play(tiny_tokenizer, environment, [question("waits")], says, group=3, beside=kill)
    assert [rollout.scored.result.value for rollout in found["waits"]] == [1.25] * 3
    assert sorted(asked) == [("waits", 0)] * 3 + [("waits", 2)] * 3  # no first turn is sampled again


SAVES = """
import os, signal

async def saves(session, row):
    if session.restored is None:
        first = await session.sample()
        session.reward(0.25)
        await session.add("user", "noted")
        session.checkpoint({"said": first.text})
    second = await session.sample(seed=4)
    if session.restored is None:
        os.kill(os.getpid(), signal.SIGKILL)
    session.reward(0.5)
    await session.add("user", "once more")
    third = await session.sample()
    seen = [message.text for message in session.messages]
    return float(seen == ["a question", session.restored["said"], "noted", second.text, "once more", third.text])

async def nothing(session, row):
    await session.sample()
    session.checkpoint(None)
"""


@pytest.mark.slow
def test_an_environment_goes_on_from_its_checkpoint_when_its_process_is_lost(tmp_path, tiny_tokenizer):
    (tmp_path / "worlds.py").write_text(SAVES)
    asked: list[tuple[int, int]] = []

    def says(turn: Any) -> str:
        asked.append((turn.session.index, turn.number))
        return f"turn {turn.number}"

    environment = {"name": f"{tmp_path}/worlds.py:saves"}
    found = play(tiny_tokenizer, environment, [question("kept")], says, group=2)["kept"]
    for rollout in found:
        assert rollout.scored is not None
        assert rollout.scored.result is not None, rollout.scored.reason
        assert rollout.scored.result.value == 1.75
        parts = rollout.scored.result.parts
        assert (parts["turn 1"], parts["turn 2"], parts["turns"]) == (0.25, 0.5, 3)
        assert [segment.trained for segment in rollout.segments] == [True, False, True, False, True]
    assert sorted(asked) == [(index, number) for index in (0, 1) for number in (0, 2, 4)]  # no turn is sampled again
    (rollout,) = play(tiny_tokenizer, {"name": f"{tmp_path}/worlds.py:nothing"}, [question("none")], says)["none"]
    assert rollout.scored is not None
    assert "there can be no checkpoint: the state is None" in rollout.scored.reason


PAID = """
from posttrain.records import RewardResult

async def paid(session, row):
    turn = await session.sample()
    session.reward(0.5)
    session.reward(0.25)
    for call in turn.tool_calls:
        await session.add("tool", "Error: broken", call_id=call.id, name=call.name)
    await session.sample()
    session.reward(0.125)
    return RewardResult(0.0, {"turn 1": 9.0, "style": 0.5})
"""


@pytest.mark.slow
def test_calls_are_read_and_malformed_ones_go_back_to_the_policy(tmp_path):
    from posttrain.base.tokenizer import build_tokenizer

    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = HERMES
    first = {
        "good": '{"name": "calculate", "arguments": {"expression": "(3 + 4) * 12"}}',
        "cut": '{"name": "calculate", "arguments": {"expr',
        "unknown": '{"name": "compute", "arguments": {"expression": "1"}}',
        "arguments": '{"name": "calculate", "arguments": {"expressio": "1"}}',
    }

    def says(turn: Any) -> str:
        if turn.session.row.id == "paid" and turn.number == 2:
            return f"<tool_call>{first['good']}</tool_call>"
        return "84" if turn.number else f"<tool_call>{first[turn.session.row.id]}</tool_call>"

    first["paid"] = first["cut"]
    (tmp_path / "paid.py").write_text(PAID)
    environments = {
        "tools": {"name": CALCULATOR},
        "paid": {"name": f"{tmp_path}/paid.py:paid", "tools": declared_tools(CALCULATOR)},
    }
    rows = [question(name, answer=84, capability="paid" if name == "paid" else "tools") for name in first]
    found = play(tokenizer, {"by_capability": environments}, rows, says, length=2000, max_tokens=200)
    # The policy's second turn is the first that this environment saw whole; both of its rewards are for it.
    assert found.pop("paid")[0].scored.result.parts == {
        "style": 0.5,
        "turn 2": 0.75,
        "turn 3": 0.125,
        "turns": 3,
        "tool_calls": 1,
        "malformed_calls": 1,
        "tool_failures": 1,
    }
    told = {
        "good": "84",
        "cut": "Error: the call cannot be read",
        "unknown": "Error: there is no tool 'compute'; there are: calculate",
        "arguments": "Error: the arguments of calculate: 'expression' is a required property",
    }
    for name, (rollout,) in found.items():
        said, added, _ = rollout.segments
        assert f"<|header_start|>tool<|header_end|>\n\n{told[name]}<|eot|>" in tokenizer.decode(added.token_ids)
        assert said.trained
        assert rollout.scored.result.value == 1.0
        assert rollout.scored.result.parts["malformed_calls"] == (name != "good")
