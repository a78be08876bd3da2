"""Datasets: every format reads to the same rows, every bad row is named, nothing heavy is imported."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config.data import DataConfig
from posttrain.data import check_data, load_pairs, load_rows, write_pairs, write_rows
from posttrain.data.messages import FLAGS, INVERSE_FLAGS, messages_to_json, to_messages
from posttrain.data.pairs import check_pairs
from posttrain.errors import DataError
from posttrain.records import ImagePart, Message, Row, TextPart, ToolCall

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
def test_columns_of_prompt_and_reply_become_turns(tmp_path, reply):
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
    ({"body": "x", "id": 1}, "supervised", "no known format; its columns are: body, id; the formats are messages, "),
    ({"prompt": "x"}, "supervised", "near are kto (lacks completion or response, label); prompt_completion (lacks "),
    ({"text": "x"}, "prompt", "no known format; its columns are: text"),
    ({"messages": "hello"}, "supervised", "messages: got 'hello': must be a list"),
    ({"messages": []}, "supervised", "messages: got []: must be a list of at least one"),
    ({"messages": ["hello"]}, "supervised", "messages[0]: got 'hello': must be an object with 'role' and 'content'"),
    ({"messages": [{"role": "human", "content": "x"}]}, "prompt", "messages[0].role: got 'human': must be one of"),
    ({"messages": [{"role": "user", "content": 7}]}, "prompt", "messages[0].content: got 7: must be text"),
    ({"messages": [{"role": "user", "content": None}]}, "prompt", "messages[0].content: got None: must be text"),
    ({"messages": [{"role": "user", "content": " \n"}]}, "prompt", "messages[0].content: is empty"),
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
    assert check_data(path, "prompt", 9)[-1] == "and 4 more rows with problems"
    assert check_data(path, "prompt", 8)[-1] == "and 3 more rows with problems; only the first 8 rows were checked"


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
names = st.text(min_size=1)
arguments = st.dictionaries(st.text(), json_values, max_size=2)
images = st.builds(ImagePart, st.none() | names)
part_lists = st.lists(st.builds(TextPart, st.text()) | images, max_size=2).map(tuple)
user_contents = contents | st.builds(lambda image, parts: (image, *parts), images, part_lists)


@st.composite
def conversations(draw) -> tuple[Message, ...]:
    """A supervised conversation of up to three exchanges, with calls of tools, images and flags."""
    found = []
    for _ in range(draw(st.integers(0, 2))):
        found.append(Message("user", draw(user_contents), name=draw(st.none() | names)))
        if draw(st.booleans()):
            ids = draw(st.lists(names, min_size=1, max_size=2, unique=True))
            calls = tuple(ToolCall(draw(contents), draw(arguments), identity) for identity in ids)
            found.append(Message("assistant", draw(st.text()), calls, trained=draw(st.none() | st.booleans())))
            found += [
                Message("tool", draw(st.text()), tool_call_id=identity) for identity in draw(st.permutations(ids))
            ]
        found.append(Message("assistant", draw(contents), trained=draw(st.none() | st.booleans())))
    return (*found, Message("user", draw(contents)), Message("assistant", draw(contents)))


rows_strategy = st.builds(
    lambda messages, answer, fields: Row("r", "math", messages, answer, fields),
    conversations(),
    json_values,
    st.dictionaries(st.text().filter(lambda name: name not in own_names), json_values, max_size=3),
)


@given(rows_strategy)
def test_written_rows_read_back_equal(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("rows") / "d.jsonl"
    assert write_rows(path, [row]) == 1
    assert load_rows(path, kind="supervised") == [row]


OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [OPENAI_CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny"}


@pytest.mark.parametrize(
    "call",
    [
        OPENAI_CALL,
        {"id": "1", "function": {"name": "weather", "arguments": {"city": "Paris"}}},
        {"id": "1", "name": "weather", "arguments": {"city": "Paris"}},
        {"id": "1", "name": "weather", "arguments": '{"city":"Paris"}', "type": None, "function": None},
    ],
)
@pytest.mark.parametrize("empty", [{"content": ""}, {"content": None}, {}])
def test_calls_of_tools_are_read_in_every_form(tmp_path, call, empty):
    calling = {"role": "assistant", **empty, "tool_calls": [call], "name": None, "weight": None}
    path = write_lines(tmp_path / "d.jsonl", {"messages": [USER, calling, RESULT, ASSISTANT]})
    (row,) = load_rows(path, kind="supervised")
    assert row.messages == (
        Message("user", "2 + 2?"),
        Message("assistant", "", (ToolCall("weather", {"city": "Paris"}, "1"),)),
        Message("tool", "sunny", tool_call_id="1"),
        Message("assistant", "4"),
    )
    assert to_messages(messages_to_json(row.messages), "messages") == row.messages


def test_a_call_without_arguments_is_read_as_one_with_none(tmp_path):
    for nothing in ({}, {"arguments": ""}, {"arguments": "{}"}, {"arguments": None}):
        path = write_lines(
            tmp_path / "d.jsonl", {"messages": [USER, {**CALLING, "tool_calls": [{"name": "now", **nothing}]}]}
        )
        assert load_rows(path, kind="supervised")[0].messages[1].tool_calls == (ToolCall("now"),)


def test_a_table_gives_every_message_every_key_and_null_is_absent(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = ("content", "tool_calls", "tool_call_id", "name", "weight", "train", "reasoning_content", "loss")
    messages = [{**dict.fromkeys(keys), **item} for item in (USER, {**CALLING, "weight": 0.0}, RESULT, ASSISTANT)]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "d.parquet")
    (row,) = load_rows(tmp_path / "d.parquet", kind="supervised")
    call = ToolCall("weather", {"city": "Paris"}, "1")
    assert row.messages[1:3] == (
        Message("assistant", "", (call,), trained=False),
        Message("tool", "sunny", tool_call_id="1"),
    )
    assert row.messages[3] == Message("assistant", "4")


@pytest.mark.parametrize(
    ("flag", "trained"),
    [
        *[(flag, values) for flag in FLAGS for values in ((0, 1), (0.0, 1.0), (False, True))],
        *[(flag, (True, False)) for flag in INVERSE_FLAGS],
    ],
)
def test_turns_are_marked_as_context_or_trained_on(tmp_path, flag, trained):
    no, yes = trained
    path = write_lines(
        tmp_path / "d.jsonl", {"messages": [USER, {**ASSISTANT, flag: no}, USER, {**ASSISTANT, flag: yes}]}
    )
    (row,) = load_rows(path, kind="supervised")
    assert [message.trained for message in row.messages] == [None, False, None, True]
    write_rows(tmp_path / "again.jsonl", [row])
    assert load_rows(tmp_path / "again.jsonl", kind="supervised")[0].messages == row.messages


def test_text_parts_are_joined_and_images_keep_the_parts(tmp_path):
    text = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    references = [{"image": "a.png"}, {"path": "a.png", "url": None}, {"url": "a.png"}, {}]
    pictures = [{"type": "image", **reference} for reference in references]
    pictures += [{"type": "image_url", "image_url": form} for form in ("a.png", {"url": "a.png", "detail": "low"})]
    path = write_lines(
        tmp_path / "d.jsonl", *[{"messages": [{"role": "user", "content": content}]} for content in (text, pictures)]
    )
    joined, parts = (row.messages[0] for row in load_rows(path, kind="prompt"))
    assert joined == Message("user", "2 + 2?")
    picture = ImagePart("a.png")
    assert parts.content == (picture, picture, picture, ImagePart(), picture, picture)
    assert Message("user", (TextPart("a"), picture, TextPart("b"))).text == "ab"


NO_RESULT = "the call '1' has no result"
BAD_MESSAGES = [
    ([USER, {**ASSISTANT, "mask": 0}], "messages[1].mask: got 0: not a key of a message"),
    ([USER, {**ASSISTANT, "mask": 1}], "to leave an assistant turn out of training, write train: false"),
    ([USER, {**ASSISTANT, "loss_scale": 0.3}], "messages[1].loss_scale: got 0.3: must be true or 1, or false or 0"),
    ([USER, {**ASSISTANT, "thinking": "x"}], "messages[1].thinking: got 'x': not a key of a message (role, content, "),
    ([USER, {**ASSISTANT, "reasoning_content": "x"}], "write it in content, between the tags"),
    ([USER, {**ASSISTANT, "function_call": {"name": "x"}}], "write it as tool_calls"),
    ([USER, {**ASSISTANT, "prefix": True}], "messages[1].prefix: got True: not a key"),
    ([{**USER, "images": ["x.png"]}, ASSISTANT], "write it as a part of content"),
    ([{**USER, "foo": 1}, ASSISTANT], "messages[0].foo: got 1: not a key of a message"),
    ([{"role": "developer", "content": "x"}, USER, ASSISTANT], "set roles, such as roles: {developer: system}"),
    ([USER, {**ASSISTANT, "weight": 0.5}], "messages[1].weight: got 0.5: must be true or 1, or false or 0"),
    ([USER, {**ASSISTANT, "train": "no"}], "messages[1].train: got 'no': must be true or 1, or false or 0"),
    ([USER, {**ASSISTANT, "train": False, "weight": 1}], "train False and weight 1 contradict each other"),
    ([USER, {**ASSISTANT, "loss": True, "masked": True}], "loss True and masked True contradict each other"),
    ([{**USER, "train": True}, ASSISTANT], "messages[0].train: got True: only an assistant turn can be trained on"),
    ([{**USER, "weight": 1}, ASSISTANT], "messages[0].weight: got 1: only an assistant turn"),
    ([USER, {**ASSISTANT, "train": False}], "messages: no assistant turn is trained on"),
    ([{**USER, "tool_calls": [OPENAI_CALL]}, ASSISTANT], "messages[0].tool_calls: got"),
    ([{**USER, "tool_call_id": "1"}, ASSISTANT], "only a tool turn answers a call"),
    ([{**USER, "name": 3}, ASSISTANT], "messages[0].name: got 3: must be text"),
    ([USER, {**CALLING, "tool_calls": "x"}], "messages[1].tool_calls: got 'x': must be a list of calls"),
    ([USER, {**CALLING, "tool_calls": ["x"]}], "messages[1].tool_calls[0]: got 'x': must be an object"),
    ([USER, {**CALLING, "tool_calls": [{"id": 1}]}], "messages[1].tool_calls[0].name: got None: must be the name"),
    ([USER, {**CALLING, "tool_calls": [{"id": 1, "name": "f"}]}], "messages[1].tool_calls[0].id: got 1: must be text"),
    ([USER, {**CALLING, "tool_calls": [{"type": "custom"}]}], "tool_calls[0].type: got 'custom': must be function"),
    ([USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments: got '{': must be an object"),
    ([USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": [1]}]}], "arguments: got [1]: must be an object"),
    ([USER, {**CALLING, "tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}], "not JSON compliant"),
    ([USER, {**CALLING, "tool_calls": [OPENAI_CALL, OPENAI_CALL]}], "two calls have the id '1'"),
    ([USER, {"role": "assistant", "content": "", "tool_calls": []}], "messages[1].content: is empty"),
    ([USER, RESULT, ASSISTANT], "messages[1].role: got 'tool', expected 'assistant'"),
    ([USER, ASSISTANT, RESULT, ASSISTANT], "messages[2].role: got 'tool', expected 'user'"),
    (
        [USER, CALLING, USER, ASSISTANT],
        "messages[2].role: got 'user', expected 'tool': an assistant turn with tool_calls",
    ),
    ([USER, CALLING, RESULT, USER, ASSISTANT], "messages[3].role: got 'user', expected 'tool' or 'assistant'"),
    ([USER, CALLING, {**RESULT, "tool_call_id": "2"}, ASSISTANT], "messages[2].tool_call_id: got '2': must be the id"),
    ([USER, CALLING, RESULT, RESULT, ASSISTANT], "messages[3].tool_call_id: got '1': must be the id of a call"),
    ([USER, CALLING, {"role": "tool", "content": "x"}, RESULT, ASSISTANT], "1 tool_calls, but 2 results"),
    (
        [USER, {**CALLING, "tool_calls": [{**OPENAI_CALL, "id": "0"}, OPENAI_CALL]}, RESULT, ASSISTANT],
        "'0' has no result",
    ),
    ([USER, CALLING, RESULT], "the last turn is 'tool': a supervised row must end with 'assistant'"),
    (
        [{"role": "user", "content": [{"type": "audio"}]}, ASSISTANT],
        "content[0].type: got 'audio': must be text or image",
    ),
    ([{"role": "user", "content": ["x"]}, ASSISTANT], "messages[0].content[0]: got 'x': must be a part"),
    (
        [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT],
        "messages[0].content[0].text: got None: must be text",
    ),
    ([{"role": "user", "content": [{"type": "text", "text": ""}]}, ASSISTANT], "messages[0].content: is empty"),
    ([{"role": "user", "content": [{"type": "image", "image": 3}]}, ASSISTANT], "must be a path or a URI"),
]


@pytest.mark.parametrize(("messages", "problem"), BAD_MESSAGES, ids=[problem[-40:] for _, problem in BAD_MESSAGES])
def test_a_bad_message_is_named_with_the_rule(tmp_path, messages, problem):
    path = write_lines(tmp_path / "d.jsonl", {"messages": messages})
    with pytest.raises(DataError) as error:
        load_rows(path, kind="supervised")
    assert str(error.value).startswith(f"{path}: row 1: messages")
    assert problem in str(error.value)


def test_prompts_end_with_a_user_or_tool_turn(tmp_path):
    path = write_lines(
        tmp_path / "d.jsonl", {"messages": [USER, CALLING, RESULT]}, {"messages": [USER, ASSISTANT, USER]}
    )
    assert [row.messages[-1].role for row in load_rows(path, kind="prompt")] == ["tool", "user"]
    path = write_lines(tmp_path / "d.jsonl", {"messages": [USER, CALLING]})
    with pytest.raises(DataError, match="the last turn is 'assistant': a prompt must end with 'user' or 'tool'"):
        load_rows(path, kind="prompt")


PICTURE = {"role": "user", "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what?"}]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [USER, ASSISTANT, PICTURE]}, "row 2: messages[2] has an image; stage rl works on text only"),
        ({"messages": [USER], "images": ["x.png"]}, "row 2: images: got ['x.png']; stage rl works on text only"),
        (
            {"messages": [USER], "tools": "calculate"},
            "row 2: tools: got 'calculate': must be a list of function schemas",
        ),
    ],
)
def test_what_a_stage_cannot_use_is_refused_in_its_name(tmp_path, row, problem):
    empty = {"messages": [USER], "images": [], "tools": None}
    path = write_lines(tmp_path / "d.jsonl", empty, row)
    assert len(load_rows(path, kind="prompt")) == 2
    with pytest.raises(DataError) as error:
        load_rows(path, kind="prompt", stage="rl")
    assert problem in str(error.value)
    assert check_data(path, "prompt", stage="rl") == [str(error.value)]


@pytest.mark.parametrize("stage", ["filter", "sft", "rl", "dpo", "eval"])
def test_images_are_refused_for_every_stage_while_its_config_is_checked(tmp_path, stage):
    from posttrain.pipeline.inputs import data_problems
    from posttrain.pipeline.kinds import KINDS, kind_name

    assert kind_name(KINDS[stage]) == stage
    (rows,) = set(KINDS[stage].data.values()) - {"any"}
    row = {"chosen": "a", "rejected": "b"} if rows == "pairs" else {}
    name = "prompt" if rows == "pairs" else "messages"
    turns = [PICTURE, ASSISTANT] if rows == "supervised" else [PICTURE]
    path = write_lines(tmp_path / "d.jsonl", {**row, name: turns})
    (problem,) = data_problems(DataConfig(path=str(path)), rows, stage)
    assert f"d.jsonl: row 1: {name}[0] has an image; stage {stage} works on text only" in problem


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "d.jsonl"
    write_rows(path, [EXPECTED])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [EXPECTED, Row("b", "math", EXPECTED.messages, float("nan"))])
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["d.jsonl"]


def test_pairs_are_read_in_every_form(tmp_path):
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


def test_turns_of_tools_in_the_prompt_of_a_pair(tmp_path):
    other = {**ASSISTANT, "content": "5"}
    start = [USER, CALLING, RESULT]
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": start, "chosen": "4", "rejected": "5"},
        {"chosen": [*start, ASSISTANT], "rejected": [*start, other]},
        {"prompt": [USER], "chosen": [CALLING], "rejected": "5"},
        {"prompt": [USER], "completion": [CALLING], "label": True},
        {"prompt": [USER], "completion": "5", "label": False},
    )
    pairs = load_pairs(path, stage="dpo")
    first, second, calling, labelled = pairs
    assert first.prompt == second.prompt
    call = ToolCall("weather", {"city": "Paris"}, "1")
    assert first.prompt[1].tool_calls == (call,)
    assert calling.replies == labelled.replies == (Message("assistant", "", (call,)), Message("assistant", "5"))
    write_pairs(tmp_path / "again.jsonl", pairs)
    assert load_pairs(tmp_path / "again.jsonl") == pairs


BAD_PAIRS = [
    ({"prompt": [USER, CALLING], "chosen": "a", "rejected": "b"}, "the last turn is 'assistant': a prompt must end"),
    ({"prompt": [USER], "chosen": [CALLING], "rejected": [CALLING]}, "the same text"),
    ({"prompt": [USER], "chosen": [{**ASSISTANT, "weight": 0}], "rejected": "b"}, "both replies of a pair are trained"),
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
