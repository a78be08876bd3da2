"""Formats of rows, detected or declared, are read to the same conversation; unclear rows are refused."""

import json
from pathlib import Path

import pytest

from posttrain.config.data import DataConfig
from posttrain.data import check_data, load_pairs, load_rows, write_rows
from posttrain.data.samples import render_conversation, render_samples
from posttrain.errors import DataError
from posttrain.records import Message, ToolCall

USER, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
EXPECTED = (Message("user", "2 + 2?"), Message("assistant", "4"))
SYSTEM = Message("system", "Be brief.")


def data(folder: Path, *rows: object, **keys: object) -> DataConfig:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig.model_validate({"path": str(path), **keys})


def read(folder: Path, row: object, kind: str = "supervised", **keys: object) -> tuple[Message, ...]:
    return load_rows(data(folder, row, **keys), kind=kind)[0].messages  # type: ignore[arg-type]


def problem(folder: Path, row: object, kind: str = "supervised", **keys: object) -> str:
    with pytest.raises(DataError) as error:
        read(folder, row, kind, **keys)
    return str(error.value)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": [USER, REPLY]}, {}),
        ({"messages": json.dumps([USER, REPLY])}, {}),
        ({"messages": [USER, REPLY], "prompt": "2 + 2?", "prompt_id": "x"}, {}),
        ({"prompt": "2 + 2?", "completion": "4"}, {}),
        ({"prompt": [USER], "response": [REPLY]}, {}),
        ({"prompt": "2 + 2?", "completion": "4", "label": True}, {}),
        ({"prompt": "2 + 2?", "completion": "4", "label": 1}, {"format": "kto"}),
        ({"prompt": "2 + 2?", "completion": "4", "label": "sums"}, {}),
        ({"prompt": "2 + 2?", "completion": "4", "label": 0}, {"format": "prompt_completion"}),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, {}),
        ({"conversation": [USER, REPLY]}, {}),
        ({"messages": [{"from": "user", "value": "2 + 2?"}, {"from": "assistant", "value": "4"}]}, {}),
        ({"instruction": "2 + 2?", "input": "", "output": "4", "text": "Below is an instruction ..."}, {}),
        ({"instruction": "2 + 2?", "output": "4", "prompt": "x", "response": "y"}, {"format": "alpaca"}),
        ({"question": "2 + 2?", "gold": "4"}, {"columns": {"prompt": "question", "completion": "gold"}}),
        ({"dialog": [USER, REPLY]}, {"columns": {"messages": "dialog"}}),
        ({"messages": [{**USER, "role": "Q"}, {**REPLY, "role": "A"}]}, {"roles": {"Q": "user", "A": "assistant"}}),
        (
            {"conversations": [{"from": "Q", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            {"roles": {"Q": "user"}},
        ),
        ({"conversations": [{"from": "human", "value": "2 + 2?", "weight": None}, {"from": "gpt", "value": "4"}]}, {}),
    ],
)
def test_every_format_of_rows_reads_to_the_same_conversation(tmp_path, row, keys):
    assert read(tmp_path, row, **keys) == EXPECTED


def test_instruction_and_input_are_one_turn(tmp_path):
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert read(tmp_path, row) == (Message("user", "Add.\n\n2 and 2"), Message("assistant", "4"))
    assert read(tmp_path, row, "prompt") == (Message("user", "Add.\n\n2 and 2"),)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "4"},
        {"instruction": "2 + 2?", "output": "4"},
        {"messages": [USER, REPLY]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_a_system_column_becomes_the_first_turn(tmp_path, row):
    assert read(tmp_path, {"system": "Be brief.", **row}) == (SYSTEM, *EXPECTED)
    assert read(tmp_path, {"system": "", **row}) == EXPECTED


def test_history_comes_before_the_prompt(tmp_path):
    row = {"system": "Be brief.", "history": [["1 + 1?", "2"]], "prompt": "2 + 2?", "response": "4"}
    earlier = (Message("user", "1 + 1?"), Message("assistant", "2"))
    assert read(tmp_path, row) == (SYSTEM, *earlier, *EXPECTED)
    assert "beside a conversation" in problem(tmp_path, {"history": [["a", "b"]], "messages": [USER, REPLY]})


def test_calls_and_results_of_sharegpt_become_tool_calls_and_tool_turns(tmp_path):
    call = json.dumps({"name": "weather", "arguments": {"city": "Paris"}})
    turns = [("human", "Warm?"), ("function_call", call), ("observation", "21"), ("gpt", "Yes.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert read(tmp_path, row)[1:3] == (
        Message("assistant", "", (ToolCall("weather", {"city": "Paris"}),)),
        Message("tool", "21"),
    )


@pytest.mark.parametrize(
    "text", ['[{"name": "Ann"}, {"name": "Bo"}]', '[{"role": "assistant", "content": "hi"}]', "[{"]
)
def test_text_that_looks_like_json_stays_text(tmp_path, text):
    assert read(tmp_path, {"prompt": text, "completion": text}) == (Message("user", text), Message("assistant", text))
    assert read(tmp_path, {"instruction": text, "output": text})[1] == Message("assistant", text)
    (pair,) = load_pairs(data(tmp_path, {"prompt": text, "chosen": text, "rejected": "x"}))
    assert (pair.prompt, pair.chosen) == ((Message("user", text),), text)


@pytest.mark.parametrize(
    ("row", "kind", "found"),
    [
        ({"q": "x", "a": "y"}, "supervised", "its columns are: a, q; the formats are messages, sharegpt, "),
        ({"instruction": "x"}, "supervised", "near are alpaca (lacks output)"),
        ({"prompt": "x"}, "supervised", "prompt_completion (lacks completion or response)"),
        ({"text": "x"}, "prompt", "no known format; its columns are: text"),
        ({"chosen": "x", "rejected": "y"}, "supervised", "a preference pair, which the dpo stage reads"),
        ({"messages": [USER, REPLY], "conversations": [USER, REPLY]}, "supervised", "several formats: messages, share"),
        ({"messages": [USER, REPLY], "prompt": "other", "response": "4"}, "supervised", "several formats: messages, "),
        ({"prompt": "x", "completion": "y", "label": False}, "supervised", "a reply that is marked as bad"),
        ({"prompt": "x", "completion": "y", "label": 1}, "supervised", "set format: kto if it says"),
        ({"messages": [USER, REPLY], "system": 3}, "supervised", "system: got 3: must be the text of a system turn"),
        ({"messages": [USER, REPLY], "weight": 0.5}, "supervised", "weight: got 0.5: a whole row cannot be weighted"),
        ({"messages": [USER, REPLY], "train": False}, "supervised", "train: got False: a whole row"),
        ({"messages": [USER, REPLY], "input_ids": [1]}, "supervised", "rows of tokens cannot be read"),
        ({"messages": [USER, REPLY], "labels": [-100, 1]}, "supervised", "rows of tokens cannot be read"),
        ({"messages": [USER, REPLY], "chat_template_kwargs": {"a": 1}}, "supervised", "chat template is used as it is"),
        ({"messages": [USER, REPLY], "functions": [{"name": "f"}]}, "supervised", "write it as tools"),
        ({"prompt": "x", "completion": "y", "note": "cut \ud83d"}, "supervised", "note: character 5 is half of a surr"),
        ({"prompt": "x", "completion": "y", "deep": [{"a": "\ud83d"}]}, "supervised", "deep[0].a: character 1 is half"),
        ({"prompt": "x", "completion": "y", "\udc00": 1}, "supervised", "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_what_is_unclear_is_refused_by_name(tmp_path, row, kind, found):
    assert found in problem(tmp_path, row, kind)
    assert check_data(data(tmp_path, row), kind)


def test_declared_columns_and_formats_must_be_there(tmp_path):
    row = {"question": "x", "completion": "y"}
    assert "no column 'q', which columns.prompt names; its columns are: question" in problem(
        tmp_path, row, columns={"prompt": "q"}
    )
    assert "format: alpaca needs instruction and output" in problem(tmp_path, row, format="alpaca")
    assert "the row has 'prompt' too" in problem(tmp_path, {**row, "prompt": "z"}, columns={"prompt": "question"})


def test_flags_that_change_nothing_are_accepted(tmp_path):
    row = {"messages": [{**USER, "train": False, "weight": 0}, {**REPLY, "loss": 1}], "weight": 1.0, "train": True}
    assert read(tmp_path, row) == (EXPECTED[0], Message("assistant", "4", trained=True))


def test_numbers_that_cannot_be_written_again_are_found_on_reading(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "score": 1}\n{"prompt": "a", "score": 1e999}\n')
    with pytest.raises(DataError, match=r"d\.jsonl: row 2: not JSON: 1e999 is larger than any float64"):
        load_rows(path, kind="prompt")
    rows = [{"prompt": "a", "x": 1.0, "s": [1.0]}, {"prompt": "a", "x": float("nan"), "s": [float("nan")]}]
    for name, bad in (("s", rows), ("x", [{"prompt": "a", "x": 1.0}, {"prompt": "a", "x": float("-inf")}])):
        pq.write_table(pa.Table.from_pylist(bad), tmp_path / "d.parquet")
        with pytest.raises(DataError, match=rf"row 2: {name}.*which JSON cannot hold"):
            load_rows(tmp_path / "d.parquet", kind="prompt")


def test_keys_that_a_table_pads_with_null_are_absent(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tests = [[{"stdin": "1", "stdout": "2"}], [{"call": "f(1)", "expected": 2}]]
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "tests": item} for item in tests]), tmp_path / "d.parquet")
    assert [row.fields["tests"] for row in load_rows(tmp_path / "d.parquet", kind="prompt")] == tests


# --- texts without turns ---


def test_a_text_is_trained_on_as_it_stands(tmp_path):
    from posttrain.base.tokenizer import build_tokenizer

    tokenizer, config = build_tokenizer(), data(tmp_path, {"text": "Sum: 1 + 2<|eot|>"})
    (row,) = load_rows(config, kind="supervised")
    ids, mask = render_conversation(tokenizer, row.messages)
    render_samples(tokenizer, row.messages)
    assert tokenizer.decode(ids) == "<|begin_of_text|>Sum: 1 + 2<|eot|><|eot|>"
    assert ids.count(tokenizer.eos_token_id) == 1
    assert mask == [0] + [1] * (len(ids) - 1)
    write_rows(tmp_path / "again.jsonl", [row])
    assert load_rows(tmp_path / "again.jsonl", kind="supervised") == [row]


# --- pairs ---

OTHER = {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "2 + 2?", "chosen": [USER, REPLY], "rejected": [USER, OTHER], "score_chosen": 7.0}],
        [{"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
          "rejected": {"from": "gpt", "value": "5"}}],
        [{"instruction": "2 + 2?", "chosen": "4", "rejected": "5"}],
        [{"prompt": "2 + 2?", "completion": text, "label": text == "4"} for text in ("5", "4")],
    ],
)  # fmt: skip
def test_every_format_of_pairs_reads_to_the_same_pair(tmp_path, rows):
    (pair,) = load_pairs(data(tmp_path, *rows))
    assert (pair.prompt, pair.chosen, pair.rejected) == (EXPECTED[:1], "4", "5")


