"""Routers: the load-balance loss by hand, figures for metrics, replayed choices, and that no token is dropped."""

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_exact, float64_inside
from transformers import Llama4TextConfig

from posttrain.model import NativeLlama4ForCausalLM
from posttrain.model.moe import MoE, Routing
from posttrain.model.recompute import checkpointing_arguments
from posttrain.model.router_balance import RouterBalance
from posttrain.model.router_stats import RouterLossWeights, load_balance_loss, router_stats, z_loss


def tiny_config(**changes) -> Llama4TextConfig:
    settings: dict[str, Any] = {
        "vocab_size": 29, "hidden_size": 16, "intermediate_size": 12, "intermediate_size_mlp": 20,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    }  # fmt: skip
    return Llama4TextConfig(**settings | changes)


def tiny_model(**changes) -> NativeLlama4ForCausalLM:
    torch.manual_seed(0)
    model = NativeLlama4ForCausalLM(tiny_config(initializer_range=0.3, **changes))
    return model.train()


IDS = torch.randint(1, 29, (3, 10), generator=torch.Generator().manual_seed(1))


def test_load_balance_loss_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]))
    routing = Routing(logits, torch.tensor([[0], [0], [1], [2]]))
    # loads 1/2, 1/4, 1/4; mean probabilities 0.35, 0.325, 0.325
    assert load_balance_loss([routing]).item() == pytest.approx(3 * (0.5 * 0.35 + 0.25 * 0.325 + 0.25 * 0.325))
    # without the last token: loads 2/3, 1/3, 0; mean probabilities 0.4, 1.1 / 3, 0.7 / 3
    keep = torch.tensor([True, True, True, False])
    assert load_balance_loss([routing], keep).item() == pytest.approx(3 * (2 / 3 * 0.4 + 1 / 3 * 1.1 / 3))


def test_load_balance_loss_is_one_when_balanced_and_e_when_collapsed():
    balanced = Routing(torch.zeros(8, 4), torch.arange(8)[:, None] % 4)
    collapsed = Routing(torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1), torch.zeros(8, 1, dtype=torch.long))
    assert load_balance_loss([balanced]).item() == pytest.approx(1.0)
    assert load_balance_loss([collapsed]).item() == pytest.approx(4.0)
    assert load_balance_loss([balanced, collapsed]).item() == pytest.approx(2.5)


def test_load_balance_gradient_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]])
    logits = probs.log().requires_grad_()
    load_balance_loss([Routing(logits, torch.tensor([[0], [0]]))]).backward()
    # 3 * mean_t p_t0, and d p_0 / d logit_e = p_0 (1[e = 0] - p_e)
    want = torch.tensor([[0.5 * 0.5, -0.5 * 0.3, -0.5 * 0.2], [0.6 * 0.4, -0.6 * 0.2, -0.6 * 0.2]]) * 3 / 2
    torch.testing.assert_close(logits.grad, want)


def test_z_loss_and_its_gradient_by_hand():
    # The sums of exponentials are 4 and 1, so the logs of them 1.3863 and 0.
    logits = torch.tensor([[1.0, 2.0, 1.0], [0.25, 0.5, 0.25]]).log().requires_grad_()
    routing = Routing(logits, torch.zeros(2, 1, dtype=torch.long))
    loss = z_loss([routing])
    assert loss.item() == pytest.approx(math.log(4) ** 2 / 2)
    loss.backward()
    want = torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.0, 0.0]]) * 2 * math.log(4) / 2
    torch.testing.assert_close(logits.grad, want)
    assert z_loss([routing], torch.tensor([True, False])).item() == pytest.approx(math.log(4) ** 2)
    quiet = Routing(torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 1, dtype=torch.long))
    assert z_loss([routing, quiet]).item() == pytest.approx(math.log(4) ** 2 / 4)  # mean over layers


