"""Where rows come from: compressed files, Arrow, several sources by weight, names of datasets; and rows set aside."""

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from posttrain.config.data import DataConfig
from posttrain.context import StageContext
from posttrain.data import check_data, load_pairs, load_rows
from posttrain.data.bad_rows import BadRow, SeenIds
from posttrain.data.rows import iter_rows
from posttrain.errors import DataError

LINE = '{"id": "a", "prompt": "2 + 2?"}\n'


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def numbered(path: Path, count: int) -> Path:
    return lines(path, *[{"prompt": f"{path.stem} {index}"} for index in range(count)])


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", [*COMPRESS, "zst"])
def test_compressed_files_are_read_and_cut_ones_are_refused(tmp_path, suffix):
    import pyarrow as pa

    path = tmp_path / f"d.jsonl.{suffix}"
    if suffix == "zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as out:
            out.write(LINE.encode())
    else:
        path.write_bytes(COMPRESS[suffix](LINE.encode()))
    assert load_rows(path, kind="prompt")[0].id == "a"
    assert load_rows(tmp_path, kind="prompt")[0].id == "a"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"d\.jsonl\.\w+: (cannot be read|row 1: not JSON)"):
        load_rows(path, kind="prompt")


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_arrow_streams_and_arrow_files_are_read(tmp_path, form):
    import pyarrow as pa

    table = pa.Table.from_pylist([json.loads(LINE)])
    with getattr(pa.ipc, form)(str(tmp_path / "d.arrow"), table.schema) as out:
        out.write_table(table)
    assert load_rows(tmp_path / "d.arrow", kind="prompt")[0].id == "a"


def test_sources_are_mixed_by_weight_with_a_seed(tmp_path):
    one, two = numbered(tmp_path / "one.jsonl", 600), numbered(tmp_path / "two.jsonl", 600)

    def read(**keys):
        config = DataConfig.model_validate({"path": [str(one), str(two)], **keys})
        return [row.messages[0].text for row in load_rows(config, kind="prompt")]

    plain, mixed = read(), read(weights=[3, 1])
    assert plain == [f"one {n}" for n in range(600)] + [f"two {n}" for n in range(600)]
    assert read(weights=[3, 1]) == mixed != read(weights=[3, 1], mix_seed=1)
    counts = Counter(text.split()[0] for text in mixed)
    assert counts["one"] == 600  # until the first path has no more
    assert 140 < counts["two"] < 260  # 200 expected, with a seed that is fixed
    assert [text for text in mixed if text.startswith("two")] == plain[600 : 600 + counts["two"]]
    with pytest.raises(ValidationError, match="weights: got 1 for 2 paths"):
        read(weights=[1])


def test_a_dataset_that_cannot_be_fetched_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (problem,) = check_data("someone/some-dataset", "prompt")
    assert "someone/some-dataset: no such file or folder, and the dataset of this name cannot be downloaded" in problem
    assert "switched off by HF_HUB_OFFLINE; name a local path, or download it on a machine with a network" in problem
    (problem,) = check_data("data/train.jsonl", "prompt")
    assert problem == "data/train.jsonl: no such file or folder"


def test_a_dataset_that_was_fetched_is_read_by_its_name(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "datasets--someone--some-dataset"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    lines(folder / "snapshots" / ("0" * 40) / "train.jsonl", LINE.strip())
    assert load_rows("someone/some-dataset", kind="prompt")[0].id == "a"


# --- rows that are set aside ---


BAD = [{"body": "x"}, "{", {"prompt": "x", "note": "\ud800"}, {"prompt": ""}]


def test_bad_rows_are_set_aside_counted_and_written(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"prompt": "good"}, *BAD, {"prompt": "good too"})
    config = DataConfig(path=str(path), on_bad_row="set_aside")
    context = StageContext("rl", tmp_path, tmp_path / "events.jsonl")
    assert [row.id for row in load_rows(config, kind="prompt", context=context)] == ["d.jsonl:1", "d.jsonl:6"]
    written = [json.loads(line) for line in (tmp_path / "set_aside_d.jsonl").read_text().splitlines()]
    assert [item["row"] for item in written] == [2, 3, 4, 5]
    assert written[0]["value"] == {"body": "x"}
    assert "no known format" in written[0]["problem"]
    phase, event = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert phase["phase"] == f"reading {path}"
    assert (event["event"], event["rows"], event["of"]) == ("rows_set_aside", 4, 6)
    assert check_data(config, "prompt") == []
    with pytest.warns(UserWarning, match=r"4 of 6 rows are left out; the first: .*d\.jsonl: row 2"):
        load_rows(config, kind="prompt")


def test_rows_that_are_all_bad_are_an_error_all_the_same(tmp_path):
    config = DataConfig(path=str(lines(tmp_path / "d.jsonl", *BAD)), on_bad_row="set_aside")
    with pytest.raises(DataError, match="row 1: no known format"):
        load_rows(config, kind="prompt")
    assert len(check_data(config, "prompt")) == 4


def test_pairs_are_set_aside_too(tmp_path):
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    path = lines(tmp_path / "d.jsonl", pair, {**pair, "rejected": "a"})
    with pytest.warns(UserWarning, match="1 of 2 rows are left out"):
        assert len(load_pairs(DataConfig(path=str(path), on_bad_row="set_aside"))) == 1


def test_iter_rows_yields_good_and_bad_rows_in_order(tmp_path):
    path = lines(tmp_path / "d.jsonl", {"prompt": "good"}, *BAD)
    found = list(iter_rows(path, kind="prompt"))
    assert [isinstance(item, BadRow) for item in found] == [False, True, True, True, True]


def test_ids_are_remembered_by_name_and_then_by_digest(monkeypatch):
    from posttrain.data import bad_rows

    monkeypatch.setattr(bad_rows, "_NAMED_IDS", 10)
    seen = SeenIds()
    names = [f"id{index}" for index in range(100_000)]
    assert all(seen.add(name, name) is None for name in names)
    assert seen.add("id3", "") == "id3"
    assert all(seen.add(name, "") == "an earlier row" for name in names[10::997])
    assert seen.add("new", "") is None
