"""On an NVIDIA GPU: the native model, and the stages that train without an engine, against a CPU and float64.

`make test-gpu` runs this file. Without a GPU every test of it is skipped, and counts as not run.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import test_dpo
import test_rl_trainer
import test_sft
import torch
from closeness import ROUNDING, apart, assert_as_exact, assert_trained_as_exact, float64_inside
from moe import config, layers
from test_model import LENGTHS, PADDED, batch, documents, gradients, model_pair, pack
from test_shared_prefix import CASES, SHORT_PATHS, outputs_and_gradients, separate_states, shared_states

from posttrain.config.resources import TrainerResources
from posttrain.config.training import ParallelConfig
from posttrain.data.pairs import write_pairs
from posttrain.dpo import stage as dpo_stage
from posttrain.model import tree_attention
from posttrain.parallel.ranks import RankGroup
from posttrain.sft import stage as sft_stage
from posttrain.train import prefixes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU: not run"),
]
ON_GPU = {"resources": {"trainer": {"cpus": 1, "gpus": 1}}}


def on_gpu(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in values.items()}


def on_cpu(found: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, grads = found
    return loss.cpu(), {name: grad.cpu() for name, grad in grads.items()}


@pytest.mark.parametrize("padding", [(0, 0, 0), PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_in_fp32_are_as_exact_as_those_of_transformers(top_k, padding):
    """Both on the GPU; exact is transformers' model in float64 on the CPU."""
    theirs, ours = model_pair(scale=0.15, num_experts_per_tok=top_k)
    inputs = batch(padding)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with float64_inside():
        exact_loss, exact = gradients(copy.deepcopy(theirs).double(), **inputs)
    peer_loss, peer = on_cpu(gradients(theirs.cuda(), **on_gpu(inputs)))
    got_loss, got = on_cpu(gradients(ours.cuda(), **on_gpu(inputs)))
    assert_as_exact(got_loss, peer_loss, exact_loss)
    assert_as_exact(got, peer, exact)


