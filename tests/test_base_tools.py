"""The puzzles of the pipeline `tools`: what their solutions earn in the real environments, and the text of the base."""

import random
import re
from collections import defaultdict

import pytest

from posttrain.base.config import SetSizes, StageConfig, TextConfig
from posttrain.base.courses import COURSES
from posttrain.base.problem import LEVELS, turns_of
from posttrain.base.sets import draw_sets, write_sets
from posttrain.base.tasks import draw_distinct, solve
from posttrain.base.tools.puzzles import TOOLS
from posttrain.base.tools.text import ToolCorpus
from posttrain.config.base import validate_config
from posttrain.config.data import DataConfig
from posttrain.data.rows import load_rows
from posttrain.data.samples import render_conversation
from posttrain.episodes.calls import CallReader
from posttrain.episodes.rehearsal import rehearse
from posttrain.episodes.wire import PolicyTurn
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.records import Message, Row, ToolCall

TEXT = TextConfig(plain_share=0, rate_share=0, slip_share=0.15)
WORLDS = {
    "arithmetic": ("posttrain.environments.calculator:calculator", {"marker": "Answer:"}),
    "store": ("posttrain.environments.store:store", {"marker": "Answer:"}),
    "guessing": ("posttrain.environments.guess_number:guess_number", {}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return COURSES["tools"].build_tokenizer()


def problems(count=300):
    return draw_distinct(count, random.Random(0), puzzles=TOOLS)


def earned(problem, turns):
    """The reward of the policy's turns in the real environment, and what the world said."""
    said = []
    for turn in turns:
        if turn["role"] == "assistant":
            calls = [
                ToolCall(one["function"]["name"], one["function"]["arguments"]) for one in turn.get("tool_calls", ())
            ]
            said.append(PolicyTurn(turn["content"], tuple(calls)))
    name, args = WORLDS[problem.family]
    row = Row("r", problem.family, (Message("user", problem.prompt),), problem.answer, problem.fields)
    told = rehearse(name, row, said, args=args)
    assert told.result is not None
    return told.result.value, [message.text for message in told.messages[1:] if message.role != "assistant"]


def test_solutions_earn_what_they_should_and_show_what_the_world_says():
    rng, wins = random.Random(1), defaultdict(list)
    for problem in problems(50):
        if problem.family not in WORLDS:
            continue
        turns = turns_of(solve(problem, rng, True, puzzles=TOOLS))
        reward, heard = earned(problem, turns)
        assert (reward, heard) == (1.0, [turn["content"] for turn in turns if turn["role"] != "assistant"])
        wins[problem.family, problem.level].append(
            earned(problem, turns_of(solve(problem, rng, False, puzzles=TOOLS)))[0]
        )
    assert {level for _, level in wins} == set(LEVELS)
    for level in (1, 2):
        assert all(wins["arithmetic", level] + wins["store", level])  # the head does, or one look-up
    for level in (3, 4, 5):
        assert sum(wins["arithmetic", level] + wins["store", level]) <= 1  # a guess may be right by chance
    guessed = [reward for level in LEVELS for reward in wins["guessing", level]]
    assert sum(guessed) < 0.4 * len(guessed)


def test_the_fast_rendering_equals_the_chat_template(tokenizer):
    corpus, rng = ToolCorpus(tokenizer, TEXT, frozenset(), seed="x"), random.Random(0)
    for problem in problems():
        family = TOOLS.families[problem.family]
        solution = solve(problem, rng, rng.random() < 0.5, flaw=0.5, puzzles=TOOLS)
        turns = [{"role": "user", "content": problem.prompt}, *turns_of(solution)]
        ids, mask = render_conversation(tokenizer, turns, list(family.tools) or None)
        document = corpus.renderer.document(turns, family.tools)
        assert list(document.ids) == ids
        trained = {at for start, end in document.replies for at in range(start, end)}
        assert [int(at in trained) for at in range(len(ids))] == mask


@pytest.mark.slow  # vLLM starts a process when it is imported
def test_calls_are_read_and_a_broken_one_is_told_as_in_the_text(tokenizer):
    """By vLLM's parser of Llama 4's calls."""
    for family, (name, value) in {"arithmetic": ("calculate", "47 * 86"), "store": ("lookup", "d")}.items():
        reader = CallReader("llama4_pythonic", tokenizer, TOOLS.families[family].tools)
        (argument,) = TOOLS.families[family].tools[0]["function"]["parameters"]["properties"]
        text = f'[{name}({argument}="{value}")]'
        read = reader.read(tokenizer.encode(text, add_special_tokens=False), text)
        assert ([(call.name, dict(call.arguments)) for call in read.calls], read.problem) == (
            [(name, {argument: value})],
            "",
        )
        broken = reader.read(tokenizer.encode(text[:-1], add_special_tokens=False), text[:-1])
        assert (broken.calls, broken.content, broken.problem) == ((), text[:-1], "the call cannot be read")
    texts = [
        tokenizer.decode(ToolCorpus(tokenizer, TEXT, frozenset(), seed=str(i)).document(False).ids) for i in range(150)
    ]
    assert any("Error: the call cannot be read<|eot|>" in text for text in texts)


def test_late_text_calls_less(tokenizer):
    corpus, calls = ToolCorpus(tokenizer, TEXT, frozenset(), seed="x"), defaultdict(list)
    for late in (False, True):
        for _ in range(1500):
            text = tokenizer.decode(corpus.document(late).ids)
            if "Compute:" in text:
                calls[late].append("[calculate(" in text)
    assert sum(calls[False]) / len(calls[False]) > 0.8
    assert 0.25 < sum(calls[True]) / len(calls[True]) < 0.45


def test_sets_share_no_problem_and_rows_are_those_of_a_stage(tmp_path):
    sets = draw_sets(0, SetSizes(sft=200, prompts=100, heldout=50, tune=50), TOOLS)
    assert len(sets.keys()) == 400
    paths = write_sets(sets, tmp_path, 0, puzzles=TOOLS, with_systems=False)
    rows = load_rows(DataConfig(path=str(paths["sft"])), kind="supervised", stage="sft")
    assert {row.capability for row in rows} == {"arithmetic", "lookup", "guessing", "math", "reasoning"}
    assert any(message.tool_calls for row in rows for message in row.messages)
    assert all(
        re.fullmatch(r"[a-j]|[0-9]+", row["key"].split()[1]) for row in read_jsonl(paths["prompts"]) if "store" in row
    )


def test_keys_that_have_no_effect_are_refused():
    with pytest.raises(ConfigError, match=r"set text.plain_share \(got 0.6\) and text.rate_share \(got 0.08\) to 0"):
        validate_config(StageConfig, {"puzzles": "tools"}, "base")
