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
import test_vision_sft
import torch
from closeness import ROUNDING, apart, assert_as_exact, assert_trained_as_exact, float64_inside
from moe import config, layers
from test_model import LENGTHS, PADDED, batch, documents, gradients, model_pair, named_gradients, pack
from test_shared_prefix import (
    CASES,
    SHORT_PATHS,
    attention_of_documents,
    outputs_and_gradients,
    random_documents,
    separate_states,
    shared_states,
)
from test_vision_model import ROWS, assert_gradients_as_exact, assert_packed_pictures_isolated
from vision_folder import write_picture_rows
from vision_models import save_vision_policy

from posttrain.config.resources import TrainerResources
from posttrain.config.training import ParallelConfig
from posttrain.data.pairs import write_pairs
from posttrain.dpo import stage as dpo_stage
from posttrain.dpo.examples import tokenize_pairs
from posttrain.model import load_model, load_tokenizer, tree_attention
from posttrain.model.recompute import checkpointing_arguments
from posttrain.model.tree_attention import TreeFlex, TreeKeys
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


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("limit", SHORT_PATHS.values(), ids=["keys", "flex"])
def test_gradient_checkpointing_with_shared_prefixes_is_as_exact(limit, mode, monkeypatch):
    monkeypatch.setattr(tree_attention, "_SHORT_PATH", limit)
    theirs, ours = model_pair(scale=0.15, head_dim=16)
    case = CASES["ragged"]
    with float64_inside():
        double = copy.deepcopy(theirs).double()
        exact = outputs_and_gradients(double, separate_states(double, case), case)
    ours = ours.cuda().train()
    packed = prefixes.pack(case, "cuda")
    peer = outputs_and_gradients(ours, shared_states(ours, packed), case)
    ours.gradient_checkpointing_enable(checkpointing_arguments(mode))
    got = outputs_and_gradients(ours, shared_states(ours, packed), case)
    for names in ({"logits"}, {"logprobs"}, exact.keys() - {"logits", "logprobs"}):
        assert_as_exact(*({name: found[name] for name in names} for found in (got, peer, exact)))


# Longer than the blocks of 128 tokens of FlexAttention's masks; paths of two nodes, and one that a chunk cuts.
LONG = random_documents([(300, [150, 90, 8, 400]), (700, [260, 3])], system=200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [None, 384])
def test_attention_in_long_trees_is_as_exact_as_that_of_the_documents(chunk, dtype):
    """Outputs and gradients of both ways, and of attention written out for each document; exact is that in float64."""
    packed = prefixes.pack(LONG, "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = [(1, heads, len(packed.tree), 128) for heads in (8, 2, 2, 8)]
    *given, grad = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes)

    def run(attend: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in given)
        out = attend(q, k, v)
        out.backward(grad.to(dtype))
        return {"out": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_of_documents(q, k, v, packed, chunk)

    peer, exact = run(written_out, dtype), run(written_out, torch.float64)
    nodes = packed.tree.nodes if chunk is None else packed.tree.chunks(chunk)
    for way in (TreeKeys.of(nodes, torch.device("cuda")), TreeFlex.of(packed.tree, chunk)):
        got = run(lambda q, k, v, way=way: way.attend(q, k, v, dropout=0.0), dtype)
        for name in exact:
            assert_as_exact(got[name], peer[name], exact[name])
        with torch.no_grad():  # compiled by itself: parity and the reference run without gradients
            assert_as_exact(way.attend(*given, dropout=0.0), peer["out"], exact["out"])


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_gradients_with_pictures_are_as_exact_as_those_of_transformers(rows):
    assert_gradients_as_exact(rows, "cuda")


def test_packed_documents_with_pictures_never_see_each_other():
    assert_packed_pictures_isolated("cuda")


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


def test_sft_with_pictures_trains_as_on_a_cpu(ray_session, tmp_path):
    model = save_vision_policy(tmp_path / "model")
    rows = write_picture_rows(tmp_path / "rows", 12)

    def train(name: str, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        folder = tmp_path / name
        settings = test_vision_sft.make_config(model, rows, epochs=2, **changes)
        sft_stage.run(settings, test_vision_sft.make_context(folder))
        return [line["loss"] for line in test_sft.steps_of(folder)], test_vision_sft.weights_of(folder / "model")

    cpu_losses, cpu = train("cpu")
    gpu_losses, gpu = train("gpu", **ON_GPU)
    assert gpu_losses == pytest.approx(cpu_losses, rel=ROUNDING)
    assert apart(gpu, cpu, test_vision_sft.weights_of(model)) < ROUNDING


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


@pytest.mark.parametrize("limit", SHORT_PATHS.values(), ids=["keys", "flex"])
def test_replies_of_a_pair_behind_one_prompt_are_as_exact_as_in_rows_of_their_own(policy, tmp_path, limit, monkeypatch):
    """Log-probabilities and gradients of DPO's trainer on the GPU; exact is transformers' model in float64."""
    monkeypatch.setattr(tree_attention, "_SHORT_PATH", limit)
    ids, _ = tokenize_pairs(load_tokenizer(policy), test_dpo.make_pairs(5), 128, overlong="error")
    trainer = test_dpo.make_trainer(test_dpo.make_config(policy, pairs={"path": "x"}), ids, tmp_path)
    batch = on_gpu(trainer.data_collator([trainer.train_dataset[i] for i in range(5)]))
    weights = torch.randn(10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def of(shared: bool) -> dict[str, torch.Tensor]:
        trainer.shares_prompts = shared
        trainer.model.zero_grad()
        outputs, _ = trainer._pairs(trainer.model, batch)
        logprobs = torch.cat([outputs.chosen_logprobs_P, outputs.rejected_logprobs_P])
        (logprobs * weights.to(logprobs)).sum().backward()
        found = {"logprobs": logprobs.detach(), **named_gradients(trainer.model)}
        return {name: value.cpu() for name, value in found.items()}

    got, peer = of(True), of(False)
    assert next(trainer.model.parameters()).is_cuda
    with float64_inside():
        double: Any = load_model(policy, "transformers").double()
        replies = [(item.prompt_ids, reply) for item in ids for reply in (item.chosen_ids, item.rejected_ids)]
        sums = torch.stack([test_dpo.reply_logprob(double, *reply).sum() for reply in replies[0::2] + replies[1::2]])
        (sums * weights).sum().backward()
    exact = {"logprobs": sums.detach(), **named_gradients(double)}
    assert_as_exact(got["logprobs"], peer["logprobs"], exact["logprobs"])
    assert_as_exact(*({name: value for name, value in x.items() if name != "logprobs"} for x in (got, peer, exact)))


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


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_adapters_of_rl_step_as_the_written_out_loss(rank, policy, tmp_path, zero):
    """Of attention and experts; what is sent is merged. Otherwise as the test before."""
    model = str(policy)
    lora = {**test_rl_trainer.LORA, "target_parameters": test_rl_trainer.EXPERTS}
    settings = test_rl_trainer.make_config(model, parallel={"zero": zero}, lora=lora, **ON_GPU)
    result = rank.get("run", settings, str(tmp_path))
    resumed = rank.get("resume", settings, str(tmp_path))
    peer, exact = test_rl_trainer.plain_adapter_training(settings)
    start = test_rl_trainer.start_of(model)
    trained = {**start, **result["weights"]}  # what no step changes is not sent
    test_rl_trainer.assert_steps_as_exact(result["metrics"], peer, exact)
    assert_trained_as_exact(trained, peer[2], exact[2], start)
    assert result["unchanged"]
    assert apart({**start, **resumed["weights"]}, trained, start) < ROUNDING
