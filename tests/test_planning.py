"""Plans on paper against what is measured: bytes of real tensors in real engines, forwards and caches."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Llama4TextConfig

sys.path.insert(0, str(Path(__file__).parent))
import plan_ranks
from test_expert_parallel import free_port

from posttrain.cli.main import main
from posttrain.config.training import AdaptersConfig, ParallelConfig
from posttrain.model.native import NativeLlama4ForCausalLM
from posttrain.model.recompute import checkpointing_arguments
from posttrain.planning.activations import kv_bytes, peak_bytes, saved_bytes
from posttrain.planning.memory import state_bytes
from posttrain.planning.sizes import count_sizes, find_model, read_config

TOKENS = 256


def sizes_of(name: str, lora=None):
    return count_sizes(read_config(find_model(name)), lora)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("llama4-scout", 107.8, 17.2), ("llama4-maverick", 400.7, 17.2), ("llama4-behemoth", 1990.0, 288.0)],
)
def test_parameters_equal_the_published_numbers(name, total, active):
    sizes = sizes_of(name)
    assert sizes.total / 1e9 == pytest.approx(total, rel=0.005)
    assert sizes.active / 1e9 == pytest.approx(active, rel=0.005)


def test_every_parameter_has_a_part():
    sizes = count_sizes(Llama4TextConfig(**plan_ranks.SHAPE))
    model = NativeLlama4ForCausalLM(Llama4TextConfig(**plan_ranks.SHAPE))
    assert sizes.total == sum(parameter.numel() for parameter in model.parameters())
    assert set(sizes.parts) == {
        "embeddings", "attention", "norms", "router", "shared expert", "routed experts", "dense MLP", "head",
    }  # fmt: skip


# --- activations and cache ---


class Alive(TorchDispatchMode):
    """Largest number of bytes of tensors made within that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


SHAPES = {
    "mixed": {},
    "deep": {"vocab_size": 96, "num_hidden_layers": 8},
    "all experts, no QK norm": {"vocab_size": 96, "interleave_moe_layer_step": 1, "use_qk_norm": False},
    "two experts a token": {"vocab_size": 96, "interleave_moe_layer_step": 1, "num_experts_per_tok": 2},
    "wide": {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 128},
}


def build(shape: str, dtype: str, checkpointing: str = "none"):
    model = NativeLlama4ForCausalLM(Llama4TextConfig(**{**plan_ranks.SHAPE, **SHAPES[shape]}))
    model = model.to(getattr(torch, dtype)).train()
    recompute(model, checkpointing)
    return model, torch.randint(3, 96, (1, TOKENS))


def recompute(model, mode: str) -> None:
    if mode != "none":
        model.gradient_checkpointing_enable(checkpointing_arguments(mode))


@pytest.mark.parametrize("checkpointing", ["none", "full"])  # what selective keeps, the hooks do not see
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_activations_equal_the_saved_tensors(shape, dtype, checkpointing):
    model, ids = build(shape, dtype, checkpointing)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(input_ids=ids, labels=ids, use_cache=False)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert out.loss.requires_grad
    assert saved_bytes(model.config, TOKENS, dtype, checkpointing=checkpointing) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_of_forward_and_backward(dtype, checkpointing):
    """With a vocabulary that is wide beside the layers, as in the real models: most is alive at the loss."""
    tokens = 512
    config = Llama4TextConfig(**{**plan_ranks.SHAPE, "vocab_size": 8192, "num_local_experts": 2})
    model = NativeLlama4ForCausalLM(config).to(getattr(torch, dtype)).train()
    recompute(model, checkpointing)
    ids = torch.randint(3, 96, (1, tokens))
    with Alive() as alive:
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
    assert peak_bytes(config, tokens, dtype, checkpointing=checkpointing) == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("length", [5, 40])
def test_the_planned_kv_cache_equals_the_measured_one(length):
    config = Llama4TextConfig(**{**plan_ranks.SHAPE, "attention_chunk_size": 16})
    model = NativeLlama4ForCausalLM(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 96, (3, length)), past_key_values=cache, use_cache=True)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert kv_bytes(config, 3, length, dtype="float32") == pytest.approx(measured, rel=0.1)


# --- real engines ---

