"""SFT and DPO over several ranks, each with a real DeepSpeed engine, against the same training on one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from closeness import ROUNDING, apart
from test_sft import ends_early, make_config, make_context
from test_sft import weights as weights_of
from test_vision_sft import make_config as with_pictures
from test_vision_sft import weights_of as all_weights_of
from tiny_policy import write_sums
from vision_folder import write_picture_pairs, write_picture_rows
from vision_models import save_vision_policy

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.dpo import stage as dpo
from posttrain.dpo.config import DpoConfig
from posttrain.errors import ConfigError
from posttrain.files import read_jsonl
from posttrain.sft import stage as sft

pytestmark = pytest.mark.slow
# The session is shared with tests that leave a warm engine on one of the two CPUs.
RESOURCES = {"trainer": {"cpus": 0.25}}
TWO = {"parallel": {"processes": 2, "expert": 2, "zero": 2}, "resources": RESOURCES}
EXPERT = {"processes": 2, "expert": 2}
LINEAR = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of attention, dense layers and shared experts
ADAPTERS = {
    "linear": {"rank": 4, "alpha": 8.0, "dropout": 0.2, "target_modules": LINEAR},
    "experts": {
        "rank": 4,
        "alpha": 8.0,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "sft.jsonl", 52)


def distance(one: Path, other: Path, start: Path) -> float:
    """Of the weights of two trainings, relative to how far they are from the start: 0 if they are equal."""
    return apart(weights_of(one / "model"), weights_of(other / "model"), weights_of(start))


SFT_ON_TWO = {"checkpoint_every": 2, **TWO}
LORA_ON_TWO = {
    "checkpoint_every": 2,
    "parallel": {"processes": 2, "zero": 2},
    "resources": RESOURCES,
    "lora": ADAPTERS["experts"],
    "optimizer": {"learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def on_two(ranks, policy, data, tmp_path_factory):
    """What SFT on two ranks reports and its folder: of whole weights or of adapters, each run once."""
    found: dict[str, tuple[dict, Path]] = {}

    def get(name: str) -> tuple[dict, Path]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name) / "run"
            config = {"whole": SFT_ON_TWO, "lora": LORA_ON_TWO}[name]
            found[name] = sft.run(make_config(policy, data, **config), make_context(folder)), folder
        return found[name]

    return get


def stopped(folder: Path, copy: Path) -> StageContext:
    """A copy of a run as it was when it had written the checkpoint of step 2."""
    shutil.copytree(folder, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        if path.name != "step_2":
            shutil.rmtree(path)
    shutil.rmtree(copy / "model")
    return make_context(copy)


def test_sft_on_two_ranks_is_the_training_of_one(on_two, policy, data, tmp_path):
    alone = make_context(tmp_path / "alone")
    one_report = sft.run(make_config(policy, data, gradient_accumulation=2), alone)
    assert (one_report["engine"], one_report["processes"]) == ("DeepSpeedEngine", 1)
    report, two = on_two("whole")
    assert report["engine"] == "DeepSpeedEngine"
    assert (report["processes"], report["expert"]) == (2, 2)
    ours, theirs = (list(read_jsonl(folder / "metrics.jsonl")) for folder in (two, alone.dir))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert distance(two, alone.dir, policy) < ROUNDING
    assert sorted(path.name for path in (two / "checkpoints" / "step_4").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert json.loads((two / "model" / "config.json").read_text())["architectures"] == ["Llama4ForCausalLM"]


def test_the_last_step_of_an_epoch_repeats_no_row(ranks, policy, tmp_path):
    """Rows that do not divide among the ranks: one of them trains on a blank row in each epoch's last step."""
    data = write_sums(tmp_path / "sft.jsonl", 13)
    model = {"path": str(policy), "dtype": "float32", "router": {"z_loss": 0.25, "bias_rate": 0.05}}
    common = {"model": model, "packing": False, "batch_tokens": None, "batch_size": 3, "epochs": 2}
    alone, two = (make_context(tmp_path / name) for name in ("alone", "two"))
    sft.run(make_config(policy, data, **common, gradient_accumulation=2, resources=RESOURCES), alone)
    sft.run(make_config(policy, data, **common, **TWO), two)
    ours, theirs = (
        [line for line in read_jsonl(context.dir / "metrics.jsonl") if "learning_rate" in line]
        for context in (two, alone)
    )
    assert len(ours) == len(theirs) == 2 * 3  # forwards of 3, 3, 3, 3 and 1 rows, two a step
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    for name in ("loss", "router_entropy", "expert_load_max", "dead_experts"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-4), name
    assert distance(two.dir, alone.dir, policy) < ROUNDING


def test_held_out_rows_are_measured_and_the_best_model_kept_on_two_ranks(ranks, policy, tmp_path):
    """Nine conversations in rows that do not divide among the ranks; the best model is the start."""
    context = make_context(tmp_path / "run")
    ends_early(policy, write_sums(tmp_path / "sft.jsonl", 48), context, best=0, learning_rate=0.3, **TWO)
    start, result = weights_of(policy), weights_of(tmp_path / "run" / "model")
    assert all(torch.equal(start[name], result[name]) for name in start)


