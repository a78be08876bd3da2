"""Verdicts are kept as they arrive: in a file that a kill cannot spoil, and that the next run of the filter reads."""

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import ENGINE

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.files import read_jsonl
from posttrain.filtering.config import FilterConfig
from posttrain.judging import cache as caching
from posttrain.judging.backend import PreparedJudge
from posttrain.judging.cache import VerdictCache
from posttrain.judging.prompts import JudgePrompts, Question
from posttrain.judging.verdicts import Verdict, verdict_of

LABELS = ["easy", "medium", "hard"]


def judge_of(model: Path, tokenizer: Any, **values: Any) -> PreparedJudge:
    data = {"judge": {"path": str(model), "dtype": "float32"}, "data": {"path": "rows.jsonl"}, **values}
    config = validate_config(FilterConfig, data, "test")
    return PreparedJudge(config, JudgePrompts(config, tokenizer), None)


@pytest.fixture
def judge(tiny_model: Path, tiny_tokenizer: Any) -> PreparedJudge:
    return judge_of(tiny_model, tiny_tokenizer)


@given(st.lists(st.floats(-40, 0), min_size=2, max_size=20, unique=True))
def test_a_verdict_comes_back_bit_by_bit(logprobs: list[float]) -> None:
    import msgspec

    verdict = verdict_of([f"label {index}" for index in range(len(logprobs))], logprobs)
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict) == verdict


def test_a_question_is_known_by_what_the_judge_reads(tmp_path: Path, judge: PreparedJudge) -> None:
    verdict = verdict_of(LABELS, [-0.1, -1.0, -3.0])
    with VerdictCache(tmp_path / "verdicts" / "filter.sqlite", judge) as cache:
        cache.add(Question("a", "text", (1, 2, 3)), verdict)
    with VerdictCache(tmp_path / "verdicts" / "filter.sqlite", judge) as cache:
        assert cache.get(Question("b", "text", (1, 2, 3))) == verdict
        assert [cache.get(Question("a", "text", ids)) for ids in ((1, 2), (1, 2, 3, 0), (3, 2, 1), ())] == [None] * 4