def test_the_format_of_pairs_can_be_declared(tmp_path):
    row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "completion": "4", "label": True}
    with pytest.raises(DataError, match="several formats: pairs, kto; set format"):
        load_pairs(data(tmp_path, row))
    assert load_pairs(data(tmp_path, row, format="pairs"))[0].rejected == "5"
    with pytest.raises(DataError, match="format: alpaca holds no preferences; set pairs or kto, or leave it out"):
        load_pairs(data(tmp_path, row, format="alpaca"))
    assert "format: pairs is for the dpo stage" in problem(tmp_path, row, format="pairs")


def test_columns_of_pairs_can_be_named(tmp_path):
    row = {"question": "2 + 2?", "good": "4", "bad": "5"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert load_pairs(data(tmp_path, row, columns=columns))[0].rejected == "5"


@pytest.mark.parametrize(
    "prompt",
    [
        "other?",
        [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "6"}, USER],
        [{"role": "system", "content": "Lie."}, USER],
    ],
)
def test_a_prompt_that_disagrees_with_the_turns_of_the_replies_is_refused(tmp_path, prompt):
    row = {"prompt": prompt, "chosen": [USER, REPLY], "rejected": [USER, OTHER]}
    with pytest.raises(DataError, match="row 1: 'prompt' is not the prompt that chosen and rejected begin with"):
        load_pairs(data(tmp_path, row))


def test_replies_with_labels_need_a_counterpart(tmp_path):
    rows = [{"prompt": f"{n} + 2?", "completion": "4", "label": True} for n in range(3)]
    with pytest.raises(DataError, match=r"3 of 3 prompts do not have as many replies .*'d.jsonl:1' has 1 and 0"):
        load_pairs(data(tmp_path, *rows))
