"""posttrain compare: two evaluations of the same rows, row by row."""

import json
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.cli.main import main
from posttrain.eval.compare import compare, find_evaluation, read_evaluation
from posttrain.files import read_jsonl, write_jsonl
from posttrain.metrics.paired import mcnemar_p, mean_difference


def test_mcnemar_by_hand():
    assert mcnemar_p(0, 0) == mcnemar_p(4, 4) == 1.0
    assert mcnemar_p(1, 5) == mcnemar_p(5, 1) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar_p(0, 10) == pytest.approx(2 / 1024)
    assert 0 <= mcnemar_p(0, 5000) < 1e-300
    with pytest.raises(ValueError, match="counts of 0 or more"):
        mcnemar_p(-1, 2)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_two_sided_tail_of_a_fair_coin(a: int, b: int):
    tail = sum(Fraction(comb(a + b, i), 2 ** (a + b)) for i in range(min(a, b) + 1))
    assert mcnemar_p(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def test_the_interval_of_a_difference_uses_that_rows_are_paired():
    """Rewards that differ much between rows and little within: two separate intervals would overlap by far."""
    a = [i / 100 for i in range(100)]
    b = [value + (0.04 if i % 4 else 0.06) for i, value in enumerate(a)]
    found = mean_difference(a, b)
    assert found.mean == pytest.approx(0.045)
    assert 0.04 < found.low < found.mean < found.high < 0.05


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=30))
def test_swapping_the_two_sides_negates_the_difference(pairs: list[tuple[float, float]]):
    a, b = [list(side) for side in zip(*pairs, strict=True)]
    one, other = mean_difference(a, b), mean_difference(b, a)
    assert one.mean == pytest.approx(-other.mean, abs=1e-9)
    assert one.low <= one.mean + 1e-9
    assert one.mean - 1e-9 <= one.high
    assert mean_difference([0.0] * 50, [0.0] * 50).low < 0 < mean_difference([0.0] * 50, [0.0] * 50).high


def write_evaluation(folder: Path, rewards: dict[str, float | None], **reward: Any) -> Path:
    """rewards: by row; the capability is the row's name up to its digits."""
    folder.mkdir(parents=True)
    lines = [
        {"id": name, "capability": name.rstrip("0123456789"), "prompt": [{"role": "user", "content": name}],
         "answer": "1", "reward": value}
        for name, value in rewards.items()
    ]  # fmt: skip
    write_jsonl(folder / "samples.jsonl", lines)
    (folder / "config.yaml").write_text(json.dumps({"reward": {"name": "final_answer", "args": {}, **reward}}))
    return folder


RIGHT = {**{f"math{i}": float(i < 3) for i in range(8)}, **{f"code{i}": float(i < 2) for i in range(4)}}
BETTER = {**{f"math{i}": float(i < 7) for i in range(8)}, **{f"code{i}": float(i in (1, 2)) for i in range(4)}}


def test_two_evaluations_are_compared_row_by_row(tmp_path: Path):
    a = read_evaluation(write_evaluation(tmp_path / "a", RIGHT))
    b = read_evaluation(write_evaluation(tmp_path / "b", dict(reversed(BETTER.items()))))  # in another order
    found = compare(a, b)
    assert list(found.entries) == ["code", "math", "all"]
    counts = {
        name: (entry.rows, entry.right_a, entry.right_b, entry.only_a, entry.only_b)
        for name, entry in found.entries.items()
    }
    assert counts == {"code": (4, 2, 2, 1, 1), "math": (8, 3, 7, 0, 4), "all": (12, 5, 9, 1, 5)}
    assert found.entries["math"].p == pytest.approx(2 / 16)
    assert found.entries["math"].accuracy.mean == found.entries["math"].reward.mean == 0.5
    assert compare(a, a).entries["all"].p == 1.0