def test_both_losses_enter_the_loss_by_their_weights():
    plain, model = tiny_model(), tiny_model()
    model.model.router_loss_weights = RouterLossWeights(balance=0.5, z=0.25)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    without, with_both = plain(IDS, mask, labels=IDS), model(IDS, mask, labels=IDS)
    inner = model.model(IDS, mask)
    routings, keep = model.model.last_routings
    assert keep.sum() == 24
    assert inner.aux_loss.item() == pytest.approx(load_balance_loss(routings, keep).item(), rel=1e-5)
    assert inner.z_loss.item() == pytest.approx(z_loss(routings, keep).item(), rel=1e-5)
    added = 0.5 * inner.aux_loss + 0.25 * inner.z_loss
    torch.testing.assert_close(inner.router_loss, added)
    torch.testing.assert_close(with_both.loss, without.loss + added)
    weight = model.model.layers[1].feed_forward.router.weight
    (got,) = torch.autograd.grad(with_both.loss - added, weight)
    (want,) = torch.autograd.grad(without.loss, plain.model.layers[1].feed_forward.router.weight)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        outputs = model.model(IDS, mask)
    assert (outputs.aux_loss, outputs.z_loss, outputs.router_loss) == (None, None, None)


def test_coefficient_adds_to_the_loss_and_moves_the_router():
    plain, balanced = tiny_model(), tiny_model(router_aux_loss_coef=0.5)
    without, with_aux = plain(IDS, labels=IDS), balanced(IDS, labels=IDS)
    assert without.aux_loss is None
    assert with_aux.loss.item() == pytest.approx(without.loss.item() + 0.5 * with_aux.aux_loss.item(), rel=1e-6)
    without.loss.backward()
    with_aux.loss.backward()
    name = "model.layers.1.feed_forward.router.weight"
    assert not torch.allclose(plain.get_parameter(name).grad, balanced.get_parameter(name).grad)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, 0.0),  # transformers' default, which nothing reads there
        ({"router_aux_loss_coef": 0.0}, 0.0),
        ({"router_aux_loss_coef": 0.02}, 0.02),
        ({"router_aux_loss_coef": 0.001, "output_router_logits": True}, 0.001),
    ],
)
def test_which_coefficient_counts(changes, want):
    assert tiny_model(**changes).config.router_aux_loss_coef == want


def test_stats_leave_padding_out():
    model = tiny_model()
    assert model.model.last_router_stats is None
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    model(IDS, attention_mask=mask)
    stats = model.model.last_router_stats
    assert stats.load_LE.shape == (2, 4)
    torch.testing.assert_close(stats.load_LE.sum(-1), torch.ones(2))
    assert torch.all((stats.entropy_L > 0) & (stats.entropy_L < math.log(4)))
    counts = stats.load_LE * mask.sum() * 2
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)


def test_entropy_by_hand():
    stats = router_stats([Routing(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.tensor([[0], [0]]))])
    assert stats.entropy_L.item() == pytest.approx(math.log(2) / 2)
    assert stats.load_LE.tolist() == [[1.0, 0.0]]
    assert stats.dead_L.tolist() == [1]


def _one_token_at_a_time(moe: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """What the layer means, in the plainest words."""
    rows = []
    for x in x_TD:
        logits = moe.router(x)
        out = moe.shared_expert(x)
        for expert in logits.topk(moe.top_k).indices.tolist():
            gate, up = (torch.sigmoid(logits[expert]) * x @ moe.experts.gate_up_proj[expert]).chunk(2)
            out = out + (F.silu(gate) * up) @ moe.experts.down_proj[expert]
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 37])
def test_moe_layer_by_hand(top_k, tokens):
    moe = tiny_model(num_experts_per_tok=top_k).model.layers[0].feed_forward
    x = torch.randn(tokens, 16, requires_grad=True)
    mix = torch.randn(tokens, 16)

    def with_gradients(layer, moe: MoE, x: torch.Tensor):
        out = layer(x)
        weights = [x, moe.router.weight, moe.experts.gate_up_proj, moe.experts.down_proj]
        return [out.detach(), *torch.autograd.grad((out * mix.to(x.dtype)).sum(), weights)]

    def by_hand(moe: MoE, x: torch.Tensor):
        return with_gradients(lambda x: _one_token_at_a_time(moe, x), moe, x)

    with float64_inside():
        exact = by_hand(copy.deepcopy(moe).double(), x.detach().double().requires_grad_())
    for found in zip(with_gradients(moe, moe, x), by_hand(moe, x), exact, strict=True):
        assert_as_exact(*found)


