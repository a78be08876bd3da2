"""The profile: what is stored, which runs reuse it, and that a crash loses at most one chunk of prompts."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from rollout_records import drawn, one_turn

from posttrain.config.base import validate_config
from posttrain.config.training import ParallelConfig
from posttrain.errors import CheckpointError, ConfigError, DataError
from posttrain.files import read_jsonl
from posttrain.model.fingerprint import model_fingerprint
from posttrain.records import Message, RewardResult, Row, Scored, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.rl.prompts.band import select_band
from posttrain.rl.prompts.difficulty import Basis, Difficulty, DifficultyStore, read_estimates, write_estimates
from posttrain.rl.prompts.fingerprints import (
    check_resumed,
    dataset_fingerprint,
    prompt_fingerprint,
    run_fingerprints,
    scoring_fingerprint,
)
from posttrain.rl.prompts.profile import FILE, chunk_size, difficulties, known_difficulties

BASIS = Basis("policy-a", "scoring-a")


def row_of(name: str, answer: str = "1", **fields: object) -> Row:
    return Row(name, "math", (Message("user", f"{name}?"),), answer, fields)


def config_of(folder: Path | str = "model", **changes: object) -> RlConfig:
    data = {
        "model": {"path": str(folder), "dtype": "float32"},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"name": "final_answer"},
        "profile": {"samples": 4, "band": [0.2, 0.7]},
        "sampling": {"max_tokens": 16},
        "engine": {"max_model_len": 256, "kv_cache_gib": 0.1},
        "resources": {"rollout": {"cpus": 0.5}},
        **changes,
    }
    return validate_config(RlConfig, data, "test")


def measured(prompt: str, n: int = 4, passes: int = 2, samples: int = 4) -> Difficulty:
    return Difficulty(f"id-{prompt}", "math", n, passes, 0, False, prompt, samples)


def test_an_estimate_is_stored_with_its_uncertainty_and_what_it_rests_on(tmp_path: Path):
    """Of 8 replies 2 passed. Wilson's interval and pass@k are worked out by hand: pass@2 = 1 - C(6,2)/C(8,2)."""
    items = [Difficulty("p", "math", 8, 2, 0, True, "key", 8, 90), Difficulty("q", "math", 0, 0, 0, False, "other", 8)]
    write_estimates(tmp_path / FILE, items, BASIS, extra={"band_low": 0.1, "band_high": 0.7})
    first, second = pq.read_table(tmp_path / FILE).to_pylist()
    assert first["pass_rate"] == 0.25
    assert (first["ci95_low"], first["ci95_high"]) == pytest.approx((0.0715, 0.5907), abs=1e-4)
    assert first["pass_at_k"][:2] == pytest.approx([0.25, 1 - 15 / 28])
    assert first["pass_at_k"][6:] == [1.0, 1.0]
    assert {name: first[name] for name in ("n", "passes", "samples", "policy_version", "prompt")} == {
        "n": 8, "passes": 2, "samples": 8, "policy_version": 0, "prompt": "key"
    }  # fmt: skip
    assert (first["policy"], first["scoring"], first["band_high"]) == ("policy-a", "scoring-a", 0.7)
    assert (second["pass_rate"], second["ci95_low"], second["ci95_high"]) == (None, 0.0, 1.0)
    assert read_estimates(tmp_path / FILE, BASIS) == items
    assert read_estimates(tmp_path / FILE, Basis("policy-b", "scoring-a")) == []


def test_unscored_replies_count_neither_as_passed_nor_as_failed():
    rollout = one_turn("p", "g", 0, (1,), (2, 3), "x", (0.0, 0.0), (VersionSpan(0, 0, 2),), "stop")
    pairs = [(replace(rollout, prompt_id=name), row_of(name)) for name in ("p", "q") for _ in range(4)]
    results: list[RewardResult | None] = [RewardResult(1.0), RewardResult(0.5), None, RewardResult(0.0)] + [None] * 4
    scored, unscored = difficulties(config_of(), pairs, [Scored(result) for result in results])
    assert (scored.n, scored.passes, scored.samples, scored.selected) == (3, 2, 4, True)  # 0.5 is right
    assert (scored.tokens, unscored.tokens) == (8, 8)  # what was sampled counts, whatever became of it
    assert (unscored.n, unscored.samples, unscored.selected) == (0, 4, False)


# --- the store ---


