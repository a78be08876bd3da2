"""What reading and preparing a dataset keeps in memory does not grow with its rows, but for a few bytes a row.

Python's own count of allocated bytes is compared between N and 4 N rows, so that neither the machine nor the page cache
has any influence. The constant sizes of buffers are made small, because otherwise they would hide the growth.
"""

import csv
import gc
import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import data_memory
import pytest
from rollout_records import one_turn

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data import arrays, bad_rows, json_list, places, stored
from posttrain.data.held_out import check_apart, prompt_key, split
from posttrain.data.rows import iter_rows, load_rows, store_rows
from posttrain.data.stored import Derived, Stored, store
from posttrain.dpo import stage as dpo_stage
from posttrain.dpo.config import DpoConfig
from posttrain.eval import stage as eval_stage
from posttrain.eval.config import EvalConfig
from posttrain.eval.replies import ScoredReplies, by_prompt, flights
from posttrain.filtering.config import FilterConfig
from posttrain.filtering.stage import VerdictsById
from posttrain.filtering.stage import split as split_rated
from posttrain.judging.verdicts import verdict_of
from posttrain.records import Message, RewardResult, Row, Scored, VersionSpan
from posttrain.rl import inputs
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.evaluation import heldout_rows
from posttrain.rl.prompts.band import select_band
from posttrain.rl.prompts.fingerprints import dataset_fingerprint
from posttrain.rl.prompts.profile import profiled_places
from posttrain.rl.prompts.source import prompt_source
from posttrain.sft import stage as sft_stage
from posttrain.sft.config import SftConfig
from posttrain.sft.packing import to_records
from posttrain.tune import steps
from posttrain.tune.steps import rows_and_blank

TEXT = "Think about each of the numbers, add one to the next, and tell me what you get. " * 20
FEW, MANY = 20, 80
KEPT_BYTES = 600  # a row; its text alone has 1,600 characters


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BATCH_BYTES", 1 << 12)
    monkeypatch.setattr(json_list, "CHUNK", 1 << 12)
    monkeypatch.setattr(bad_rows, "_NAMED_IDS", 10)
    monkeypatch.setattr(bad_rows, "_FIRST_TABLE", 16)
    monkeypatch.setattr(steps, "_BATCH_ROWS", 4)


