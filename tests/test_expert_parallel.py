"""DeepSpeed expert parallelism against one plain process: real ranks over gloo.

The model is the hostile one of test_model.py; every step clips its gradients, so a norm that misses the experts of
another rank shows.
"""

import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_exact, assert_trained_as_exact, float64_inside
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import expert_ranks
from test_model import hostile_config

from posttrain.model.load import load_model

pytestmark = pytest.mark.slow
HALF = 5


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(folder: Path, cases: list[dict[str, Any]]) -> None:
    """Run the cases in real ranks, as many as each of them wants."""
    (folder / "cases.json").write_text(json.dumps(cases))
    (world,) = {case["processes"] for case in cases}
    port = free_port()
    command = [sys.executable, expert_ranks.__file__]
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(world)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(port), str(folder)], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = "\n".join((folder / f"rank{rank}.log").read_text()[-2000:] for rank in range(world))
    assert codes == [0] * world, said


def error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    assert got.keys() == want.keys()
    return max(
        float((got[name].float() - want[name].float()).abs().max() / want[name].float().abs().max()) for name in want
    )


def save_hostile_model(folder: Path) -> None:
    from posttrain.base.tokenizer import build_tokenizer
    from posttrain.model import NativeLlama4ForCausalLM, save_model

    torch.manual_seed(5)
    tokenizer = build_tokenizer()
    # Widths of whole 16-byte words also in bf16, as the grouped kernel wants them.
    model = NativeLlama4ForCausalLM(
        hostile_config(vocab_size=len(tokenizer), intermediate_size=48, intermediate_size_mlp=64, pad_token_id=None)
    )
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape)
            weight.copy_(1 + 0.3 * noise if weight.dim() == 1 else 0.2 * noise)
    save_model(model, tokenizer, folder / "model")


def make_case(processes: int, zero: int, optimizer: str, **more: Any) -> dict[str, Any]:
    """Two ranks an expert group: with 4 ranks, expert parallelism times expert-data parallelism."""
    name = f"{processes}x2z{zero}{optimizer}{more.get('dtype', '')}"
    return {"processes": processes, "expert": 2, "zero": zero, "optimizer": optimizer, "name": name, **more}


def exported(zero: int, folder: str) -> dict[str, Any]:
    return make_case(2, zero, "adamw", export=folder, shard_bytes=40_000)


ZEROS = (0, 1, 2, 3)
TWO = [make_case(2, zero, "sgd") for zero in ZEROS] + [exported(zero, f"export-z{zero}") for zero in ZEROS]
HALVES = [
    {**exported(zero, f"half-export-z{zero}"), "name": f"half-z{zero}", "end": HALF, "save": f"state-z{zero}"}
    for zero in ZEROS
]


def resumed(old: int, new: int) -> dict[str, Any]:
    return {**make_case(2, new, "adamw"), "name": f"resumed-{old}-{new}", "begin": HALF, "resume": f"state-z{old}"}


# In its own layout, and in another; two more of these for the full matrix.
RESUMED = [resumed(old, new) for old, new in [*zip(ZEROS, ZEROS, strict=True), (3, 0), (1, 2)]]
RESUMED_TOO = [resumed(old, new) for old, new in ((2, 1), (0, 3))]
# Layouts that go on from two ranks' state: name, processes, expert.
OTHERS = [("one", 1, 1), ("four", 4, 2), ("four-apart", 4, 4)]
ONE, *FOUR_RESUMED = (
    {**make_case(processes, 1, "adamw"), "expert": expert, "name": name, "begin": HALF, "resume": "state-z3"}
    for name, processes, expert in OTHERS
)


def four(*zeros: int) -> list[dict[str, Any]]:
    return [make_case(4, zero, optimizer) for zero in zeros for optimizer in ("sgd", "adamw")]


def bf16(processes: int) -> list[dict[str, Any]]:
    return [make_case(processes, zero, "adamw", dtype="bfloat16") for zero in ZEROS]


GROUPS = [
    [*TWO, *HALVES, *bf16(2)],
    RESUMED,
    [ONE],
    [*four(3), *FOUR_RESUMED],
    [*four(0, 1, 2), *bf16(4)],
    RESUMED_TOO,
]


