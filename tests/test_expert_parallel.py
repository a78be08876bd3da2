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
    """Run the cases in real ranks: all those of 2 processes in one group of 2, and so on."""
    (folder / "cases.json").write_text(json.dumps(cases))
    for world in sorted({case["processes"] for case in cases}):
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


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    for key, value in load_file(folder / f"{name}.safetensors").items():
        part, _, tensor = key.partition("/")
        found.setdefault(part, {})[tensor] = value
    return found


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


CASES = [
    make_case(processes, zero, optimizer)
    for processes in (2, 4)
    for zero in (0, 1, 2, 3)
    for optimizer in ("sgd", "adamw")
]
BF16 = [make_case(processes, zero, "adamw", dtype="bfloat16") for processes in (2, 4) for zero in (0, 1, 2, 3)]
for case in CASES:
    if case["optimizer"] == "adamw" and case["processes"] == 2:
        case |= {"export": f"export-z{case['zero']}", "shard_bytes": 40_000}


# Layouts that go on from two ranks' state: name, processes, expert.
OTHERS = [("one", 1, 1), ("four", 4, 2), ("four-apart", 4, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    save_hostile_model(folder)
    adamw = [case for case in CASES if "export" in case]
    halves = [
        {**case, "name": f"half-z{case['zero']}", "end": HALF, "save": f"state-z{case['zero']}", "export": f"h{i}"}
        for i, case in enumerate(adamw)
    ]
    # Resumed in its own layout, and in another: z1 -> z3, z2 -> z0, ...
    resumed = [
        {
            **case,
            "name": f"resumed-{old['zero']}-{case['zero']}",
            "begin": HALF,
            "resume": old["save"],
            "export": f"e{i}",
        }
        for i, (case, old) in enumerate([*zip(adamw, halves, strict=True), *zip(adamw, halves[::-1], strict=True)])
    ]
    others = [
        {**make_case(processes, 1, "adamw"), "expert": expert, "name": name, "begin": HALF, "resume": "state-z3"}
        for name, processes, expert in OTHERS
    ]
    launch(folder, [*CASES, *halves, *BF16])
    launch(folder, [*resumed, *others])
    return folder


@pytest.fixture(scope="module")
def plain(folder) -> dict[str, dict[str, Any]]:
    return {optimizer: expert_ranks.one_process(folder, optimizer) for optimizer in ("sgd", "adamw")}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_train_as_one_process(folder, plain, processes, zero):
    sgd, adamw = (result(folder, f"{processes}x2z{zero}{optimizer}") for optimizer in ("sgd", "adamw"))
    assert sgd["kinds"] == ["ExpertParallelMoE"]
    for got, want in ((sgd, plain["sgd"]), (adamw, plain["adamw"])):
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert error(got["first"], want["first_gradients"]) < 1e-6
    assert error(sgd["weights"], plain["sgd"]["weights"]) < 1e-5


def distances(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Root mean square of the differences of two runs: in the losses, the first gradients, the last weights."""

    def parts(run: dict[str, Any]) -> dict[str, torch.Tensor]:
        names = sorted(run["weights"])
        vectors = {key: torch.cat([run[key][name].float().flatten() for name in names]) for key in ("first", "weights")}
        return {"losses": torch.tensor(run["losses"]), **vectors}

    mine, theirs = parts(one), parts(other)
    return {key: float((mine[key] - theirs[key]).square().mean().sqrt()) for key in mine}


@pytest.fixture(scope="module")
def plain_bf16(folder) -> list[dict[str, Any]]:
    """The training in one process in bf16, with other sums in each way of cutting its rows."""
    runs = [expert_ranks.one_process(folder, "adamw", "bfloat16", rows) for rows in (1, 2, 3, 4)]
    return [{**run, "first": run["first_gradients"]} for run in runs]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_bf16_is_as_near_as_its_own_rounding(folder, plain_bf16, processes, zero):
    own = [distances(one, other) for one, other in itertools.combinations(plain_bf16, 2)]
    got = [distances(one, result(folder, f"{processes}x2z{zero}adamwbfloat16")) for one in plain_bf16]
    for name in own[0]:
        assert max(item[name] for item in got) < 2 * max(item[name] for item in own), (name, got, own)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_export_holds_every_expert(folder, zero):
    exported = load_model(folder / f"export-z{zero}", "native")
    assert error(dict(exported.named_parameters()), result(folder, f"2x2z{zero}adamw")["weights"]) == 0
    assert len(list((folder / f"export-z{zero}").glob("model-*.safetensors"))) > 1
    from transformers import AutoTokenizer, Llama4ForCausalLM

    theirs, info = Llama4ForCausalLM.from_pretrained(folder / f"export-z{zero}", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.architectures == ["Llama4ForCausalLM"]
    assert len(AutoTokenizer.from_pretrained(folder / f"export-z{zero}")) == theirs.config.vocab_size


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_resumed_in_its_layout_is_bit_equal(folder, zero):
    whole, resumed = result(folder, f"2x2z{zero}adamw"), result(folder, f"resumed-{zero}-{zero}")
    assert error(resumed["loaded"], result(folder, f"half-z{zero}")["weights"]) == 0
    assert resumed["losses"] == whole["losses"][HALF:]
    assert error(resumed["weights"], whole["weights"]) == 0


@pytest.mark.parametrize(("old", "new"), [(3, 0), (2, 1), (1, 2), (0, 3)])
def test_resumed_in_another_layout(folder, old, new):
    whole, resumed = result(folder, f"2x2z{old}adamw"), result(folder, f"resumed-{old}-{new}")
    assert error(resumed["loaded"], result(folder, f"half-z{old}")["weights"]) == 0
    assert resumed["losses"] == pytest.approx(whole["losses"][HALF:], rel=1e-5)


@pytest.mark.parametrize(("name", "processes", "expert"), OTHERS)
def test_resumed_by_another_number_of_ranks(folder, name, processes, expert):
    whole, resumed = result(folder, "2x2z3adamw"), result(folder, name)
    assert resumed["kinds"] == ["MoE" if expert == 1 else "ExpertParallelMoE"]
    assert error(resumed["loaded"], result(folder, "half-z3")["weights"]) == 0
    assert resumed["losses"] == pytest.approx(whole["losses"][HALF:], rel=1e-5)