def test_runs_share_what_they_measured(tmp_path: Path):
    folder = tmp_path / "store"
    first = DifficultyStore(folder, BASIS, tmp_path / "one")
    first.add([replace(measured("a"), tokens=40), measured("b", n=0, passes=0)])
    first.add([measured("c", passes=4)])
    second = DifficultyStore(folder, BASIS, tmp_path / "two")
    assert second.find(row_of("mine"), "a", 4) == replace(measured("a"), prompt_id="mine")  # no tokens of this run
    assert second.find(row_of("mine"), "c", 4) == replace(measured("c", passes=4), prompt_id="mine")
    assert second.find(row_of("mine"), "b", 4) is None  # it was tried, but nothing is known of it
    assert second.find(row_of("mine"), "a", 5) is None  # too few samples
    second.add([measured("a", n=16, passes=3, samples=16)])
    assert len(list(folder.glob("*.parquet"))) == 2
    found = DifficultyStore(folder, BASIS, tmp_path / "three").find(row_of("mine"), "a", 5)
    assert found is not None
    assert (found.n, found.passes) == (16, 3)
    for other in (Basis("policy-b", "scoring-a"), Basis("policy-a", "scoring-b")):
        assert DifficultyStore(folder, other, tmp_path / "one").find(row_of("mine"), "a", 4) is None


def _add_and_read(folder: Path, run: int) -> None:
    for index in range(12):
        DifficultyStore(folder, BASIS, folder / f"run-{run}").add([measured(f"{run}-{index}")])


@pytest.mark.slow
def test_runs_may_write_side_by_side(tmp_path: Path):
    """Each run reads the files of the others while they are being replaced."""
    folder = tmp_path / "store"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.starmap(_add_and_read, [(folder, run) for run in range(3)])
    store = DifficultyStore(folder, BASIS, tmp_path / "last")
    assert all(store.find(row_of("x"), f"{run}-{index}", 4) for run in range(3) for index in range(12))
    assert len(list(folder.iterdir())) == 3


def test_a_store_that_is_none_is_told(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"profile.store: got .*file': is a file; give a folder"):
        DifficultyStore(file, BASIS, tmp_path)
    for content in ("text", "table"):
        folder = tmp_path / content
        folder.mkdir()
        if content == "text":
            (folder / "x.parquet").write_text("not parquet")
        else:
            pq.write_table(pa.table({"x": [1]}), folder / "x.parquet")
        with pytest.raises(ConfigError, match=r"x\.parquet is not a table of pass rates \(.*; move it away"):
            DifficultyStore(folder, BASIS, tmp_path)


def test_a_profile_goes_on_from_what_is_known(tmp_path: Path):
    """Chunks of this run first, then its finished table, then the store; nothing of another basis or prompt."""
    rows = [row_of(name) for name in ("a", "b", "c", "d", "e", "f")]
    keys = {row.id: prompt_fingerprint(row) for row in rows}
    run = tmp_path / "run"
    (run / "profile").mkdir(parents=True)

    def item(name: str, passes: int, key: str | None = None) -> Difficulty:
        return Difficulty(name, "math", 4, passes, 0, False, key or keys[name], 4)

    write_estimates(run / "profile" / "1.parquet", [item("a", 1), item("c", 1, "the row before it changed")], BASIS)
    write_estimates(run / "profile" / "2.parquet", [item("d", 1)], Basis("policy-b", "scoring-a"))
    write_estimates(run / FILE, [replace(item("b", 2), n=0, passes=0)], BASIS)
    store = DifficultyStore(tmp_path / "store", BASIS, tmp_path / "other")
    store.add([item("a", 3), item("e", 3)])
    store = DifficultyStore(tmp_path / "store", BASIS, run)
    known = known_difficulties(run, BASIS, store, rows=rows, keys=keys, samples=4)
    assert {name: (found.n, found.passes) for name, found in known.items()} == {"a": (4, 1), "b": (0, 0), "e": (4, 3)}
    assert known_difficulties(run, BASIS, store, rows=rows, keys=keys, samples=5) == {}


def test_without_a_band_training_may_draw_all_but_what_could_not_be_scored():
    rows = [row_of(name) for name in ("a", "b", "lost", "unknown")]
    found = [Difficulty("a", "math", 4, 4, 0, False), Difficulty("b", "math", 4, 2, 0, True)]
    found.append(Difficulty("lost", "math", 0, 0, 0, False))
    assert [row.id for row in select_band(found, rows, [0.1, 0.7])] == ["b"]
    assert [row.id for row in select_band(found, rows, None)] == ["a", "b", "unknown"]