@pytest.mark.full
@pytest.mark.parametrize(("expert", "zero"), [(2, 1), (2, 2), (1, 3)])
def test_an_optimizer_on_the_cpu_trains_the_same(ranks, policy, data, tmp_path, expert, zero):
    for name, offload in (("own", "none"), ("offloaded", "optimizer")):
        parallel = {"processes": 2, "expert": expert, "zero": zero, "offload": offload}
        sft.run(make_config(policy, data, parallel=parallel, resources=RESOURCES), make_context(tmp_path / name))
    assert distance(tmp_path / "own", tmp_path / "offloaded", policy) < ROUNDING


def test_offload_without_a_compiler_is_refused(policy, data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = make_config(policy, data, parallel={"zero": 1, "offload": "optimizer"})
    with pytest.raises(ConfigError, match=r"parallel.offload: got optimizer: .* needs a C\+\+ compiler"):
        sft.run(config, make_context(tmp_path))


@pytest.fixture(scope="module")
def adapted_alone(ranks, policy, data, tmp_path_factory):
    """The folder of SFT with adapters of one kind, on one rank; each kind is trained once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            context = make_context(tmp_path_factory.mktemp(name))
            config = {"lora": ADAPTERS[name], "optimizer": {"learning_rate": 1e-2}, "gradient_accumulation": 2}
            sft.run(make_config(policy, data, **config), context)
            folders[name] = context.dir
        return folders[name]

    return get


@pytest.mark.parametrize(
    ("adapters", "expert", "zero"),
    [
        pytest.param("experts", 1, 0, marks=pytest.mark.full),
        pytest.param("experts", 1, 1, marks=pytest.mark.full),
        ("experts", 1, 2),
        pytest.param("experts", 1, 3, marks=pytest.mark.full),
        pytest.param("linear", 2, 0, marks=pytest.mark.full),
        ("linear", 2, 3),
    ],
)
def test_lora_on_two_ranks_is_the_training_of_one(
    on_two, policy, data, adapted_alone, tmp_path, adapters, expert, zero, record_property
):
    parallel = {"processes": 2, "expert": expert, "zero": zero}
    config = {"lora": ADAPTERS[adapters], "optimizer": {"learning_rate": 1e-2}, "resources": RESOURCES}
    if (adapters, expert, zero) == ("experts", 1, 2):
        report, folder = on_two("lora")
    else:
        folder = tmp_path
        report = sft.run(make_config(policy, data, parallel=parallel, **config), make_context(folder))
    assert report["engine"] == "DeepSpeedEngine"
    before, alone = weights_of(policy), weights_of(adapted_alone(adapters) / "model")
    targets = ("q_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
    if adapters == "experts":
        targets = ("q_proj.weight", "o_proj.weight", "experts.gate_up_proj", "experts.down_proj")
    after = weights_of(folder / "model")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith(targets)
    }
    found = apart(after, alone, before)
    record_property("weights", found)
    assert found < ROUNDING


def test_a_stopped_lora_sft_goes_on(on_two, policy, data, tmp_path):
    """Adapters of both weights of one module are state of their own."""
    _, folder = on_two("lora")
    context = stopped(folder, tmp_path / "stopped")
    sft.run(make_config(policy, data, **LORA_ON_TWO), context)
    assert [event["step"] for event in read_jsonl(context.events) if event["event"] == "resumed"] == [2]
    whole, again = weights_of(folder / "model"), weights_of(context.dir / "model")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("layout", ["same", "other"])
def test_a_stopped_sft_goes_on_in_another_layout(on_two, policy, data, tmp_path, layout):
    _, folder = on_two("whole")
    context = stopped(folder, tmp_path / "stopped")
    changes = {"same": {}, "other": {"parallel": {"processes": 1}, "gradient_accumulation": 2}}[layout]
    sft.run(make_config(policy, data, **{**SFT_ON_TWO, **changes}), context)
    assert [event["step"] for event in read_jsonl(context.events) if event["event"] == "resumed"] == [2]
    gap = distance(context.dir, folder, policy)
    assert gap == 0 if layout == "same" else gap < ROUNDING
    lines = list(read_jsonl(context.dir / "metrics.jsonl"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 5))


@pytest.mark.parametrize("zeros", [(3,), pytest.param((0, 1, 2), marks=pytest.mark.full)])
def test_dpo_on_two_ranks_learns_the_same_preferences(ranks, policy, tmp_path, zeros):
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for a in range(2, 10):
            prompt = [{"role": "user", "content": f"Sum: {a} + 3"}]
            row = {
                "id": f"p{a}",
                "prompt": prompt,
                "chosen": "So. " * (a % 4) + f"Answer: {a + 3}",
                "rejected": f"Answer: {a + 4}",
            }
            file.write(json.dumps(row) + "\n")
    base = {"model": {"path": str(policy), "dtype": "float32"}, "pairs": {"path": str(pairs)}, "max_length": 128,
            "nll_weight": 0.5, "optimizer": {"learning_rate": 1e-4}, "resources": RESOURCES}  # fmt: skip
    runs = {"alone": {"batch_size": 4}}
    runs |= {f"zero{zero}": {"batch_size": 2, "parallel": {**EXPERT, "zero": zero}} for zero in zeros}
    reports, losses = {}, {}
    for name, changes in runs.items():
        context = make_context(tmp_path / name)
        reports[name] = dpo.run(validate_config(DpoConfig, {**base, **changes}, "test"), context)
        losses[name] = [line["loss"] for line in read_jsonl(context.dir / "metrics.jsonl") if "loss" in line]
    for name in list(runs)[1:]:
        assert reports[name]["engine"] == "DeepSpeedEngine"
        assert losses[name] == pytest.approx(losses["alone"], rel=1e-4)
        assert distance(tmp_path / name, tmp_path / "alone", policy) < ROUNDING


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    return save_vision_policy(tmp_path_factory.mktemp("vision") / "model")


def test_sft_with_pictures_on_two_ranks_is_the_training_of_one_and_goes_on(ranks, vision, tmp_path):
    """Experts on two ranks, gradients divided; in some forwards a rank has no picture. The same data on one rank."""
    rows = write_picture_rows(tmp_path / "rows", 12)
    common = {"batch_tokens": 128, "checkpoint_every": 2, "gradient_accumulation": 1, "resources": RESOURCES,
              "images": {"learning_rates": {"projector": 2e-3}}}  # fmt: skip
    two = with_pictures(vision, rows, **common, parallel={**EXPERT, "zero": 2})
    one = with_pictures(vision, rows, **{**common, "gradient_accumulation": 2})
    losses = {
        name: sft.run(config, make_context(tmp_path / name))["loss_last"]
        for name, config in (("two", two), ("one", one))
    }
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    whole = all_weights_of(tmp_path / "two/model")
    assert apart(whole, all_weights_of(tmp_path / "one/model"), all_weights_of(vision)) < ROUNDING
    context = stopped(tmp_path / "two", tmp_path / "stopped")
    sft.run(two, context)
    assert [event["step"] for event in read_jsonl(context.events) if event["event"] == "resumed"] == [2]
    again = all_weights_of(context.dir / "model")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_dpo_with_pictures_on_two_ranks_is_the_training_of_one(ranks, vision, tmp_path):
    """ZeRO-3 divides the frozen encoder too. Of the held-out pairs one rank has those without a picture: the other
    waits for it at the encoder."""
    pairs = write_picture_pairs(tmp_path / "pairs", range(9, 17))
    held_out = write_picture_pairs(tmp_path / "held_out", [1, 2, 3, 6])
    base = {"model": {"path": str(vision), "dtype": "float32"}, "pairs": {"path": str(pairs)}, "max_length": 128,
            "images": {"freeze": ["vision"]}, "held_out": {"path": str(held_out)}, "nll_weight": 0.5,
            "optimizer": {"learning_rate": 1e-4}, "resources": RESOURCES}  # fmt: skip
    runs = {"one": {"batch_size": 4}, "two": {"batch_size": 2, "parallel": {"processes": 2, "zero": 3}}}
    logged: dict[str, dict[str, list[float]]] = {}
    for name, changes in runs.items():
        context = make_context(tmp_path / name)
        dpo.run(validate_config(DpoConfig, {**base, **changes}, "test"), context)
        lines = list(read_jsonl(context.dir / "metrics.jsonl"))
        logged[name] = {key: [line[key] for line in lines if key in line] for key in ("loss", "held_out_loss")}
        assert all(logged[name].values())
    for key, values in logged["two"].items():
        assert values == pytest.approx(logged["one"][key], rel=1e-4), key
    start, one, two = (all_weights_of(folder) for folder in (vision, tmp_path / "one/model", tmp_path / "two/model"))
    assert apart(two, one, start) < ROUNDING
    assert all(torch.equal(two[name], start[name]) == ("vision_model" in name) for name in start)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": {"processes": 2, "expert": 4}}, ["does not divide processes 2"]),
        ({"parallel": {"processes": 3, "expert": 3}}, ["got 3", "model's 4 experts"]),
        ({"parallel": EXPERT | {"zero": 1}, "lora": {"rank": 4}}, ["parallel.expert: got 2 with lora", "zero: 0 or 3"]),
        ({"parallel": EXPERT | {"zero": 2}, "lora": {"rank": 4}}, ["parallel.zero 2", "zero: 0 or 3"]),
        ({"parallel": EXPERT | {"zero": 0}, "lora": ADAPTERS["experts"]}, ["lora.target_parameters: AutoEP"]),
        ({"parallel": {"processes": 2, "expert": 2}, "implementation": "transformers"}, ["implementation: native"]),
        ({"parallel": {"zero": 0, "offload": "optimizer"}}, ["offload"]),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_any_rank_starts(policy, data, tmp_path, changes, words):
    model = {"path": str(policy), "dtype": "float32", "implementation": changes.pop("implementation", "native")}
    with pytest.raises(ConfigError) as caught:
        sft.run(make_config(policy, data, model=model, **changes), make_context(tmp_path))
    assert all(word in str(caught.value) for word in words), str(caught.value)