def chats(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{number}: {TEXT}", "completion": f"{number}"} for number in range(count)]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bytes_of_a_row(job: Callable[[int], object], few: int = FEW, many: int = MANY) -> float:
    """How many more bytes are allocated at the most during `job`, with its result, for each row more."""
    job(few)  # imports and caches are not counted
    peaks = []
    for count in (few, many):
        gc.collect()
        tracemalloc.start()
        kept = job(count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del kept
    return (peaks[1] - peaks[0]) / (many - few)


@pytest.mark.parametrize("name", sorted(data_memory.JOBS))
def test_a_row_more_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What a stage holds for each row lies on disk: not even one number of 8 bytes a row is in memory.

    One array of N numbers, even for a moment, would be 8 bytes a row, and a set of ids more than 60.
    """
    monkeypatch.setattr(arrays, "BLOCK", 1 << 8)
    monkeypatch.setattr(stored, "BATCH_BYTES", 1 << 16)  # of each batch of rows, which is an object, there are few
    monkeypatch.setattr(data_memory, "TEXT", "Add 1.")
    job, make = data_memory.JOBS[name]
    few, many = 2_000, 6_000  # both fill every buffer of a constant size
    paths = {count: write(tmp_path / f"{count}.jsonl", make(count)) for count in (few, many)}
    assert bytes_of_a_row(lambda count: job(paths[count]), few, many) < 6


def context(folder: Path) -> StageContext:
    return StageContext("stage", folder, folder / "events.jsonl")


def test_rows_in_a_list_would_be_seen(tmp_path: Path) -> None:
    paths = {count: write(tmp_path / f"{count}.jsonl", chats(count)) for count in (FEW, MANY)}
    assert bytes_of_a_row(lambda count: load_rows(paths[count], kind="supervised")) > 3 * KEPT_BYTES


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_rows_of_every_format_are_read_and_stored_one_by_one(tmp_path: Path, suffix: str) -> None:
    paths = {count: tmp_path / f"{count}.{suffix}" for count in (FEW, MANY)}
    for count, path in paths.items():
        with path.open("w", newline="") as file:
            if suffix == "json":
                json.dump(chats(count), file)
            elif suffix == "csv":
                table = csv.DictWriter(file, ["prompt", "completion"])
                table.writeheader()
                table.writerows(chats(count))
        if suffix == "jsonl":
            write(path, chats(count))
    assert bytes_of_a_row(lambda count: sum(1 for _ in iter_rows(paths[count], kind="supervised"))) < KEPT_BYTES
    assert bytes_of_a_row(lambda count: store_rows(paths[count], kind="supervised", stage="sft")) < KEPT_BYTES


def test_bad_rows_do_not_stay_in_memory(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    paths = {n: write(tmp_path / f"{n}.jsonl", [good, *({**row, "tools": 3} for row in chats(n))]) for n in (FEW, MANY)}

    def job(count: int) -> Stored[Row]:
        config = files_config(paths[count], on_bad_row="set_aside")
        return store_rows(config, kind="supervised", stage="sft", context=context(tmp_path))

    assert bytes_of_a_row(job) < KEPT_BYTES
    assert len((tmp_path / f"set_aside_{MANY}.jsonl").read_text().splitlines()) == MANY


def files_config(path: Path, **keys: Any) -> Any:
    from posttrain.config.data import DataConfig

    return DataConfig(path=str(path), **keys)


def test_what_sft_prepares_lies_on_disk(tmp_path: Path, policy: Path) -> None:
    """From the file of rows to the rows of the trainer: reading, holding out, tokens, packing, the dataset."""
    paths = {count: write(tmp_path / f"{count}.jsonl", chats(count)) for count in (FEW, MANY)}

    def job(count: int) -> object:
        settings = {"model": {"path": str(policy)}, "data": {"path": str(paths[count])}, "max_length": 2048}
        config = validate_config(SftConfig, {**settings, "held_out": {"rows": 10}}, "test")
        prepared = sft_stage.prepare(config, context(tmp_path))
        assert len(prepared.held_out) == 10
        blank = {"input_ids": [1, 1], "labels": [-100, -100], "seq_lengths": [2]}
        return prepared, rows_and_blank(to_records(prepared.examples, 2048, 0), blank)

    assert bytes_of_a_row(job) < KEPT_BYTES


@pytest.mark.parametrize("form", ["pairs", "labelled"])
def test_what_dpo_prepares_lies_on_disk(tmp_path: Path, policy: Path, form: str) -> None:
    def rows(count: int) -> Iterable[dict[str, Any]]:
        for number in range(count):
            prompt = f"{number}: {TEXT}"
            if form == "pairs":
                yield {"prompt": prompt, "chosen": "yes", "rejected": "no"}
            else:
                yield {"prompt": prompt, "completion": "yes", "label": True}
                yield {"prompt": prompt, "completion": "no", "label": False}

    paths = {count: write(tmp_path / f"{count}.jsonl", rows(count)) for count in (FEW, MANY)}

    def job(count: int) -> object:
        settings = {"model": {"path": str(policy)}, "pairs": {"path": str(paths[count])}, "max_length": 2048}
        return dpo_stage.prepare(validate_config(DpoConfig, settings, "test"), 0, context(tmp_path))

    limit = KEPT_BYTES if form == "pairs" else 2 * KEPT_BYTES  # prompts of labelled replies are joined by hashes
    assert bytes_of_a_row(job) < limit


def test_what_the_filter_selects_lies_on_disk(tmp_path: Path) -> None:
    paths = {count: write(tmp_path / f"{count}.jsonl", chats(count)) for count in (FEW, MANY)}
    config = validate_config(FilterConfig, {"judge": {"path": "judge"}, "data": {"path": "rows.jsonl"}}, "test")

    def job(count: int) -> object:
        rows = store_rows(paths[count], kind="supervised", stage="filter")
        verdicts = store((verdict_of(config.labels, [0.0, -len(row.id), -1.0]) for row in rows), verdict_type())
        kept, dropped = split_rated(rows, verdicts, config, seed=0)
        assert len(kept) + len(dropped) == count
        by_id = VerdictsById(rows, verdicts)
        assert all(by_id[row.id].tag for row in kept)
        return kept, dropped, by_id

    assert bytes_of_a_row(job) < KEPT_BYTES


def prompts(count: int) -> Iterable[dict[str, Any]]:
    for number in range(count):
        yield {"id": f"{number}: {TEXT[:400]}", "prompt": f"{number}: {TEXT}", "answer": TEXT, "level": number}


@pytest.mark.parametrize("draw", ["beliefs", "in_turn"])
def test_what_rl_prepares_lies_on_disk(tmp_path: Path, policy: Path, draw: str) -> None:
    """From the file of prompts to drawn groups: checks, held-out prompts, a profile, beliefs, fingerprints."""
    paths = {count: write(tmp_path / f"{count}.jsonl", prompts(count)) for count in (FEW, MANY)}

    def job(count: int) -> object:
        data = {"path": str(paths[count])}
        settings = {
            "model": {"path": str(policy)},
            "prompts": data,
            "reward": {"name": "exact_match"},
            "evaluation": {"data": data, "every": 1, "prompts": count - 1},
            "selection": {"draw": draw, **({"predictor": "level"} if draw == "beliefs" else {})},
            "systems": {"instructions": [{"text": "Be brief."}]},
            "engine": {"max_model_len": 4096},
        }
        config = validate_config(RlConfig, settings, "test")
        rows, heldout = inputs.read_rows(config), heldout_rows(config, config.evaluation)
        read = inputs.read_inputs(config, rows, heldout)
        drawn, evaluated = read.prompts, read.evaluated
        asked = drawn.at(profiled_places(rows, count - 2, seed=0))
        source = prompt_source(config, select_band([], rows, None), [], render=read.render, seed=0)
        for order in range(count):
            source.draw(rows[0].capability, order)
        if source._selection is not None:
            source._selection.beliefs.observe(rows[3].id, 1, 1, version=0)
        source.advance(1)
        assert source.prompt(rows[3].id, None).row == rows[3]
        dataset_fingerprint(rows)
        return rows, drawn, evaluated, asked, source

    assert bytes_of_a_row(job) < KEPT_BYTES


def test_what_an_evaluation_gathers_lies_on_disk(tmp_path: Path, policy: Path) -> None:
    paths = {count: write(tmp_path / f"{count}.jsonl", prompts(count)) for count in (FEW, MANY)}
    held = write(tmp_path / "trained.jsonl", [{"level": -1}])

    def job(count: int) -> object:
        settings = {
            "model": {"path": str(policy)},
            "data": {"path": str(paths[count])},
            "reward": {"name": "exact_match"},
            "engine": {"max_model_len": 4096},
            "samples": 2,
            "k": 2,
            "pass_k_limit": count - 1,
            "exclude": [{"path": str(held)}],
            "key_field": "level",
        }
        config = validate_config(EvalConfig, settings, "test")
        rows, asked = eval_stage.prepare(config)
        assert len(asked) == 2 * count - 1
        with ScoredReplies(len(asked), tmp_path) as found:
            for flight in flights(asked):
                for index in range(flight.request.n):
                    span = (VersionSpan(0, 0, 2),)
                    flight.finished[index] = one_turn("p", "g", index, (1,), (2, 3), TEXT, (0.0, 0.0), span, "stop")
                found.take(flight, [Scored(RewardResult(1.0))] * flight.request.n)
            gathered = by_prompt(rows, found.close(), config)
        assert eval_stage.measure(gathered, config, 0)["all"]["n"] == count
        return gathered

    assert bytes_of_a_row(job) < KEPT_BYTES


def test_rows_are_found_by_ids_of_which_only_hashes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(f"r{number}", "math", ()) for number in range(50)]
    for clash in (False, True):
        if clash:  # all hashes are equal: the rows themselves decide
            monkeypatch.setattr(places, "hash_order", lambda seed, name: 7)
        found = places.Places(rows, lambda row: row.id)
        assert [found[row.id] for row in rows] == list(range(50))
        assert "r50" not in found
        assert list(found) == [row.id for row in rows]


def verdict_type() -> Any:
    from posttrain.judging.verdicts import Verdict

    return Verdict


def test_a_stored_sequence_is_like_a_list(tmp_path: Path) -> None:
    rows = [Row(f"r{n}", "math", (Message("user", "x" * n),), 10**30, {"deep": [{"a": None}, 0.1]}) for n in range(300)]
    found = store(rows, Row)
    assert found == rows
    assert found != rows[1:]
    assert list(found) == [found[index] for index in range(300)]
    assert (found[-1], found[5:9], found[::-100]) == (rows[-1], rows[5:9], rows[::-100])
    picked = found.take([7, 3, 3])
    assert picked == [rows[7], rows[3], rows[3]]
    assert picked[1:].take([1, 0]) == [rows[3], rows[3]]
    with pytest.raises(IndexError):
        found[300]
    assert list(store([], Row)) == []
    assert list(Derived(found, lambda row: row.id)[2:4]) == ["r2", "r3"]


def test_only_a_file_with_a_name_is_opened_by_another_process(tmp_path: Path) -> None:
    import pickle

    with stored.StoreWriter[Row](Row, tmp_path, "rows.arrow") as writer:
        for number in range(9):
            writer.append(Row(str(number), "math", ()))
        found = writer.close().take([8, 2])
    assert [row.id for row in pickle.loads(pickle.dumps(found))] == ["8", "2"]
    with pytest.raises(TypeError, match="no other process can open"):
        pickle.dumps(store(found, Row, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]  # the other file has no name any more


def test_an_error_leaves_no_file_behind(tmp_path: Path) -> None:
    def rows() -> Iterable[Row]:
        yield Row("a", "math", ())
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        store(rows(), Row, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_held_out_rows_are_compared_by_their_content(tmp_path: Path) -> None:
    from posttrain.errors import DataError

    rows = store((Row(f"r{n}", "math", (Message("user", f"{n % 50}"),)) for n in range(100)), Row)
    named = lambda row: (row.id, prompt_key(row.messages))  # noqa: E731
    check_apart(rows.take(range(50)), [Row("x", "math", (Message("user", "50"),))], named)
    with pytest.raises(DataError, match=r"'r53' has the same content as 'r3', which is trained on \(2 such rows\)"):
        check_apart(rows.take(range(50)), rows.take([53, 60]), named)
    config = validate_config(SftConfig, {"model": {"path": "m"}, "data": {"path": "d"}, "held_out": {"rows": 5}}, "t")
    assert config.held_out is not None
    kept, apart = split(rows, (prompt_key(row.messages) for row in rows), config.held_out)
    texts = [{row.messages[0].text for row in side} for side in (kept, apart)]
    assert (len(kept) + len(apart), texts[0] & texts[1]) == (100, set())


def test_a_json_list_is_read_alike_however_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items, and the place of an error, for every number of characters that are read at a time."""
    import io

    values = [{"a": [1, {"b": 'x"\\é'}], "n": -1.5e3}, 12, "text", [], None, True]
    for space in ("", "\n  "):
        text = f"{space}[{space}" + f"{space},{space}".join(json.dumps(value) for value in values) + f"{space}]{space}"
        for size in range(1, 30):
            monkeypatch.setattr(json_list, "CHUNK", size)
            assert [value for value, _ in json_list.json_items(io.StringIO(text))] == values
            with pytest.raises(ValueError, match=r"Expecting value: line 3 column 5 \(char 14\)"):
                list(json_list.json_items(io.StringIO('[1,\n{"a":\n    x}]')))
            with pytest.raises(ValueError, match=r"Extra data: line 2 column 1 \(char 3\)"):
                list(json_list.json_items(io.StringIO("[]\n[]")))