def test_a_chunk_fills_every_engine():
    assert chunk_size(config_of(engine={"max_model_len": 256, "max_num_seqs": 8})) == 64
    engines = {"engine": {"max_model_len": 256, "max_num_seqs": 256}, "resources": {"rollout": {"workers": 3}}}
    assert chunk_size(config_of(**engines)) * 4 >= 2 * 256 * 3


def test_a_prompt_needs_room_with_every_system_instruction():
    """Tokens are words here. Of 20 tokens 16 are for the reply, so that a prompt may have 4."""
    from posttrain.rl.prompts.lengths import check_room

    def render(row: Row, messages: Sequence[Message]) -> list[int]:
        return [0 for message in messages for _ in message.content.split()]

    def check(*texts: str, **systems: object) -> None:
        rows = [Row(f"p{index}", "math", (Message("user", text),)) for index, text in enumerate(texts)]
        rows.append(Row("own", "math", (Message("system", "one two"), Message("user", "three four"))))
        prompts = [drawn(row, row.messages, tuple(render(row, row.messages))) for row in rows]
        check_room(prompts, render, config_of(**systems).systems.instructions, max_tokens=16, max_model_len=20)

    instructions = {"systems": {"instructions": [{"text": ""}, {"text": "a b"}]}}
    check("one", "one two three four")
    check("one", "one two", **instructions)
    with pytest.raises(DataError, match=r"prompt 'p1' has 5 tokens; with sampling.max_tokens 16 that exceeds .* 20"):
        check("one", "one two three four five")
    with pytest.raises(DataError, match="prompt 'p1' has 5 tokens with the system instruction 'a b'; with sampling"):
        check("one", "one two three", **instructions)


# --- fingerprints ---


def test_a_policy_is_its_content_and_not_its_place(tiny_model: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "moved"
    shutil.copytree(tiny_model, folder)
    before = model_fingerprint(tiny_model)
    (folder / "README.md").write_text("notes")
    assert model_fingerprint(folder) == before
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] += 1  # one number of one tensor
    save_file(tensors, weights, metadata={"format": "pt"})
    assert model_fingerprint(folder) != before
    with pytest.raises(CheckpointError, match=r"must be a model folder with config\.json and \*\.safetensors"):
        model_fingerprint(tmp_path)


def test_scoring_is_the_reward_and_the_sampling_and_nothing_else(tmp_path: Path):
    path = tmp_path / "reward.py"
    path.write_text("def score(rollout, row, bonus=0.0):\n    return bonus\n")
    reward = {"name": f"{path}:score"}
    before = scoring_fingerprint(config_of(reward=reward))
    same = [
        config_of(reward={**reward, "workers": 3, "timeout_s": 2.0}),
        config_of(reward=reward, steps=7, group_size=3),
        config_of(reward=reward, profile={"samples": 9}),
    ]
    assert {scoring_fingerprint(config) for config in same} == {before}
    others = [
        config_of(reward={**reward, "args": {"bonus": 1.0}}),
        config_of(reward={**reward, "correct_threshold": 0.6}),
        config_of(reward=reward, sampling={"max_tokens": 17}),
        config_of(reward=reward, sampling={"max_tokens": 16, "temperature": 0.5}),
        config_of(reward=reward, model={"path": "model", "dtype": "bfloat16"}),
        config_of(reward={"name": "by_capability", "args": {"rewards": {"default": reward}}}),
    ]
    assert len({before, *map(scoring_fingerprint, others)}) == 7
    combined = scoring_fingerprint(others[-1])
    path.write_text("def score(rollout, row, bonus=0.0):\n    return 1.0\n")
    assert scoring_fingerprint(config_of(reward=reward)) != before
    assert scoring_fingerprint(others[-1]) != combined


def test_a_prompt_is_what_the_policy_and_the_reward_see():
    row = row_of("a", "1", tests=[1])
    assert prompt_fingerprint(replace(row, id="b")) == prompt_fingerprint(row)
    others = [
        replace(row, answer="2"),
        replace(row, fields={"tests": [2]}),
        replace(row, capability="coding"),
        replace(row, messages=(Message("user", "b?"),)),
    ]
    assert len({prompt_fingerprint(other) for other in [row, *others]}) == 5
    assert dataset_fingerprint([row]) != dataset_fingerprint([replace(row, id="b")])
    assert dataset_fingerprint([row, others[0]]) != dataset_fingerprint([others[0], row])


