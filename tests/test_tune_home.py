"""Ranks of SFT and DPO that see nothing of the home host: here all on one host, as if there were a border between them.

tests/test_hosts_tune.py does the same over hosts that really share nothing.
"""

import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.cloudpickle
import torch
from test_sft import make_config, make_context, weights

from posttrain.compat.trl import reference_written_on_each_host
from posttrain.config.base import validate_config
from posttrain.data.stored import StoreWriter
from posttrain.dpo import stage as dpo
from posttrain.dpo.config import DpoConfig
from posttrain.errors import UserError
from posttrain.files import read_jsonl
from posttrain.sft import stage as sft
from posttrain.tune import home
from posttrain.tune.home import CHECKPOINTS, EVALUATIONS, StageAway

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks do not find the tests' folder

RESOURCES = {"trainer": {"cpus": 0.25}}
TWO = {"parallel": {"processes": 2, "expert": 2, "zero": 2}, "resources": RESOURCES}


def behind_a_border(place: str, away: list[int], function: Callable[..., Any], *given: Any) -> Any:
    """Call a function on a rank as if it were on another host than the home host, if it is one of those in `away`.

    What it asks for from the home host is copied to `place`, and each rank is on a host of its own.
    """
    import torch.distributed as dist

    from posttrain.hosts import away as hosts
    from posttrain.parallel import away as models
    from posttrain.tune import home as here

    rank = dist.get_rank()

    def brought(folder: str, deadline_s: float) -> str:
        return shutil.copytree(folder, tempfile.mkdtemp(dir=place), dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", f"{place}/cache")
        patch.setattr(here, "this_node", lambda: f"host of rank {rank}")
        patch.setattr(here, "now_away", lambda: rank in away)
        patch.setattr(here, "folder_now", brought)
        patch.setattr(models, "folder_now", brought)
        patch.setattr(hosts, "this_address", lambda: "127.0.0.1")
        return function(*given)


@pytest.fixture
def borders(ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], Path]:
    """Has stages train with ranks behind a border from now on. Returns the folder of what is on their side."""

    def between(away: list[int]) -> Path:
        place = tmp_path / "elsewhere"
        place.mkdir(exist_ok=True)

        def run(parallel: Any, resources: Any, function: Callable[..., Any], *given: Any) -> Any:
            return ranks.run(parallel, resources, partial(behind_a_border, str(place), away, function), *given)

        monkeypatch.setattr(home, "in_cluster", lambda: True)
        monkeypatch.setattr("posttrain.parallel.ranks.run_on_ranks", run)
        return place

    return between


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "t"} for line in lines]


def assert_equal(one: Path, other: Path) -> None:
    """Two trainings have learned the same, bit for bit, and reported the same."""
    ours, theirs = weights(one / "model"), weights(other / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert metrics_of(one) == metrics_of(other)


def events_of(file: Path) -> list[tuple[str, Any]]:
    """The events that no clock decides."""
    return [(line["event"], line.get("step")) for line in read_jsonl(file) if line["event"] not in ("busy", "progress")]


def files_of(folder: Path) -> list[str]:
    """The names of all files."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    "away", [[0, 1], pytest.param([0], marks=pytest.mark.full), pytest.param([1], marks=pytest.mark.full)]
)
def test_sft_over_a_border_is_the_training_on_one_host(borders, policy, data, tmp_path, away):
    """With held-out rows, whose evaluations and best checkpoint are on the home host too."""
    settings = {"checkpoint_every": 2, "held_out": {"rows": 8, "every": 2, "keep_best": True}, **TWO}
    config = make_config(policy, data, **settings)
    near, far = make_context(tmp_path / "near"), make_context(tmp_path / "far")
    ours = sft.run(config, near)
    place = borders(away)
    theirs = sft.run(config, far)
    assert {**ours, "model": ""} == {**theirs, "model": ""}
    assert_equal(near.dir, far.dir)
    assert files_of(near.dir) == files_of(far.dir)
    assert events_of(near.events) == events_of(far.events)
    made = [list(read_jsonl(folder / CHECKPOINTS / EVALUATIONS)) for folder in (near.dir, far.dir)]
    assert made[0] == made[1] != []
    assert not list(place.glob("cache/away/*"))  # what ranks wrote for the home host


@pytest.mark.slow
def test_dpo_over_a_border_is_the_training_on_one_host(borders, policy, tmp_path):
    """TRL keeps the log-probabilities of the reference in a file of each host. The result is adapters on their base."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {
            "id": f"p{a}",
            "prompt": [{"role": "user", "content": f"Sum: {a} + 3"}],
            "chosen": "So. " * (a % 4) + f"Answer: {a + 3}",
            "rejected": f"Answer: {a + 4}",
        }
        for a in range(2, 10)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"path": str(policy), "dtype": "float32"},
        "pairs": {"path": str(pairs)},
        "batch_size": 2,
        "max_length": 128,
        "optimizer": {"learning_rate": 1e-3},
        "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "o_proj"], "save": "both"},
        "parallel": {"processes": 2, "zero": 2},
        "resources": RESOURCES,
    }
    config = validate_config(DpoConfig, settings, "test")
    near, far = make_context(tmp_path / "near"), make_context(tmp_path / "far")
    dpo.run(config, near)
    borders([0, 1])
    dpo.run(config, far)
    assert_equal(near.dir, far.dir)
    assert files_of(near.dir) == files_of(far.dir)
    named = [json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (near.dir, far.dir)]
    assert [each["base_model_name_or_path"] for each in named] == [str(policy)] * 2


def test_what_does_not_travel_is_refused_with_the_host_and_the_key(policy, data, tmp_path, monkeypatch):
    host = socket.gethostname()
    config = make_config(policy, data)
    shown = config.model_copy(update={"images": SimpleNamespace()})
    handed: Any = None
    with pytest.raises(UserError, match=f"resources.trainer: was placed on host {host}, and pictures do not travel; "):
        StageAway(shown, make_context(tmp_path), None, handed=handed)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("posttrain.parallel.away.folder_now", lambda folder, deadline_s: folder)
    model = config.model.model_copy(update={"path": str(tmp_path / "adapters")})
    started = config.model_copy(update={"model": model})
    with pytest.raises(UserError, match=f"on host {host}, and {tmp_path}/adapters holds adapters, whose base does not"):
        StageAway(started, make_context(tmp_path), None, handed=handed)


def test_rows_that_are_sent_to_another_host_are_read_from_its_own_folder(tmp_path):
    with StoreWriter[list[int]](list[int], tmp_path / "home", "rows.arrow") as writer:
        for number in range(5):
            writer.append([number, number])
        rows = writer.close()
    sent = ray.cloudpickle.dumps(rows.take([3, 1]))
    shutil.move(tmp_path / "home", tmp_path / "other")
    arrived = ray.cloudpickle.loads(sent)  # where the file is not there, as on a host that shares nothing
    assert list(arrived.moved(tmp_path / "other")) == [[3, 3], [1, 1]]
    with pytest.raises(FileNotFoundError):
        len(ray.cloudpickle.loads(ray.cloudpickle.dumps(rows)))


def test_the_first_rank_of_each_host_writes_the_reference():
    accelerator = SimpleNamespace(is_main_process=False, device="cpu")
    trainer = SimpleNamespace(accelerator=accelerator)
    for writes in (False, True):
        with reference_written_on_each_host(trainer, writes):
            assert trainer.accelerator.is_main_process == writes
            assert trainer.accelerator.device == "cpu"
        assert trainer.accelerator is accelerator