def test_every_token_to_one_expert_is_not_dropped():
    moe = tiny_model(num_experts_per_tok=1).model.layers[0].feed_forward
    with torch.no_grad():
        moe.router.weight.zero_()[2] = 1.0
    x = torch.rand(64, 16) + 0.1
    with float64_inside():
        exact = _one_token_at_a_time(copy.deepcopy(moe).double(), x.double())
    assert_as_exact(moe(x), _one_token_at_a_time(moe, x), exact)


def test_replaying_the_routers_own_choice_changes_nothing():
    model = tiny_model()
    out = model(IDS, labels=IDS, output_router_logits=True)
    chosen = torch.stack([logits.topk(2).indices.view(3, 10, 2) for logits in out.router_logits], dim=2)
    replayed = model(IDS, labels=IDS, routed_experts=chosen)
    assert torch.equal(replayed.logits, out.logits)
    (want,) = torch.autograd.grad(out.loss, model.model.layers[0].feed_forward.router.weight)
    (got,) = torch.autograd.grad(replayed.loss, model.model.layers[0].feed_forward.router.weight)
    torch.testing.assert_close(got, want)


def test_replaying_another_choice_uses_it_with_the_gates_gradient():
    model = tiny_model(num_experts_per_tok=1, moe_layers=[1])
    ids = torch.full((3, 10, 1, 1), 3)
    model(IDS, labels=IDS, routed_experts=ids).loss.backward()
    moe = model.model.layers[1].feed_forward
    assert model.model.last_router_stats.load_LE.tolist() == [[0, 0, 0, 1]]
    assert moe.router.weight.grad[3].abs().sum() > 0
    assert not moe.router.weight.grad[:3].any()
    assert not moe.experts.down_proj.grad[:3].any()


def test_replay_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"routed_experts has shape \[3, 10, 1, 2\]"):
        tiny_model()(IDS, routed_experts=torch.zeros(3, 10, 1, 2, dtype=torch.long))


def test_router_works_in_fp32_in_a_bf16_model():
    model = tiny_model().bfloat16()
    out = model(IDS, output_router_logits=True)
    assert out.logits.dtype == torch.bfloat16
    assert all(logits.dtype == torch.float32 for logits in out.router_logits)


# --- the bias on the choice of experts -------------------------------------------------------------------------


def test_a_bias_moves_the_choice_and_no_gate():
    moe = tiny_model(num_experts_per_tok=1).model.layers[0].feed_forward
    x = torch.randn(20, 16)
    logits = moe.router(x)
    plain = moe(x)
    moe.choice_bias_E = torch.zeros(4)
    assert torch.equal(moe(x), plain)
    moe.choice_bias_E = torch.tensor([0.0, 0.0, 100.0, 0.0])
    moe.recorder = []
    got = moe(x)
    assert torch.equal(moe.recorder[0].logits_TE, logits)
    assert moe.recorder[0].expert_ids_TK.unique().tolist() == [2]
    moe.recorder = None

    def third_expert(moe: MoE, x: torch.Tensor) -> torch.Tensor:
        # The gate is the sigmoid of the logit alone: with the bias in it, every gate would be 1.
        gate, up = (torch.sigmoid(moe.router(x)[:, 2:3]) * x @ moe.experts.gate_up_proj[2]).chunk(2, -1)
        return moe.shared_expert(x) + (F.silu(gate) * up) @ moe.experts.down_proj[2]

    with float64_inside():
        exact = third_expert(copy.deepcopy(moe).double(), x.double())
    assert_as_exact(got, third_expert(moe, x), exact)
    forced = torch.full((20, 1), 1)
    moe.choice_bias_E = None
    replayed = moe(x, forced)
    moe.choice_bias_E = torch.tensor([0.0, 0.0, 100.0, 0.0])
    assert torch.equal(moe(x, forced), replayed)  # a replayed choice is not biased


def _counted(model) -> list[int]:
    routings, _ = model.model.last_routings
    return torch.bincount(routings[0].expert_ids_TK.flatten(), minlength=4).tolist()