@pytest.mark.parametrize("num_experts", [4, 16])
def test_a_layer_in_bf16_is_as_exact_as_that_of_transformers(num_experts):
    """One layer and not a model: the routers of both then see one input, so that both choose the same experts."""
    ours, theirs = layers(config(num_experts), torch.bfloat16, "cuda")
    x_TD, grad_TD = (torch.randn(512, 256, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    double = copy.deepcopy(theirs).double()

    def run(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        weight = next(layer.parameters())
        x = x_TD.detach().to(weight.dtype).requires_grad_()
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(grad_TD.reshape(out.shape).to(out.dtype))
        found = {"out": out, "x": x.grad, **{name: value.grad for name, value in layer.named_parameters()}}
        return {name: value.detach().cpu().reshape(value.shape) for name, value in found.items()}

    got, peer = run(ours), run(theirs)
    with float64_inside():
        exact = run(double)
    for name in exact:
        assert_as_exact(got[name].reshape(exact[name].shape), peer[name].reshape(exact[name].shape), exact[name])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_documents_are_as_exact_as_documents_by_themselves(lengths):
    theirs, ours = model_pair(scale=0.15)
    docs = documents(lengths)
    with torch.no_grad():
        with float64_inside():
            double = copy.deepcopy(theirs).double()
            exact = torch.cat([double(doc).logits for doc in docs], 1)
        theirs, ours = theirs.cuda(), ours.cuda()
        peer = torch.cat([theirs(doc.cuda()).logits for doc in docs], 1)
        got = ours(**on_gpu(pack(docs))).logits
    assert_as_exact(got.cpu(), peer.cpu(), exact)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", SHORT_PATHS.values(), ids=["keys", "flex"])
def test_shared_prefixes_are_as_exact_as_documents_by_themselves(case, limit, monkeypatch):
    """By copied keys, and by FlexAttention, compiled. Its heads have 16 channels or more."""
    monkeypatch.setattr(tree_attention, "_SHORT_PATH", limit)
    theirs, ours = model_pair(scale=0.15, head_dim=16)
    with float64_inside():
        double = copy.deepcopy(theirs).double()
        exact = outputs_and_gradients(double, separate_states(double, CASES[case]), CASES[case])
    ours = ours.cuda()
    peer = outputs_and_gradients(ours, separate_states(ours, CASES[case]), CASES[case])
    got = outputs_and_gradients(ours, shared_states(ours, prefixes.pack(CASES[case], "cuda")), CASES[case])
    for names in ({"logits"}, {"logprobs"}, exact.keys() - {"logits", "logprobs"}):
        assert_as_exact(*({name: found[name] for name in names} for found in (got, peer, exact)))


@pytest.fixture(scope="module")
def sft(ray_session, policy, data, tmp_path_factory):
    """Losses and weights of an SFT with these changes of its config."""

    def train(**changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("sft")
        settings = test_sft.make_config(policy, data, epochs=2, **changes)
        result = sft_stage.run(settings, test_sft.make_context(folder))
        return [line["loss"] for line in test_sft.steps_of(folder)], test_sft.weights(Path(result["model"]))

    return train


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_sft_trains_as_on_a_cpu(sft, policy, lora):
    losses, weights = sft(lora=lora)
    modes = ["none"] if lora else ["none", "selective", "full"]
    for mode in modes:
        gpu_losses, gpu_weights = sft(lora=lora, gradient_checkpointing=mode, **ON_GPU)
        assert gpu_losses == pytest.approx(losses, rel=ROUNDING)
        assert apart(gpu_weights, weights, test_sft.weights(policy)) < ROUNDING


def test_sft_in_bf16_learns(ray_session, policy, data, tmp_path):
    model = {"path": str(policy), "dtype": "bfloat16"}
    settings = test_sft.make_config(policy, data, model=model, epochs=4, **ON_GPU)
    result = sft_stage.run(settings, test_sft.make_context(tmp_path))
    assert result["loss_last"] < 0.8 * result["loss_first"]


def test_dpo_trains_as_on_a_cpu(ray_session, policy, tmp_path):
    write_pairs(tmp_path / "in.jsonl", test_dpo.make_pairs(16))

    def train(name: str, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        settings = test_dpo.make_config(policy, pairs={"path": str(tmp_path / "in.jsonl")}, epochs=2, **changes)
        result = dpo_stage.run(settings, test_dpo.make_context(tmp_path / name))
        return [line["loss"] for line in test_dpo.steps_of(tmp_path / name)], test_sft.weights(Path(result["model"]))

    cpu_losses, cpu = train("cpu")
    gpu_losses, gpu = train("gpu", **ON_GPU)
    assert gpu_losses == pytest.approx(cpu_losses, rel=ROUNDING)
    assert apart(gpu, cpu, test_sft.weights(policy)) < ROUNDING


@pytest.fixture(scope="module")
def rank(ray_session):
    group = RankGroup(ParallelConfig(), TrainerResources(cpus=1, gpus=1), test_rl_trainer.Cases)
    yield group
    group.close()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_trainer_of_rl_steps_as_the_written_out_loss(rank, policy, tmp_path, zero):
    """On one rank with DeepSpeed over NCCL; checkpoint, refused update and export as in tests/test_rl_trainer.py."""
    model = str(policy)
    settings = test_rl_trainer.make_config(model, parallel={"zero": zero}, **ON_GPU)
    result = rank.get("run", settings, str(tmp_path))
    resumed = rank.get("resume", settings, str(tmp_path))
    peer, exact = (test_rl_trainer.plain_training(model, settings, dtype) for dtype in (torch.float32, torch.float64))
    test_rl_trainer.assert_steps_as_exact(result["metrics"], peer, exact)
    assert_trained_as_exact(result["weights"], peer[2], exact[2], test_rl_trainer.start_of(model))
    assert result["unchanged"]
    assert apart(resumed["weights"], result["weights"], test_rl_trainer.start_of(model)) < ROUNDING