CASES = [
    pytest.param(
        {"name": f"{dtype}-{processes}x{expert}z{zero}", "processes": processes, "expert": expert, "zero": zero,
         "dtype": dtype},
        id=f"{dtype}-{processes}x{expert}z{zero}",
        marks=[] if expert == 2 and (dtype == "bfloat16" or zero == 3) else [pytest.mark.full],
    )
    for dtype in ("float32", "bfloat16") for zero in (0, 1, 2, 3) for processes, expert in ((1, 1), (2, 1), (2, 2))
]  # fmt: skip
CASES += [
    pytest.param(
        {"name": f"{dtype}-{processes}x{expert}z{zero}-lora", "processes": processes, "expert": expert, "zero": zero,
         "dtype": dtype, "lora": {"rank": 64, **({} if expert > 1 else {"target_parameters": ["experts.down_proj"]})}},
        id=f"{dtype}-{processes}x{expert}z{zero}-lora",
        marks=[] if expert == 2 else [pytest.mark.full],
    )
    for dtype in ("float32", "bfloat16") for processes, expert, zero in ((1, 1, 0), (2, 1, 1), (2, 1, 3), (2, 2, 3))
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What a case gives; all selected cases of its number of ranks and experts are run in the same real ranks."""
    found: dict[str, dict[str, Any]] = {}
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [params["case"]["name"] for params in calls if isinstance(params.get("case"), dict)]

    def get(case: dict[str, Any]) -> dict[str, Any]:
        if case["name"] not in found:
            alike = [item for param in CASES if (item := param.values[0])["processes"] == case["processes"]
                     and item["expert"] == case["expert"] and item["name"] in selected]  # fmt: skip
            folder = tmp_path_factory.mktemp("plan")
            _run_in_ranks(folder, alike)
            found.update({item["name"]: json.loads((folder / f"{item['name']}.json").read_text()) for item in alike})
        return found[case["name"]]

    return get


def _run_in_ranks(folder: Path, cases: list[dict[str, Any]]) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    world = cases[0]["processes"]
    command = [sys.executable, plan_ranks.__file__]
    port = str(free_port())
    with (folder / "log").open("w") as log:
        ranks = [
            subprocess.Popen([*command, str(rank), str(world), port, str(folder)], stdout=log, stderr=log)
            for rank in range(world)
        ]
        try:
            codes = [rank.wait(timeout=500) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert codes == [0] * world, (folder / "log").read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES)
def test_planned_memory_equals_that_of_a_real_engine(measured, case):
    got = measured(case)
    lora = AdaptersConfig(**case["lora"]) if "lora" in case else None
    sizes = count_sizes(Llama4TextConfig(**plan_ranks.SHAPE), lora)
    assert bool(sizes.adapters) == (lora is not None)
    parallel = ParallelConfig(processes=case["processes"], expert=case["expert"], zero=case["zero"])
    given = {"dtype": case["dtype"], "adapters": sizes.adapters, "live": 0}
    want = state_bytes(sizes.total, sizes.experts, parallel, **given, bucket=plan_ranks.BUCKET)
    backward, steps = got["backward"], got["steps"]
    assert want.weights == pytest.approx(backward["weights"], rel=0.1)
    assert want.gradients == pytest.approx(backward["gradients"], rel=0.1)
    assert want.optimizer == pytest.approx(backward["optimizer"], rel=0.1, abs=64)
    assert want.step == pytest.approx(max(step["gradients"] for step in steps), rel=0.1)
    if case["zero"] in (1, 3):  # those of ZeRO-2 are gone when its backward returns
        assert want.buffers == pytest.approx(backward["buckets"], rel=0.1)
    # In total, whatever the tensors are for; all that one pass holds beside them is small.
    without_buckets = state_bytes(sizes.total, sizes.experts, parallel, **given, bucket=0)
    largest = max(sum(moment.values()) - moment["buckets"] for moment in (backward, *steps))
    assert without_buckets.total() == pytest.approx(largest, rel=0.1)


# --- the command ---


def test_the_command_prints_memory_and_layouts(capsys):
    assert main(["plan", "llama4-scout", "--gpus", "16", "parallel.expert=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["parallel"]["processes"] == 16
    assert len(found["layouts"]) == 4 * 5
    memory = found["memory"]
    assert memory["total"] == memory["weights"] + memory["optimizer"] + max(
        memory["step"], memory["gradients"] + memory["buffers"] + memory["activations"]
    )
    assert main(["plan", "llama4-scout", "--gpus", "16"]) == 0
    assert "routed experts" in capsys.readouterr().out


def test_adapters_are_counted_and_only_they_have_optimizer_state(capsys):
    found = []
    for given in ([], ["lora={rank: 16, target_parameters: [experts.down_proj]}"]):
        assert main(["plan", "llama4-scout", "--gpus", "8", *given, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    full, lora = found
    config = sizes_of("llama4-scout").config
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    attention = 2 * (2 * config.hidden_size + heads)  # inputs and outputs of the four
    experts = config.num_local_experts * (config.intermediate_size + config.hidden_size)
    assert lora["parameters"]["adapters"] == 16 * config.num_hidden_layers * (attention + experts)
    assert lora["memory"]["optimizer"] == 12 * -(-lora["parameters"]["adapters"] // 8)
    assert lora["memory"]["weights"] > full["memory"]["weights"]
    assert {row["expert"] for row in lora["layouts"]} == {1}  # experts with adapters are not divided
    assert main(["plan", "llama4-scout", "--gpus", "8", "lora={}"]) == 0
    assert "only these are trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no bundled model of that name; bundled: llama4-behemoth"),
        (["llama4-scout", "parallel.expert=3"], "parallel: "),
        (["llama4-scout", "--gpus", "3", "parallel.expert=3"], "must divide the model's experts (16)"),
        (["llama4-scout", "lora={target_modules: [query]}"], "lora.target_modules: got query: the linear modules"),
        (["llama4-scout", "lora={}", "parallel.expert=2", "parallel.zero=1"], "got 2 with lora and parallel.zero 1"),
        (["llama4-scout", "tokenz=3"], "did you mean 'tokens'?"),
        (["llama4-scout", "--gpu-gib", "0"], "must be positive"),
    ],
)
def test_wrong_input_of_the_command_is_refused(arguments, said, capsys):
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_other_architectures_are_counted(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2).save_pretrained(tmp_path)  # fmt: skip
    sizes = sizes_of(str(tmp_path))
    assert sizes.active == sizes.total
    assert sizes.parts["dense MLP"] == 2 * 3 * 32 * 64
    assert main(["plan", str(tmp_path)]) == 0


CHANGES = {
    "parallel.processes": 16, "parallel.expert": 4, "parallel.zero": 2, "parallel.offload": "optimizer",
    "dtype": "float32", "tokens": 100, "gradient_checkpointing": "none", "kv_sequences": 3, "kv_length": 100,
    "reserve": 0.3, "lora": {"rank": 16},
}  # fmt: skip
ADAPTERS_CHANGES = {
    "lora.rank": 8, "lora.target_modules": ["q_proj"], "lora.target_parameters": ["experts.down_proj"],
}  # fmt: skip
NO_MEMORY = {"lora.alpha", "lora.save"}  # accepted, so that the section of a training can be given as it is


def test_every_key_changes_the_plan():
    from config_leaves import find_leaves, set_at

    from posttrain.planning.config import PlanConfig
    from posttrain.planning.layouts import fits, need

    base = {**PlanConfig().model_dump(), "kv_sequences": 1}
    keys = {leaf.key for leaf in find_leaves(PlanConfig, base)}
    assert keys == set(CHANGES) | set(ADAPTERS_CHANGES) | NO_MEMORY

    def outcome(data):
        plan = PlanConfig.model_validate(data)
        needed = need(sizes_of("llama4-scout", plan.lora), plan)
        return needed.state, needed.activations, needed.kv, [fits(needed, plan, size) for size in range(1, 400)]

    adapters = set_at(base, "lora", {"rank": 16})
    for start, changes in ((base, CHANGES), (adapters, ADAPTERS_CHANGES)):
        before = outcome(start)
        for key, value in changes.items():
            assert outcome(set_at(start, key, value)) != before, key


@pytest.mark.slow
def test_schemas_need_no_torch():
    code = "import sys, posttrain.planning.config, posttrain.planning.memory, posttrain.planning.activations\n"
    subprocess.run([sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], check=True)