class Runs:
    """What each case gave, by its name. A group is run in real ranks when the first of its cases is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getitem__(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            group = next(group for group in GROUPS if any(case["name"] == name for case in group))
            if any("resume" in case for case in group):
                self[HALVES[0]["name"]]
            launch(self.folder, group)
        found: dict[str, Any] = json.loads(path.read_text())
        for key, value in load_file(path.with_suffix(".safetensors")).items():
            part, _, tensor = key.partition("/")
            found.setdefault(part, {})[tensor] = value
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("experts")
    save_hostile_model(folder)
    return Runs(folder)


@pytest.fixture(scope="module")
def plain(runs) -> dict[str, dict[str, Any]]:
    return {optimizer: expert_ranks.one_process(runs.folder, optimizer) for optimizer in ("sgd", "adamw")}


@pytest.fixture(scope="module")
def exact(runs) -> dict[str, dict[str, Any]]:
    """The same trainings in float64."""
    with float64_inside():
        return {
            optimizer: expert_ranks.one_process(runs.folder, optimizer, "float64") for optimizer in ("sgd", "adamw")
        }


def assert_losses_as_exact(got: list[float], peer: list[float], exact: list[float]) -> None:
    assert_as_exact(*(torch.tensor(losses, dtype=torch.float64) for losses in (got, peer, exact)))


@pytest.mark.parametrize(
    ("processes", "zero"),
    [*((2, zero) for zero in ZEROS), (4, 3), *(pytest.param(4, z, marks=pytest.mark.full) for z in (0, 1, 2))],
)
def test_ranks_train_as_one_process(runs, plain, exact, processes, zero, record_property):
    sgd, adamw = (runs[f"{processes}x2z{zero}{optimizer}"] for optimizer in ("sgd", "adamw"))
    assert sgd["kinds"] == ["ExpertParallelMoE"]
    for optimizer, got in (("sgd", sgd), ("adamw", adamw)):
        want = plain[optimizer]
        gaps = [abs(a / b - 1) for a, b in zip(got["losses"], want["losses"], strict=True)]
        record_property(f"{optimizer}_losses", max(gaps))
        record_property(f"{optimizer}_first_gradients", error(got["first"], want["first_gradients"]))
        assert_losses_as_exact(got["losses"], want["losses"], exact[optimizer]["losses"])
        assert_as_exact(got["first"], want["first_gradients"], exact[optimizer]["first_gradients"])
    record_property("sgd_weights", error(sgd["weights"], plain["sgd"]["weights"]))
    start = {name: weight.detach() for name, weight in expert_ranks.load(runs.folder, "float32").named_parameters()}
    for optimizer, got in (("sgd", sgd), ("adamw", adamw)):
        assert_trained_as_exact(got["weights"], plain[optimizer]["weights"], exact[optimizer]["weights"], start)


def distances(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Root mean square of the differences of two runs: in the losses, the first gradients, the last weights."""

    def parts(run: dict[str, Any]) -> dict[str, torch.Tensor]:
        names = sorted(run["weights"])
        vectors = {key: torch.cat([run[key][name].float().flatten() for name in names]) for key in ("first", "weights")}
        return {"losses": torch.tensor(run["losses"]), **vectors}

    mine, theirs = parts(one), parts(other)
    return {key: float((mine[key] - theirs[key]).square().mean().sqrt()) for key in mine}


@pytest.fixture(scope="module")
def plain_bf16(runs) -> list[dict[str, Any]]:
    """The training in one process in bf16, with other sums in each way of cutting its rows."""
    alone = [expert_ranks.one_process(runs.folder, "adamw", "bfloat16", rows) for rows in (1, 2, 3, 4)]
    return [{**run, "first": run["first_gradients"]} for run in alone]


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.full)])
def test_bf16_is_as_near_as_its_own_rounding(runs, plain_bf16, processes, zero, record_property):
    own = [distances(one, other) for one, other in itertools.combinations(plain_bf16, 2)]
    got = [distances(one, runs[f"{processes}x2z{zero}adamwbfloat16"]) for one in plain_bf16]
    for name in own[0]:
        record_property(name, max(item[name] for item in got) / max(item[name] for item in own))
        assert max(item[name] for item in got) < 2 * max(item[name] for item in own), (name, got, own)


@pytest.mark.parametrize("zero", ZEROS)
def test_export_holds_every_expert(runs, zero):
    want = runs[f"2x2z{zero}adamw"]["weights"]
    folder = runs.folder / f"export-z{zero}"
    assert error(dict(load_model(folder, "native").named_parameters()), want) == 0
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    from transformers import AutoTokenizer, Llama4ForCausalLM

    theirs, info = Llama4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.architectures == ["Llama4ForCausalLM"]
    assert len(AutoTokenizer.from_pretrained(folder)) == theirs.config.vocab_size


@pytest.mark.parametrize("zero", ZEROS)
def test_a_training_resumed_in_its_own_layout_is_bit_equal(runs, zero):
    whole, resumed = runs[f"2x2z{zero}adamw"], runs[f"resumed-{zero}-{zero}"]
    assert error(resumed["loaded"], runs[f"half-z{zero}"]["weights"]) == 0
    assert resumed["losses"] == whole["losses"][HALF:]
    assert error(resumed["weights"], whole["weights"]) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [(3, 0), (1, 2), pytest.param(2, 1, marks=pytest.mark.full), pytest.param(0, 3, marks=pytest.mark.full)],
)
def test_resumed_in_another_layout(runs, plain, exact, old, new):
    resumed = runs[f"resumed-{old}-{new}"]
    assert error(resumed["loaded"], runs[f"half-z{old}"]["weights"]) == 0
    assert_losses_as_exact(resumed["losses"], plain["adamw"]["losses"][HALF:], exact["adamw"]["losses"][HALF:])


@pytest.mark.parametrize(("name", "processes", "expert"), OTHERS)
def test_a_training_resumed_on_another_number_of_ranks_is_the_same_training(
    runs, plain, exact, name, processes, expert
):
    resumed = runs[name]
    assert resumed["kinds"] == ["MoE" if expert == 1 else "ExpertParallelMoE"]
    assert error(resumed["loaded"], runs["half-z3"]["weights"]) == 0
    assert_losses_as_exact(resumed["losses"], plain["adamw"]["losses"][HALF:], exact["adamw"]["losses"][HALF:])
