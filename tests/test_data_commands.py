"""`posttrain data`: what it counts, shows and writes."""

import json
from pathlib import Path

import pytest

from posttrain.base.tokenizer import build_tokenizer, save_tokenizer
from posttrain.cli.main import main
from posttrain.data import load_pairs, load_rows


def row(number: int, **more: object) -> dict[str, object]:
    turns = [("human", f"Sum: {number} + 1"), ("gpt", f"Answer: {number + 1}")]
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    given = [row(1, capability="math"), row(2), row(1), {"prompt": "Sum: 5 + 5", "completion": "Answer: 10"}]
    path.write_text("".join(json.dumps(item) + "\n" for item in given))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(build_tokenizer(), folder)
    return folder


def test_inspect_counts_rows_formats_capabilities_and_lengths(rows, model, capsys):
    assert main(["data", "inspect", str(rows), "--model", str(model), "--max-length", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["rows"], found["bad_rows"], found["duplicates"]) == ("supervised", 4, 0, 1)
    assert found["formats"] == {"sharegpt": 3, "prompt_completion": 1}
    assert found["capabilities"] == {"general": 3, "math": 1}
    assert sum(count for *_, count in found["histogram"]) == 4
    assert found["lengths"]["sum"] == 4 * 17  # begin, two headers of 4, four words and an end, two words and an end
    assert found["over_max_length"] == 1.0


def test_inspect_names_bad_rows_and_fails(rows, capsys):
    rows.write_text(rows.read_text() + '{"body": 1}\n' * 7)
    assert main(["data", "inspect", str(rows)]) == 2
    out = capsys.readouterr().out
    assert out.startswith("4 supervised rows, 7 bad, 1 duplicates\n")
    assert out.count("no known format") == 5


def test_inspect_tells_prompts_and_pairs(tmp_path, capsys):
    kinds = {"prompt": {"prompt": "x"}, "pairs": {"prompt": "x", "chosen": "a", "rejected": "bc"}}
    for kind, item in kinds.items():
        (tmp_path / "d.jsonl").write_text(json.dumps(item) + "\n")
        assert main(["data", "inspect", str(tmp_path / "d.jsonl"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["kind"], found["rows"], found["lengths"]["max"]) == (kind, 1, 1 if kind == "prompt" else 3)


def test_convert_writes_messages(rows, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(rows), str(out)]) == 0
    assert capsys.readouterr().out == f"4 rows: {out}\n"
    assert load_rows(out, kind="supervised") == load_rows(rows, kind="supervised")
    rows.write_text(rows.read_text() + '{"body": 1}\n')
    out.unlink()
    assert main(["data", "convert", str(rows), str(out)]) == 2
    assert not out.exists()
    assert main(["data", "convert", str(rows), str(out), "on_bad_row=set_aside"]) == 0
    assert "4 rows" in (said := capsys.readouterr().out)
    assert "1 left out, the first: " in said


def test_convert_joins_labelled_replies(tmp_path):
    given = [{"prompt": "x", "completion": text, "label": text == "a"} for text in "ab"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(item) + "\n" for item in given))
    assert main(["data", "convert", str(tmp_path / "d.jsonl"), str(tmp_path / "o.jsonl"), "--kind", "pairs"]) == 0
    (pair,) = load_pairs(tmp_path / "o.jsonl")
    assert (pair.chosen, pair.rejected) == ("a", "b")


def test_preview_marks_what_is_trained_on(rows, model, capsys):
    assert main(["data", "preview", str(rows), "--model", str(model), "--rows", "1", "--ids"]) == 0
    out = capsys.readouterr().out
    assert "--- d.jsonl:1\n<|begin_of_text|><|header_start|>user<|header_end|>\n\nSum: 1 + 1<|eot|>" in out
    assert "[[Answer: 2<|eot|>]]" in out
    assert "--- d.jsonl:2" not in out
    tokens = build_tokenizer()("Answer: 2<|eot|>", add_special_tokens=False)["input_ids"]
    assert str(tokens) in out


def test_an_unknown_kind_is_refused(rows, capsys):
    assert main(["data", "inspect", str(rows), "--kind", "chats"]) == 2
    assert "must be one of supervised, prompt, pairs" in capsys.readouterr().err