def test_another_judge_has_its_own_verdicts(tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any) -> None:
    import shutil

    moved, other = (Path(shutil.copytree(tiny_model, tmp_path / name)) for name in ("moved", "other"))
    with (other / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        last = weights.read(1)
        weights.seek(-1, 2)
        weights.write(bytes([last[0] ^ 1]))
    question, file = Question("a", "text", (1, 2, 3)), tmp_path / "filter.sqlite"
    with VerdictCache(file, judge_of(tiny_model, tiny_tokenizer)) as cache:
        cache.add(question, verdict_of(LABELS, [0.0, 0.0, 0.0]))

    def knows(model: Path, **values: Any) -> bool:
        with VerdictCache(file, judge_of(model, tiny_tokenizer, **values)) as cache:
            return cache.get(question) is not None

    assert knows(moved)
    assert knows(tiny_model, keep_fraction=0.1, stratify=False)
    assert knows(tiny_model, engine={"max_num_seqs": 7})
    assert not knows(other)
    assert not knows(tiny_model, labels=["easy", "hard"])


def test_what_is_not_yet_in_the_file_does_not_spoil_it(
    tmp_path: Path, judge: PreparedJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer is left in the middle of a transaction, as a kill leaves it."""
    file, verdict = tmp_path / "filter.sqlite", verdict_of(LABELS, [0.0, 0.0, 0.0])
    writer = VerdictCache(file, judge)
    monkeypatch.setattr(caching, "COMMIT_S", 0.0)
    writer.add(Question("a", "", (1,)), verdict)  # committed at once
    monkeypatch.setattr(caching, "COMMIT_S", 1e9)
    writer.add(Question("b", "", (2,)), verdict)
    for name in (file.name, f"{file.name}-wal"):  # what a new process finds after the kill
        (tmp_path / "killed").mkdir(exist_ok=True)
        (tmp_path / "killed" / name).write_bytes((tmp_path / name).read_bytes())
    with VerdictCache(tmp_path / "killed" / file.name, judge) as cache:
        assert [cache.get(Question("x", "", (token,))) for token in (1, 2)] == [verdict, None]
        cache.add(Question("b", "", (2,)), verdict)


def test_a_file_that_holds_something_else_is_told(tmp_path: Path, judge: PreparedJudge) -> None:
    (tmp_path / "filter.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(StageError, match=r"filter\.sqlite: the verdicts in it cannot be read .* delete it"):
        VerdictCache(tmp_path / "filter.sqlite", judge)


# --- a real filter, killed ---

NUM_ROWS, KILLED_AT = 192, 65
# The pause lets the last verdict before the kill be written together with all before it.
CHILD = f"""
import json, os, signal, sys, time
from pathlib import Path
from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.rows import load_rows
from posttrain.filtering.config import FilterConfig
from posttrain.filtering.stage import filter_rows
from posttrain.judging.cache import COMMIT_S
from posttrain.pipeline.ray_session import ray_session

class Killed(StageContext):
    def progress(self, done, total, unit, *, values=None):
        if done == {KILLED_AT - 1}:
            time.sleep(COMMIT_S)
        if done == {KILLED_AT}:
            os.kill(os.getpid(), signal.SIGKILL)

config = validate_config(FilterConfig, json.loads(sys.argv[1]), "test")
folder = Path(sys.argv[2])
with ray_session():
    filter_rows(load_rows(config.data, kind="supervised"), config, Killed("filter", folder, folder / "events.jsonl"))
"""


@pytest.fixture
def data(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    rows = [
        {"id": f"r{i}", "capability": "math" if i % 3 else "chat", "prompt": f"Sum: {i} + {i % 7}", "completion": "1"}
        for i in range(NUM_ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "judge": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "template": "Rate: {prompt}",
        "engine": ENGINE,
        "resources": {"judge": {"cpus": 0.5}},
    }


@pytest.mark.slow
def test_a_filter_that_was_killed_rates_the_rows_that_are_left(
    tmp_path: Path, data: dict[str, Any], ray_session: None
) -> None:
    from posttrain.data.rows import load_rows
    from posttrain.filtering.stage import FilterResult, filter_rows

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for folder in (killed, undisturbed):
        folder.mkdir()
    child = subprocess.run([sys.executable, "-c", CHILD, json.dumps(data), str(killed)], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    with closing(sqlite3.connect(killed / "verdicts" / "filter.sqlite")) as file:
        ((num_known,),) = file.execute("SELECT count(*) FROM verdicts").fetchall()
    assert KILLED_AT - 1 <= num_known <= KILLED_AT  # the last one may have begun a new transaction

    def run(folder: Path, **changes: Any) -> tuple[FilterResult, list[dict[str, Any]]]:
        config = validate_config(FilterConfig, {**data, **changes}, "test")
        (folder / "events.jsonl").unlink(missing_ok=True)
        context = StageContext("filter", folder, folder / "events.jsonl", warm_engines=True)
        found = filter_rows(load_rows(config.data, kind="supervised"), config, context)
        return found, list(read_jsonl(context.events))

    expected, _ = run(undisturbed)
    resumed, events = run(killed)
    assert resumed.num_known == num_known
    done = [line["done"] for line in events if line["event"] == "progress"]
    assert done[0] == num_known + 1
    assert done[-1] == NUM_ROWS
    assert [row.id for row in resumed.kept] == [row.id for row in expected.kept]
    for name, verdict in resumed.verdicts.items():
        assert verdict.score == pytest.approx(expected.verdicts[name].score, abs=1e-4)

    selected, events = run(killed, keep_fraction=0.1, stratify=False)
    assert [line["event"] for line in events] == ["progress"]  # no engine was leased, and nobody was asked
    assert selected.verdicts == resumed.verdicts
    assert len(selected.kept) == 19