def test_a_checkpoint_of_other_data_or_of_another_model_is_told(tiny_model: Path):
    rows = [row_of("a"), row_of("b")]
    saved = run_fingerprints(str(tiny_model), rows)
    check_resumed(saved, run_fingerprints(str(tiny_model), rows), Path("run/rl"))
    with pytest.raises(
        CheckpointError, match=r"prompts: the rows have changed since the run began \(fingerprint \w+, now"
    ):
        check_resumed(saved, run_fingerprints(str(tiny_model), rows[:1]), Path("run/rl"))
    with pytest.raises(
        CheckpointError, match=r"model.path: this is not the model.*cannot continue from .*run/rl.*start again"
    ):
        check_resumed(saved, {**saved, "policy": "another"}, Path("run/rl"))


def test_a_deterministic_run_keeps_its_ranks(tiny_model: Path):
    rows, one, two = [row_of("a")], ParallelConfig(), ParallelConfig(processes=2, zero=3)
    saved = run_fingerprints(str(tiny_model), rows, one)
    check_resumed(saved, run_fingerprints(str(tiny_model), rows, one), Path("run/rl"))
    with pytest.raises(CheckpointError, match=r"parallel: a deterministic run keeps its ranks"):
        check_resumed(saved, run_fingerprints(str(tiny_model), rows, two), Path("run/rl"))
    check_resumed(run_fingerprints(str(tiny_model), rows), run_fingerprints(str(tiny_model), rows), Path("run/rl"))


# --- with a real engine ---

PROFILE = """
    import json, os, sys
    from pathlib import Path

    import ray

    from posttrain.config.base import validate_config
    from posttrain.context import StageContext
    from posttrain.data.ends import end_token_ids
    from posttrain.model.tokenizer import load_tokenizer
    from posttrain.rl.config import RlConfig
    from posttrain.rl.prompts.profile import profile_prompts
    from posttrain.rl.inputs import draw_plain, read_rows
    from posttrain.sampling.client import Engines

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    config = validate_config(RlConfig, json.loads(Path("config.json").read_text()), "test")
    tokenizer = load_tokenizer(config.model.path)
    prompts = draw_plain(read_rows(config), tokenizer, config)
    stop_ids = tuple(end_token_ids(tokenizer))
    contexts = [StageContext(name, Path(name), Path(name) / "events.jsonl") for name in sys.argv[1:]]
    with Engines(contexts[0], config.model, config.engine, resources=config.resources.rollout) as engines:
        for context in contexts:
            profile_prompts(config, context, engines, prompts=prompts, stop_ids=stop_ids)
"""

REWARD = """
def even(rollout, row):
    import time
    time.sleep(0.01)  # so that there is a time between two chunks
    return float(sum(rollout.token_ids) % 2)
"""


@pytest.mark.slow
@pytest.mark.full  # three starts of a stage
@pytest.mark.timeout(200)
def test_a_profile_survives_its_crash_and_serves_other_runs(tiny_model: Path, tmp_path: Path):
    """Killed after its first chunk, it samples only the rest; another run of the same policy samples nothing."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"id": f"r{index}", "messages": [{"role": "user", "content": f"{index}?"}]} for index in range(200)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = {"max_model_len": 256, "kv_cache_gib": 0.1, "max_num_seqs": 64}
    profile = {"samples": 2, "band": [0.0, 1.0], "store": "store"}
    config = config_of(tiny_model, reward={"name": "reward.py:even"}, engine=engine, profile=profile)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    killed = start(tmp_path, ["first"])
    parts = tmp_path / "first" / "profile"
    while not list(parts.glob("*.parquet")):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    kill(killed)
    kept = sum(len(pq.read_table(path)) for path in parts.glob("*.parquet"))
    assert 64 <= kept < 200
    again = start(tmp_path, ["first", "second"])
    try:
        assert again.wait(timeout=150) == 0
    finally:
        kill(again)
    assert begun(tmp_path / "first") == [(200, 0), (200, kept)]
    assert begun(tmp_path / "second") == [(200, 200)]
    first, second = (pq.read_table(tmp_path / name / FILE).to_pylist() for name in ("first", "second"))
    assert all(row["tokens"] > 0 for row in first)
    assert second == [{**row, "tokens": 0} for row in first]  # of the run itself, which sampled none
    assert [row["n"] for row in first] == [2] * 200
    assert not parts.exists()


def start(folder: Path, runs: Sequence[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROFILE), *runs], cwd=folder)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the process, and to the Ray session that it began."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)


def begun(folder: Path) -> list[tuple[int, int]]:
    """(prompts, those that were known) of each time that the profile began."""
    events = read_jsonl(folder / "events.jsonl")
    return [(event["prompts"], event["known"]) for event in events if event["event"] == "profile"]
