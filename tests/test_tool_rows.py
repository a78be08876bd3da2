"""Rows with tools and calls, under the chat templates of real families: exactly the assistant's tokens are trained on,
and what is trained on is what the parser of that family reads as the row's calls."""

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
from template_families import Family, tokenizer_of

from posttrain.compat.trl import training_templates
from posttrain.compat.vllm_parsers import tool_parsers
from posttrain.config.environments import EnvironmentConfig
from posttrain.data.chat import render_prompt
from posttrain.data.pairs import Pair
from posttrain.data.samples import render_samples
from posttrain.dpo.examples import tokenize_pairs
from posttrain.episodes.calls import CallReader, parser_of
from posttrain.episodes.tools import row_renderer
from posttrain.errors import ConfigError, DataError
from posttrain.records import Message, Row, ToolCall

# As Llama 4's own template writes tools, in few words: both forms of calls, and results in turns of their own.
LLAMA4 = """\
{{- bos_token }}
{%- if tools %}{{- '<|header_start|>system<|header_end|>\\n\\nFunctions:\\n' + (tools | tojson) + '<|eot|>' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|header_start|>' + ('ipython' if m.role == 'tool' else m.role) + '<|header_end|>\\n\\n' }}
    {%- if m.role == 'tool' %}{{- m.content | tojson }}
    {%- elif m.tool_calls %}{{- m.content }}CALLS
    {%- else %}{{- m.content }}{% endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""
PYTHONIC = """\
{{- '[' }}{% for c in m.tool_calls %}{{- c.function.name + '(' }}
{%- for name, value in c.function.arguments.items() %}{{- name + '=' + (value | tojson) }}
{%- if not loop.last %}, {% endif %}{% endfor %}{{- ')' }}{% if not loop.last %}, {% endif %}{% endfor %}{{- ']' }}"""
JSON = """\
{%- for c in m.tool_calls %}{{- '{"name": "' + c.function.name + '", "parameters": ' }}
{{- (c.function.arguments | tojson) + '}' }}{% if not loop.last %}; {% endif %}{% endfor %}"""
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
QWEN = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
LLAMA3 = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"


@dataclass(frozen=True)
class Case:
    """template: a name of TRL's, or the text. said: a pattern of a turn of the assistant. begun: what the prompt itself
    begins a turn with. parallel: whether a turn may have several calls. rewrites: whether earlier turns
    are rewritten."""

    template: str
    tokens: tuple[str, ...]
    end: str
    said: str
    parser: str
    begun: str = ""
    parallel: bool = True
    rewrites: bool = False


CASES = {
    "llama 3.1": Case("llama3_1", HEADERS, "<|eot_id|>", LLAMA3, "llama3_json", parallel=False),
    "llama 3.2": Case("llama3_2", HEADERS, "<|eot_id|>", LLAMA3, "llama3_json", parallel=False),
    "llama 4 pythonic": Case(
        LLAMA4.replace("CALLS", PYTHONIC),
        ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>", "<|python_end|>"),
        "<|eot|>",
        r"<\|header_start\|>assistant<\|header_end\|>\n\n(.*?<\|eot\|>)",
        "llama4_pythonic",
    ),
    "llama 4 json": Case(
        LLAMA4.replace("CALLS", JSON),
        ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>", "<|python_tag|>"),
        "<|eot|>",
        r"<\|header_start\|>assistant<\|header_end\|>\n\n(.*?<\|eot\|>)",
        "llama4_json",
    ),
    "hermes, as qwen 2.5": Case("qwen2_5", IM, "<|im_end|>", QWEN, "hermes"),
    "qwen 2.5 with marks": Case("qwen2_5_training", IM, "<|im_end|>", QWEN, "hermes"),
    "qwen 3": Case("qwen3", IM, "<|im_end|>", QWEN, "hermes", rewrites=True),
    "qwen 3 with marks": Case("qwen3_training", IM, "<|im_end|>", QWEN, "hermes"),
    "qwen 3 2507": Case("qwen3_instruct_2507", IM, "<|im_end|>", QWEN, "hermes"),
    "qwen 3.5": Case("qwen3_5_think_training", IM, "<|im_end|>", QWEN, "qwen3_xml", begun="<think>\n"),
    "qwen 3.6": Case("qwen3_6", IM, "<|im_end|>", QWEN, "qwen3_xml", begun="<think>\n", rewrites=True),
}
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "unit": {"type": "string"}},
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add numbers.", "parameters": ADD}}]
FIRST = (ToolCall("add", {"a": 3, "b": 4, "unit": "kg"}, "call00001"),)
SECOND = (ToolCall("add", {"a": 1, "b": 1}, "call00002"), ToolCall("add", {"a": -5, "b": 6}, "call00003"))


def turns(parallel: bool) -> list[Message]:
    calls = SECOND if parallel else SECOND[:1]
    return [
        Message("user", "3 + 4 kg?"),
        Message("assistant", "", FIRST),
        Message("tool", "7 kg", tool_call_id="call00001", name="add"),
        Message("assistant", "Seven."),
        Message("user", "And 1 + 1?"),
        Message("assistant", "", calls),
        *(Message("tool", "2", tool_call_id=call.id, name="add") for call in calls),
        Message("assistant", "Two."),
    ]


def made(case: Case) -> Any:
    named = re.fullmatch(r"\w+", case.template) is not None
    text = template_text(case.template) if named else case.template
    return tokenizer_of(Family(text, case.tokens, case.end, eos=case.end))


def template_text(name: str) -> str:
    known = training_templates()
    folder = next(iter(known.values())).parent  # those without marks stand beside those for training
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_exactly_the_assistants_tokens_are_trained_on(name):
    case = CASES[name]
    samples = render_samples(made(case), turns(case.parallel), TOOLS)
    trained = trained_parts(case, samples)
    assert len(trained) == 4
    assert (len(samples) > 1) == case.rewrites


def trained_parts(case: Case, samples: list[tuple[list[int], list[int]]]) -> list[str]:
    """The texts that are trained on, each of which is a whole turn of the assistant."""
    tokenizer, trained = made(case), []
    for ids, mask in samples:
        whole = tokenizer.decode(ids)
        bits = "".join(tokenizer.decode([token]) if bit else "\x00" for token, bit in zip(ids, mask, strict=True))
        parts = [part for part in bits.split("\x00") if part]
        trained += parts
        # The turns of the assistant, found in the text by the family's own marks.
        spoken = [said.removeprefix(case.begun) for said in re.findall(case.said, whole, re.DOTALL)]
        assert parts == (spoken[-1:] if case.rewrites and len(parts) == 1 else spoken[-len(parts) :])
        if not case.rewrites:
            assert parts == spoken
    return trained


@pytest.mark.slow  # importing vLLM starts a process
def test_what_is_trained_on_is_read_as_the_calls_of_the_row():
    for case in CASES.values():
        tokenizer, conversation = made(case), turns(case.parallel)
        trained = trained_parts(case, render_samples(tokenizer, conversation, TOOLS))
        said = [turn for turn in conversation if turn.role == "assistant"]
        reader = CallReader(case.parser, tokenizer, TOOLS)
        for turn, part in zip(said, trained, strict=True):
            text = part.removesuffix(case.end)
            read = reader.read(tokenizer.encode(text, add_special_tokens=False), text)
            assert (read.problem, read.calls) == ("", turn.tool_calls)
            assert read.calls or text.endswith(turn.text)
        assert case.parser.startswith("llama") or parser_of(tokenizer, None) == case.parser


@pytest.mark.slow
def test_the_names_of_parsers_are_those_of_vllm():
    """Without the patch, which reads them from the source, they are known only once vLLM is imported."""
    from vllm.tool_parsers import ToolParserManager

    assert tool_parsers() == tuple(sorted(ToolParserManager.list_registered()))


def test_calls_that_no_parser_reads_are_told_before_a_run(tiny_tokenizer):
    """Of an episode whose policy is shown tools; a row without an environment may have them."""
    row = Row("r", "tools", (Message("user", "?"),), fields={"tools": TOOLS})
    name = "posttrain.environments.tool_use:tool_use"
    for parser, problem in ((None, "the chat template does not tell how calls look"), ("hermess", "got 'hermess'")):
        config = EnvironmentConfig(name=name, tool_parser=parser)
        with pytest.raises(ConfigError, match=f"environment.tool_parser: {problem}.* name one: .*hermes"):
            row_renderer(tiny_tokenizer, config)(row, row.messages)
    for config in (EnvironmentConfig(name=name, tool_parser="hermes"), None):
        assert row_renderer(tiny_tokenizer, config)(row, row.messages)


@pytest.mark.parametrize("name", CASES)
def test_a_call_as_the_reply_of_a_pair_is_trained_on_after_the_prompt_with_its_tools(name):
    case = CASES[name]
    tokenizer = made(case)
    asked = (Message("user", "3 + 4 kg?"),)
    pair = Pair("p", "sums", asked, "", "Eight.", {"tools": TOOLS}, FIRST)
    (ids,), _ = tokenize_pairs(tokenizer, [pair], 10_000, overlong="error")
    assert ids.prompt_ids == render_prompt(tokenizer, asked, TOOLS) != render_prompt(tokenizer, asked)
    ((whole, mask),) = render_samples(tokenizer, [*asked, Message("assistant", "", FIRST)], TOOLS)
    stop = len(ids.prompt_ids) + len(ids.chosen_ids)
    assert (ids.prompt_ids + ids.chosen_ids, ids.chosen_example().mask) == (whole[:stop], mask[:stop])
    assert not any(mask[stop:])
    assert tokenizer.decode(ids.rejected_ids).endswith(f"Eight.{case.end}")
    other = replace(pair, rejected="", rejected_calls=(ToolCall("add", {"a": 3, "b": 5}, "call00001"),))
    (ids,), _ = tokenize_pairs(tokenizer, [other], 10_000, overlong="error")
    assert ids.chosen_ids != ids.rejected_ids


def test_a_template_that_only_says_that_there_are_tools_is_refused():
    said = LLAMA4.replace("(tools | tojson)", "'see below'").replace("CALLS", PYTHONIC)
    case = replace(CASES["llama 4 pythonic"], template=said)
    with pytest.raises(DataError, match="leaves out the row's `tools`"):
        render_prompt(made(case), [Message("user", "3 + 4?")], TOOLS)