def test_a_step_moves_the_bias_by_its_rate_towards_even_loads():
    model = tiny_model(num_experts_per_tok=1, moe_layers=[1])
    bias = RouterBalance(model, rate=0.125)
    with torch.no_grad():
        model(IDS)  # not a step of training
    counts = [0, 0, 0, 0]
    for ids in (IDS[:1], IDS[1:]):
        model(ids)
        counts = [a + b for a, b in zip(counts, _counted(model), strict=True)]
    assert sum(counts) == 30
    stats = bias.update(progress=0.25)
    assert stats.load_LE.tolist() == [pytest.approx([count / 30 for count in counts])]
    want = [0.125 * ((count < 7.5) - (count > 7.5)) for count in counts]
    assert bias.bias_LE.tolist() == [want]
    assert model.model.step_load_LE.tolist() == stats.load_LE.tolist()
    layer = model.model.layers[1].feed_forward
    assert layer.choice_bias_E.tolist() == [0.75 * value for value in want]
    assert bias.update(progress=0.5) is None  # nothing was counted since
    assert bias.bias_LE.tolist() == [want]
    assert layer.choice_bias_E.tolist() == [0.5 * value for value in want]
    bias.update(progress=1.0)
    assert layer.choice_bias_E is None
    assert not any("bias" in name for name in model.state_dict())


def test_the_bias_balances_a_skewed_router():
    model = tiny_model(num_experts_per_tok=1, moe_layers=[1], vocab_size=499)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.model.layers[1].feed_forward.router.weight[3, 0] += 1.0  # what every token has, this expert likes
    generator = torch.Generator().manual_seed(2)
    bias = RouterBalance(model, rate=0.01)

    def loads(progress: float) -> torch.Tensor:
        model(torch.randint(1, 499, (8, 100), generator=generator))
        return 4 * bias.update(progress).load_LE[0]

    seen = torch.stack([loads(0.0) for _ in range(300)])
    assert seen[0].max() > 2.5
    assert seen[-50:].mean(0).max() < 1.05
    assert seen[-50:].max(-1).values.mean() < 1.4
    bias.update(progress=1.0)
    assert loads(1.0).max() > 2.5  # faded: the router was not trained, and is as skewed as it was


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_what_is_computed_again_is_not_counted_again(mode):
    model = tiny_model()
    bias = RouterBalance(model, rate=0.0)
    model.gradient_checkpointing_enable(checkpointing_arguments(mode))
    model(IDS, labels=IDS).loss.backward()
    assert bias._counts_LE.sum(-1).tolist() == [60, 60]
    assert bias.update(0.5).load_LE.shape == (2, 4)
    assert model.model.layers[0].feed_forward.choice_bias_E is None  # a rate of 0 makes no bias


def test_the_balance_loss_of_a_training_takes_the_loads_of_the_step_before():
    model = tiny_model(router_aux_loss_coef=1.0)
    balance = RouterBalance(model, rate=0.0)
    first = model.model(IDS)
    assert first.aux_loss.item() == pytest.approx(1.0, rel=1e-6)  # no step before: even loads, which push no router
    balance.update(0.5)
    load_LE, (routings, _) = balance.load_LE, model.model.last_routings
    second = model.model(IDS[:1])
    means_LE = torch.stack([routing.logits_TE[: IDS.shape[1]].softmax(-1).mean(0) for routing in routings])
    assert second.aux_loss.item() == pytest.approx(float((4 * load_LE * means_LE).sum(-1).mean()), rel=1e-5)
    assert second.aux_loss.item() != pytest.approx(load_balance_loss(*model.model.last_routings).item(), rel=1e-3)


def test_a_bias_goes_on_from_its_state():
    models = [tiny_model(), tiny_model()]
    first = RouterBalance(models[0], rate=0.1)
    for step in range(3):
        models[0](IDS)
        first.update(step / 10)
    second = RouterBalance(models[1], rate=0.1)
    second.load_state(json.loads(json.dumps(first.state())))
    for one, other in zip(models[0].model.moe_layers, models[1].model.moe_layers, strict=True):
        assert torch.equal(one.choice_bias_E, other.choice_bias_E)
    assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)
    assert torch.equal(models[0].model.step_load_LE, models[1].model.step_load_LE)
    first.close()
    assert models[0].model.step_load_LE is None
    assert models[0].model.moe_layers[0].choice_bias_E is None
    assert not torch.equal(models[0](IDS).logits, models[1](IDS).logits)
