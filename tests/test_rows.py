"""Datasets: every format reads to the same rows, every bad row is named, nothing heavy is imported."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.shared import DataConfig
from posttrain.data import check_data, load_pairs, load_rows, write_pairs, write_rows
from posttrain.data.pairs import check_pairs
from posttrain.errors import DataError
from posttrain.records import Message, Row

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
GOOD = {"id": "a", "capability": "math", "messages": [USER, ASSISTANT], "answer": "4", "level": 3}
EXPECTED = Row("a", "math", (Message("user", "2 + 2?"), Message("assistant", "4")), "4", {"level": 3})


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def make_jsonl(folder: Path) -> Path:
    return write_lines(folder / "d.jsonl", GOOD)


def make_json(folder: Path) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps([GOOD]))
    return path


def make_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([GOOD]), folder / "d.parquet")
    return folder / "d.parquet"


def make_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "README.md").write_text("not data")
    make_jsonl(folder / "data")
    return folder


def make_saved_dataset(folder: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list([GOOD]).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("make", [make_jsonl, make_json, make_parquet, make_folder, make_saved_dataset])
def test_every_format_reads_to_the_same_row(tmp_path, make):
    assert load_rows(make(tmp_path), kind="supervised") == [EXPECTED]
    assert check_data(tmp_path if make is make_folder else make(tmp_path), "supervised") == []


def test_csv_holds_messages_as_json_text(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["id", "messages", "prompt", "response", "answer"])
        writer.writerow(["1", json.dumps([USER, ASSISTANT]), "", "", "4"])
        writer.writerow(["2", "", "hello\nthere", "hi", ""])
    first, second = load_rows(path, kind="supervised")
    assert (first.id, first.messages, first.answer) == ("1", EXPECTED.messages, "4")
    assert second.messages == (Message("user", "hello\nthere"), Message("assistant", "hi"))
    assert second.answer is None
    assert second.capability == "general"


@pytest.mark.parametrize("reply", ["completion", "response"])
def test_prompt_and_reply_columns(tmp_path, reply):
    system = {"role": "system", "content": "Be short."}
    path = write_lines(
        tmp_path / "d.jsonl", {"prompt": "2 + 2?", reply: "4"}, {"prompt": [system, USER], reply: [ASSISTANT], "k": 1}
    )
    text, turns = load_rows(path, kind="supervised")
    assert text.messages == EXPECTED.messages
    assert [message.role for message in turns.messages] == ["system", "user", "assistant"]
    assert turns.fields == {"k": 1}
    as_prompt = load_rows(path, kind="prompt")
    assert as_prompt[0].messages == (Message("user", "2 + 2?"),)
    assert as_prompt[0].fields == {reply: "4"}


def test_ids_made_of_file_and_line_stay_unique_over_files_of_one_name(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "d.jsonl", {"messages": [USER]}, "", {"messages": [USER]})
    rows = load_rows([tmp_path / "one" / "d.jsonl", tmp_path / "two" / "d.jsonl"], kind="prompt")
    assert [row.id for row in rows][:2] == ["d.jsonl:1", "d.jsonl:3"]
    assert len({row.id for row in rows}) == 4


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD_ROWS = [
    ({"text": "x"}, "supervised", "no 'messages' (and no 'prompt'); its fields are: text"),
    ({"prompt": "x"}, "supervised", "a 'prompt' without 'completion' or 'response'"),
    ({"messages": "hello"}, "supervised", "messages: got 'hello': must be a list"),
    ({"messages": []}, "supervised", "messages: got []: must be a list of at least one"),
    ({"messages": ["hello"]}, "supervised", "messages[0]: got 'hello': must be an object with 'role' and 'content'"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "prompt", "messages[0].role: got 'tool': must be one of"),
    ({"messages": [{"role": "user", "content": 7}]}, "prompt", "messages[0].content: got 7: must be text"),
    ({"messages": [{"role": "user", "content": None}]}, "prompt", "messages[0].content: got None: must be text"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "prompt", "messages[0].content: is empty"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]}, "supervised", "messages[1].tool_calls: got"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "prompt", "half of a surrogate pair"),
    (turns("user", "user", "assistant"), "supervised", "messages[1].role: got 'user', expected 'assistant'"),
    (turns("assistant", "user"), "prompt", "messages[0].role: got 'assistant', expected 'user'"),
    (turns("user", "system", "assistant"), "supervised", "messages[1].role: got 'system', expected 'assistant'"),
    (turns("system"), "prompt", "the last turn is 'system': a prompt must end with 'user'"),
    (turns("user"), "supervised", "the last turn is 'user': a supervised row must end with 'assistant'"),
    (turns("user", "assistant"), "prompt", "the last turn is 'assistant': a prompt must end with 'user'"),
    ({**GOOD, "id": 1.5}, "supervised", "id: got 1.5: must be text or a whole number"),
    ({**GOOD, "capability": 3}, "supervised", "capability: got 3: must be a name"),
    ({**GOOD, "id": "first"}, "supervised", "id 'first': already used by"),
    ([1], "supervised", "holds list, but must hold an object"),
    ("{broken", "supervised", "not JSON: "),
    ('{"messages": NaN}', "supervised", "NaN is not a JSON value"),
]


@pytest.mark.parametrize(("row", "kind", "problem"), BAD_ROWS, ids=[problem[:40] for _, _, problem in BAD_ROWS])
def test_a_bad_row_is_named_with_its_number_and_the_rule(tmp_path, row, kind, problem):
    first = {"id": "first", **turns("user", "assistant" if kind == "supervised" else "user")}
    first["messages"] = first["messages"][: 1 if kind == "prompt" else 2]
    path = write_lines(tmp_path / "train.jsonl", first, "", row)
    with pytest.raises(DataError) as error:
        load_rows(path, kind=kind)
    assert str(error.value).startswith(f"{path}: row 3: ")
    assert problem in str(error.value)
    assert check_data(path, kind) == [str(error.value)]


def test_many_bad_rows_are_counted_not_all_printed(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", *[{"x": 1}] * 9)
    with pytest.raises(DataError) as error:
        load_rows(path, kind="prompt")
    assert len(str(error.value).splitlines()) == 6
    assert str(error.value).endswith("and 4 more rows with problems")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": "\xff"}\n')
    with pytest.raises(DataError, match=r"d.jsonl: row 2: not UTF-8 \(byte 0xff at position 15\)"):
        load_rows(path, kind="supervised")
    other = tmp_path / "d.csv"
    other.write_bytes(b"prompt,response\na,\xe9\n")
    with pytest.raises(DataError, match=r"d.csv: line 2: not UTF-8 \(byte 0xe9\)"):
        load_rows(other, kind="supervised")


def test_a_byte_order_mark_is_not_data(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert load_rows(path, kind="supervised") == [EXPECTED]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.jsonl", b"\n\n", "holds no rows"),
        ("d.json", b'{"a": 1}', "holds dict, but must hold a list"),
        ("d.json", b'{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("d.parquet", b"PAR1 no", "not a whole parquet file"),
        ("d.csv", b"prompt,response\nonly one\n", "row 1: does not have the header's 2 columns"),
        ("d.csv", b'prompt,response\n"open,x\n', "not CSV"),
        ("d.txt", b"x", "suffix '.txt': must be one of"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(path, kind="supervised")
    assert str(error.value).startswith(str(path))
    assert problem in str(error.value)
    assert check_data(path, "supervised") == str(error.value).splitlines()


def test_a_wrong_path_suggests_the_nearest(tmp_path):
    write_lines(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean '.*train.jsonl'"):
        load_rows(tmp_path / "trian.jsonl", kind="supervised")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files in this folder"):
        load_rows(tmp_path / "empty", kind="supervised")


def test_a_dataset_of_several_splits_asks_for_one(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list([GOOD]), test=Dataset.from_list([GOOD])).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"holds several splits; name one of them: .*/d/test, .*/d/train"):
        load_rows(tmp_path / "d", kind="supervised")
    assert load_rows(tmp_path / "d" / "train", kind="supervised") == [EXPECTED]


def test_limit_reads_only_the_first_rows(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b"}, "{broken")
    assert [row.id for row in load_rows(DataConfig(path=str(path), limit=2), kind="supervised")] == ["a", "b"]
    assert [row.id for row in load_rows(DataConfig(path=str(path), limit=2), kind="supervised", limit=1)] == ["a"]


def test_check_looks_only_at_the_first_rows_and_not_at_references(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", GOOD, "{broken")
    assert check_data(path, "supervised", rows=1) == []
    assert len(check_data(path, "supervised", rows=2)) == 1
    assert check_data("${filter.kept}", "supervised") == []


def test_the_same_file_twice_is_a_duplicate(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(DataError, match="id 'a': already used by"):
        load_rows([path, path], kind="supervised")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
contents = st.text(min_size=1).filter(lambda text: text.strip())
own_names = {"id", "capability", "messages", "answer"}
rows_strategy = st.builds(
    lambda user, reply, answer, fields: Row(
        "r", "math", (Message("user", user), Message("assistant", reply)), answer, fields
    ),
    contents,
    contents,
    json_values,
    st.dictionaries(st.text().filter(lambda name: name not in own_names), json_values, max_size=3),
)


@given(rows_strategy)
def test_written_rows_read_back_equal(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("rows") / "d.jsonl"
    assert write_rows(path, [row]) == 1
    assert load_rows(path, kind="supervised") == [row]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "d.jsonl"
    write_rows(path, [EXPECTED])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [EXPECTED, Row("b", "math", EXPECTED.messages, float("nan"))])
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["d.jsonl"]


def test_pairs_in_their_forms(tmp_path):
    conversation = {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "5"}]}
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "reason": "wrong"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "5"}]},
        conversation,
        {**conversation, "prompt": "2 + 2?"},
    )
    pairs = load_pairs(path)
    assert {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs} == {((Message("user", "2 + 2?"),), "4", "5")}
    assert pairs[0].fields == {"reason": "wrong"}
    assert check_pairs(path) == []
    write_pairs(tmp_path / "again.jsonl", pairs)
    assert load_pairs(tmp_path / "again.jsonl") == pairs


BAD_PAIRS = [
    ({"prompt": "x", "chosen": "a"}, "no 'rejected'"),
    ({"chosen": "a", "rejected": "b"}, "no 'prompt'"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "the same text"),
    ({"prompt": [ASSISTANT], "chosen": "a", "rejected": "b"}, "prompt[0].role: got 'assistant', expected 'user'"),
    ({"prompt": "x", "chosen": [USER], "rejected": "b"}, "chosen: the last turn is 'user'"),
    ({"chosen": [USER, ASSISTANT], "rejected": "b"}, "do not begin with the same turns"),
    ({"prompt": "y", "chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "5"}]}, "is not the"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_PAIRS, ids=[problem[:30] for _, problem in BAD_PAIRS])
def test_a_bad_pair_is_named(tmp_path, row, problem):
    path = write_lines(tmp_path / "p.jsonl", row)
    with pytest.raises(DataError) as error:
        load_pairs(path)
    assert str(error.value).startswith(f"{path}: row 1: ")
    assert problem in str(error.value)


@pytest.mark.slow
def test_reading_rows_imports_neither_torch_nor_datasets(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", GOOD)
    code = (
        "import sys; from posttrain.data import check_data; from posttrain.sft.config import SftConfig;"
        "from posttrain.dpo.config import DpoConfig;"
        f"assert check_data({str(path)!r}, 'supervised') == [];"
        "assert not {'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