def test_rows_with_pictures_are_compared_by_modality_too(tmp_path: Path):
    folders = [write_evaluation(tmp_path / name, rewards) for name, rewards in (("a", RIGHT), ("b", BETTER))]
    for folder in folders:
        lines = list(read_jsonl(folder / "samples.jsonl"))
        kinds = [{"modality": "image" if line["capability"] == "code" else "text"} for line in lines]
        write_jsonl(folder / "samples.jsonl", [line | kind for line, kind in zip(lines, kinds, strict=True)])
    found = compare(*map(read_evaluation, folders)).entries
    assert list(found) == ["code", "math", "modality: image", "modality: text", "all"]
    assert found["modality: image"] == found["code"]
    assert found["modality: text"] == found["math"]


def test_the_threshold_decides_what_is_right_and_unscored_rows_are_left_out(tmp_path: Path):
    a = write_evaluation(tmp_path / "a", {"x1": 0.5, "x2": 0.8, "x3": None}, correct_threshold=0.7)
    b = write_evaluation(tmp_path / "b", {"x1": 0.9, "x2": 0.8, "x3": 1.0}, correct_threshold=0.7)
    found = compare(read_evaluation(a), read_evaluation(b))
    entry = found.entries["all"]
    assert (entry.rows, entry.right_a, entry.right_b, found.unscored) == (2, 1, 2, 1)
    assert entry.reward.mean == pytest.approx(0.2)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["compare", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_other_rows_are_refused_unless_the_shared_ones_are_asked_for(tmp_path: Path, capsys):
    a = write_evaluation(tmp_path / "a", RIGHT)
    b = write_evaluation(tmp_path / "b", {**{name: BETTER[name] for name in list(BETTER)[:9]}, "math99": 1.0})
    code, _, err = run(capsys, a, b)
    assert code == 2
    assert "has 12 rows and" in err
    assert "has 10, of which 9 are the same (id, prompt and answer); add --shared to compare these" in err
    code, out, _ = run(capsys, a, b, "--shared", "--json")
    found = json.loads(out)
    assert (code, found["entries"]["all"]["rows"], found["left_out"]) == (0, 9, 4)
    c = write_evaluation(tmp_path / "c", {"other1": 1.0})
    code, _, err = run(capsys, a, c, "--shared")
    assert (code, "nothing to compare" in err) == (2, True)


def test_another_reward_is_refused(tmp_path: Path, capsys):
    a, b = (write_evaluation(tmp_path / name, RIGHT, name=name) for name in ("a", "b"))
    code, _, err = run(capsys, a, b)
    assert code == 2
    assert "reward.name: got a in" in err


def test_the_table_names_the_evaluations_and_each_capability(tmp_path: Path, capsys):
    write_evaluation(tmp_path / "run" / "sft" / "eval", RIGHT)
    write_evaluation(tmp_path / "run" / "rl" / "eval", BETTER)
    write_evaluation(tmp_path / "run" / "hard", {"x1": 1.0})
    code, out, _ = run(capsys, tmp_path / "run", tmp_path / "run", "--stage", "sft", "--stage", "rl")
    assert code == 0
    assert f"A: {tmp_path}/run/sft/eval" in out
    lines = [line.split() for line in out.splitlines()]
    assert next(line for line in lines if line[:1] == ["math"])[:5] == ["math", "8", "37.5%", "87.5%", "+50.0"]
    assert [line[0] for line in lines if line and line[0] in ("all", "code", "math")] == ["code", "math", "all"]
    assert run(capsys, tmp_path / "run" / "sft", tmp_path / "run" / "rl")[1] == out
    code, _, err = run(capsys, tmp_path / "run", tmp_path / "run")
    assert (code, "holds the evaluations of hard, rl, sft; choose one with --stage" in err) == (2, True)
    code, _, err = run(capsys, tmp_path / "run", tmp_path / "run", "--stage", "dpo")
    assert (code, "got 'dpo'" in err) == (2, True)
    code, _, err = run(capsys, tmp_path, tmp_path)
    assert (code, "holds no evaluation" in err) == (2, True)
    assert find_evaluation(tmp_path / "run", "hard") == tmp_path / "run" / "hard"
