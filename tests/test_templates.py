"""Chat templates of many families: what is trained on is what sampling would send and produce, or it is refused."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from template_families import CHATML, FAMILIES, LLAMA4, R1, R1_TRAINING, Family, tokenizer_of

from posttrain.cli.main import main
from posttrain.cli.outcome import notice_text
from posttrain.config.base import validate_config
from posttrain.config.templates import ChatTemplateConfig, builtin_names
from posttrain.context import StageContext
from posttrain.data.chat import render_prompt
from posttrain.data.ends import end_token_ids, folder_end_ids, note_added_end
from posttrain.data.samples import render_conversation, render_reply, render_samples
from posttrain.data.templates import builtin_template, use_template
from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.files import write_jsonl
from posttrain.records import Message

IM = FAMILIES["chatml"]
# A reply whose marks end before the token that ends the turn.
MARKED = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
)


def conversation(family: Family, rng: random.Random, replies: int) -> list[Message]:
    words = ["sum", " 12", "\n", "é", "<|im_end|>", "the", " answer ", "日本", "</s>", "[INST]"]

    def text() -> str:
        return "x" + "".join(rng.choices(words, k=rng.randint(0, 6))) + "y"

    turns = [Message("system", text())] if family.has_system and rng.random() < 0.5 else []
    for _ in range(replies):
        thought = f"<think>\n{text()}\n</think>\n\n" if family.thinks or rng.random() < 0.5 else ""
        turns += [Message("user", text()), Message("assistant", thought + text())]
    return turns


def trained_parts(tokenizer, turns):
    """(the tokens before it, its tokens) for each run of tokens that is trained on, in order."""
    parts = []
    for ids, mask in render_samples(tokenizer, turns):
        starts = [at for at, bit in enumerate(mask) if bit and not mask[at - 1]]
        stops = [at + 1 for at, bit in enumerate(mask) if bit and not any(mask[at + 1 : at + 2])]
        parts += [(ids[:start], ids[start:stop]) for start, stop in zip(starts, stops, strict=True)]
    return parts


def trained_text(tokenizer, turns):
    return [tokenizer.decode(said) for _, said in trained_parts(tokenizer, turns)]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_before_a_trained_reply_is_the_prompt_of_a_rollout(name):
    family = FAMILIES[name]
    tokenizer, rng = tokenizer_of(family), random.Random(0)
    end, ends = tokenizer.convert_tokens_to_ids(family.end), set(end_token_ids(tokenizer))
    assert end in ends
    for _ in range(25):
        turns = conversation(family, rng, rng.randint(1, 3))
        replies = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        parts = trained_parts(tokenizer, turns)
        for index, (before, said) in zip(replies, parts, strict=True):
            assert before == render_prompt(tokenizer, turns[:index])
            assert said[-1] == end
            assert not ends & set(said[:-1])
            assert tokenizer.decode(said[:-1]).endswith(turns[index].text.split("</think>")[-1].strip())
            assert render_reply(tokenizer, turns[:index], turns[index].text) == (before, said)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_a_template_that_rewrites_turns_makes_several_samples(name):
    family = FAMILIES[name]
    thought = "<think>\nbecause\n</think>\n\n" if family.thinks else ""
    turns = [Message("system", "Be brief.")] if family.has_system else []
    turns += [Message(role, text) for role, text in (("user", "1 + 1?"), ("assistant", thought + "two")) * 2]
    assert len(render_samples(tokenizer_of(family), turns)) == (2 if family.rewrites else 1)


def test_a_turn_that_is_context_in_its_own_sample_is_written_as_the_template_rewrites_it():
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    turns = [Message(role, text) for role, text in (("user", "a?"), ("assistant", "<think>why</think>b")) * 2]
    first, second = (tokenizer.decode(ids) for ids, _ in render_samples(tokenizer, turns))
    asked, reply = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n", "<think>\nwhy\n</think>\n\nb<|im_end|>\n"
    assert first == asked + reply
    assert second == asked + "b<|im_end|>\n" + asked + reply
    with pytest.raises(DataError, match="becomes 2 samples"):
        render_conversation(tokenizer, turns)


def test_a_marked_template_that_rewrites_an_earlier_reply_is_noticed():
    rewriting = LLAMA4.replace("{{- m.content }}{% endgen", "{{- m.content if loop.last else m.content[-1] }}{% endgen")
    tokenizer = tokenizer_of(FAMILIES["llama4"], rewriting)
    turns = [Message(role, text) for role, text in (("user", "a?"), ("assistant", "bcd")) * 2]
    assert trained_text(tokenizer, turns) == ["bcd<|eot|>"] * 2
    assert len(render_samples(tokenizer, turns)) == 2
    render_samples(tokenizer, turns)


def test_turns_that_are_not_trained_on_make_no_sample():
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    turns = [Message("user", "a?"), Message("assistant", "b", trained=False)]
    turns += [Message("user", "c?"), Message("assistant", "d"), Message("user", "e?")]
    turns.append(Message("assistant", "f", trained=False))
    [(before, said)] = trained_parts(tokenizer, turns)
    assert tokenizer.decode(said).endswith("d<|im_end|>")
    assert before == render_prompt(tokenizer, turns[:3])


# --- refusals, each with the way out ---


def test_a_reply_that_does_not_begin_as_sampling_does_is_refused():
    single = [Message("user", "a?"), Message("assistant", "<think>\nwhy\n</think>\n\nb")]
    tokenizer = tokenizer_of(FAMILIES["r1"], R1)  # cuts the thinking that its own generation prompt begins
    with pytest.raises(DataError, match=r"opens a thinking block.*chat_template: .*builtin: NAME.*jinja"):
        render_samples(tokenizer, single)
    assert len(render_samples(tokenizer_of(FAMILIES["r1"], R1_TRAINING), single)) == 1
    with pytest.raises(DataError, match="the reply must begin with its thinking"):
        render_samples(tokenizer_of(FAMILIES["r1"], R1_TRAINING), [single[0], Message("assistant", "b")])


@pytest.mark.parametrize("name", ["r1", "thinking"])
def test_a_reply_sampled_inside_a_thinking_block_continues_that_block(name):
    tokenizer = tokenizer_of(FAMILIES[name])
    asked, end = [Message("user", "a?")], FAMILIES[name].end
    before, said = render_reply(tokenizer, asked, "why\n</think>\n\nb")
    assert before == render_prompt(tokenizer, asked)
    assert tokenizer.decode(before).endswith("<think>\n")
    assert tokenizer.decode(said) == "why\n</think>\n\nb" + end
    for cut in ("why, for", "why\n</think>\n\nb, f"):  # out of tokens, within the thinking or after it
        before, said = render_reply(tokenizer, asked, cut, ended=False)
        assert (before, tokenizer.decode(said)) == (render_prompt(tokenizer, asked), cut)


def test_gemma_without_a_system_role_names_the_way_out():
    with pytest.raises(DataError, match=r"System role not supported; set another chat template.*chat_template\.jinja"):
        render_prompt(tokenizer_of(FAMILIES["gemma"]), [Message("system", "s"), Message("user", "u")])


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>", ""),
        CHATML.replace("<|im_end|>", "<end>"),
        CHATML.replace("<|im_end|>", "{% if not loop.last or m.role == 'user' %}<|im_end|>{% endif %}"),
    ],
    ids=["no end", "an end that is no token", "no end after the last turn"],
)
@pytest.mark.parametrize("marks", [False, True])
def test_a_turn_that_ends_with_no_token_at_which_sampling_stops_is_refused(template, marks):
    if marks:
        template = template.replace("{{ m.content }}", MARKED)
    turns = [Message("user", "a?"), Message("assistant", "yes")]
    with pytest.raises(DataError, match=r"the last token of the turn is .*stops at '</s>'.*chat_template"):
        render_samples(tokenizer_of(IM, template), turns)


@pytest.mark.parametrize("marks", [False, True])
def test_a_special_token_that_ends_every_turn_is_a_token_at_which_sampling_stops(marks):
    content = "{{ m.content }}"
    if marks:
        content = MARKED
    family = Family(
        CHATML.replace("<|im_end|>", "<|done|>").replace("{{ m.content }}", content),
        (*IM.tokens, "<|done|>"),
        "<|done|>",
    )
    tokenizer = tokenizer_of(family)
    assert end_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["</s>", "<|done|>"])
    assert trained_text(tokenizer, [Message("user", "a?"), Message("assistant", "yes")]) == ["yes<|done|>"]


def test_a_token_before_the_end_of_a_turn_is_no_end():
    template = CHATML.replace("<|im_end|>", "<|over|><|im_end|>")
    family = Family(template, (*IM.tokens, "<|over|>"), "<|im_end|>", eos="<|im_end|>")
    tokenizer = tokenizer_of(family)
    assert end_token_ids(tokenizer) == [tokenizer.eos_token_id]
    assert trained_text(tokenizer, [Message("user", "a?"), Message("assistant", "yes")]) == ["yes<|over|><|im_end|>"]


def test_a_turn_that_goes_on_after_an_end_is_refused():
    tokenizer = tokenizer_of(IM, CHATML.replace("<|im_end|>\n", "<|im_end|>\nSigned: me<|im_end|>\n"))
    with pytest.raises(DataError, match=r"goes on with .* after '<\|im_end\|>', at which sampling stops"):
        render_samples(tokenizer, [Message("user", "a?"), Message("assistant", "yes")])


# --- end tokens ---


def test_end_tokens_come_from_the_folder_as_transformers_and_vllm_read_them(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["phi"])
    tokenizer.save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    eos, end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"), 7
    assert end_token_ids(tokenizer) == [eos, end]
    for file, content, found in (
        ("config.json", {"eos_token_id": None, "text_config": {"eos_token_id": other}}, [other]),
        ("config.json", {"eos_token_id": [other, eos]}, [other, eos]),
        ("generation_config.json", {}, [other, eos]),
        ("generation_config.json", {"eos_token_id": [9, 8]}, [9, 8]),
        ("generation_config.json", {"eos_token_id": 9}, [9]),
    ):
        (tmp_path / file).write_text(json.dumps(content))
        assert folder_end_ids(tmp_path) == found
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert end_token_ids(loaded) == [eos, 9, end]
    (tmp_path / "generation_config.json").write_text("{")
    assert folder_end_ids(tmp_path) == [other, eos]


def test_a_stage_is_told_of_an_end_that_only_the_template_names(tmp_path):
    context = StageContext("sft", tmp_path, tmp_path / "events.jsonl")
    note_added_end(tokenizer_of(FAMILIES["qwen3"]), context)
    assert not context.events.exists()
    note_added_end(tokenizer_of(FAMILIES["phi"]), context)
    event = json.loads(context.events.read_text())
    assert (event["event"], event["tokens"]) == ("end_token_added", ["<|end|>"])
    assert "the chat template ends replies with <|end|>, which" in notice_text("sft", event)


# --- validate ---


def folder_of(family, template=None):
    """The files of a model folder that `validate` reads, written into the current directory."""
    tokenizer = tokenizer_of(family, template)
    tokenizer.save_pretrained("model")
    Path("model/config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    Path("model/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return "model"


def checked(kind, config, capsys):
    """(exit code, output) of `posttrain validate`."""
    Path("c.yaml").write_text(yaml.safe_dump(config))
    code = main(["validate", "c.yaml", "--kind", kind])
    out, err = capsys.readouterr()
    return code, err or out


def turns_of(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def test_validate_renders_the_rows_of_sft(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl("rows.jsonl", [{"messages": turns_of("a?", "<think>\nw\n</think>\n\nb", "c?", "d")}] * 3)
    config: dict[str, Any] = {
        "model": {"path": folder_of(FAMILIES["qwen3"])},
        "data": {"path": "rows.jsonl"},
        "batch_tokens": 4096,
    }
    assert checked("sft", config, capsys)[0] == 0
    folder_of(FAMILIES["r1"], R1)
    code, said = checked("sft", config, capsys)
    assert code == 2
    assert re.search(
        r"c\.yaml: data: row 'rows.jsonl:1': the prompt before message 1 is not a prefix .*'<think>\\n'.*"
        r"chat_template: \{path: FILE\}.*chat_template\.jinja in the model folder \(3 of the first 3 rows\)",
        said,
    )
    write_jsonl("rows.jsonl", [{"messages": turns_of("a?", "<think>\nw\n</think>\n\nb")}])
    Path("mine.jinja").write_text(R1_TRAINING)
    config["model"]["chat_template"] = {"path": "mine.jinja"}
    assert checked("sft", config, capsys)[0] == 0
    config["model"]["chat_template"] = {"path": "none.jinja"}
    assert "model.chat_template.path: got 'none.jinja': no such file" in checked("sft", config, capsys)[1]
    config["model"]["chat_template"] = {"arguments": {"enable_thinking": False}}
    code, said = checked("sft", config, capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert "c.yaml: model: chat_template: arguments.enable_thinking: got False, but" in said


def test_validate_renders_prompts_pairs_and_the_judges_question(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = {"path": folder_of(FAMILIES["gemma"])}
    system = {"role": "system", "content": "s"}
    write_jsonl("prompts.jsonl", [{"messages": [system, *turns_of("a?")], "answer": "b"}])
    write_jsonl("pairs.jsonl", [{"prompt": [system, *turns_of("a?")], "chosen": "b", "rejected": "c"}])
    write_jsonl("bare.jsonl", [{"messages": turns_of("a?"), "answer": "b"}])
    reward = {"name": "exact_match"}
    refused = "the chat template refuses messages with roles ['system', 'user'"
    for kind, config, key in (
        ("eval", {"model": model, "data": {"path": "prompts.jsonl"}, "reward": reward}, "data: row"),
        ("dpo", {"model": model, "pairs": {"path": "pairs.jsonl"}}, "pairs: pair"),
        (
            "rl",
            {
                "model": model,
                "prompts": {"path": "bare.jsonl"},
                "reward": reward,
                "systems": {"instructions": [{"text": "Be brief."}]},
            },
            "prompts: row",
        ),
        (
            "rl",
            {
                "model": model,
                "prompts": {"path": "bare.jsonl"},
                "reward": reward,
                "evaluation": {"data": {"path": "prompts.jsonl"}},
            },
            "evaluation.data: row",
        ),
    ):
        code, said = checked(kind, config, capsys)
        assert code == 2
        assert f"c.yaml: {key} " in said
        assert refused in said
    write_jsonl("rows.jsonl", [{"messages": turns_of("a?", "b")}])
    config: dict[str, Any] = {"judge": model, "data": {"path": "rows.jsonl"}}
    assert checked("filter", config, capsys)[0] == 0
    config["judge"] = {**model, "chat_template": {"builtin": "chatml"}}
    assert "c.yaml: judge: chat_template: builtin: got 'chatml', which writes" in checked("filter", config, capsys)[1]


# --- the section of the config ---


def config(**keys):
    return validate_config(ChatTemplateConfig, keys, "chat_template")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"builtin": "qwen"}, "builtin: got 'qwen': no such template; did you mean 'qwen3'"),
        ({"builtin": "chatml", "path": "x.jinja"}, "remove one of them"),
        ({"arguments": {"messages": []}}, "'messages' is given by the stage"),
        ({"arguments": {"a b": 1}}, "'a b' is not the name of a variable"),
        ({"arguments": {"a": float("nan")}}, "a: got nan: must be text, a number"),
        ({"argument": {}}, "argument: unknown key; did you mean 'arguments'"),
    ],
)
def test_a_wrong_section_is_told_by_its_key(keys, problem):
    with pytest.raises(ConfigError, match=problem):
        config(**keys)


def test_arguments_decide_prompts_and_are_saved_with_the_tokenizer(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    turns = [Message("user", "a?"), Message("assistant", "b")]
    use_template(tokenizer, config(arguments={"enable_thinking": False}))
    assert tokenizer.decode(render_prompt(tokenizer, turns[:1])).endswith("assistant\n<think>\n\n</think>\n\n")
    assert trained_text(tokenizer, turns) == ["b<|im_end|>"]
    tokenizer.save_pretrained(tmp_path)
    saved = type(tokenizer).from_pretrained(tmp_path)
    assert render_prompt(saved, turns[:1]) == render_prompt(tokenizer, turns[:1])
    text = saved.apply_chat_template(
        [{"role": "user", "content": "a?"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert text.endswith("assistant\n")


@pytest.mark.parametrize("value", ['a "b" \\n\n%} {{ é😀', None, True, -1.5, ["x", {"y": [1]}]])
def test_an_argument_reaches_the_template_as_it_was_written(value):
    template = "\n{{ given | tojson }}" + CHATML
    tokenizer = tokenizer_of(IM, template)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, given=value)
    use_template(tokenizer, config(arguments={"given": value}))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == expected


def test_arguments_that_no_template_reads_are_refused():
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    with pytest.raises(
        ConfigError, match=r"arguments.thinking: got True, but .* reads no such variable; it reads enable_th"
    ):
        use_template(tokenizer, config(arguments={"thinking": True}))
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template; set chat_template"):
        use_template(tokenizer, config(arguments={"thinking": True}))


def test_a_file_takes_the_place_of_the_folders_template(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["r1"], R1)
    (tmp_path / "mine.jinja").write_text(R1_TRAINING)
    use_template(tokenizer, config(path=str(tmp_path / "mine.jinja")))
    assert tokenizer.chat_template == R1_TRAINING
    (tmp_path / "mine.jinja").write_text("a\n{% if %}")
    for path, problem in (("mine.jinja", "not a Jinja template: line 2"), ("none.jinja", "cannot be read")):
        with pytest.raises(ConfigError, match=problem):
            use_template(tokenizer, config(path=str(tmp_path / path)))


def test_a_builtin_template_must_write_what_the_models_own_writes():
    tokenizer = tokenizer_of(IM)
    use_template(tokenizer, config(builtin="chatml"))
    assert "generation" in tokenizer.chat_template
    render_samples(tokenizer, [Message("user", "a?"), Message("assistant", "b")])
    with pytest.raises(ConfigError, match=r"builtin: got 'chatml', which writes a prompt as .*take the family"):
        use_template(tokenizer_of(FAMILIES["llama3"]), config(builtin="chatml"))
    bare = tokenizer_of(IM)
    bare.chat_template = None
    use_template(bare, config(builtin="qwen3", arguments={"enable_thinking": False}))
    render_samples(
        bare, [Message("user", "a?"), Message("assistant", "b"), Message("user", "c?"), Message("assistant", "d")]
    )
    use_template(tokenizer_of(FAMILIES["qwen3"]), config(builtin="qwen3"))


def test_every_builtin_template_can_be_read():
    """Fails once TRL has moved its training templates: `compat.trl.training_templates` reads them from its folder."""
    names = builtin_names()
    assert {"chatml", "qwen3", "llama3", "gemma3", "phi3", "deepseek_r1_distill"} <= set(names)
    for name in names:
        assert "generation" in builtin_template(name)


THOUGHT = "<think>\nwhy\n</think>\n\n"
R1_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")


@pytest.mark.parametrize(
    ("builtin", "family", "reply"),
    [
        ("qwen3", FAMILIES["qwen3"], THOUGHT + "b"),
        ("llama3", FAMILIES["llama3"], "b"),
        ("gemma", FAMILIES["gemma"], "b"),
        ("phi3", FAMILIES["phi"], "b"),
        ("deepseek_r1_distill", Family("", R1_TOKENS, R1_TOKENS[-1], eos=R1_TOKENS[-1]), THOUGHT + "b"),
    ],
)
def test_families_that_trl_knows_are_trained_on_as_sampling_begins_them(builtin, family, reply):
    tokenizer = tokenizer_of(family, " ")
    tokenizer.chat_template = None
    use_template(tokenizer, config(builtin=builtin))
    turns = [Message(role, text) for role, text in (("user", "a?"), ("assistant", reply)) * 2]
    parts = trained_parts(tokenizer, turns)
    assert [before for before, _ in parts] == [render_prompt(tokenizer, turns[:1]), render_prompt(tokenizer, turns[:3])]
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert [(said[-1], said.count(end)) for _, said in parts] == [(end, 1)] * 2
