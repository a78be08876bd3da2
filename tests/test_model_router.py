"""Routers: the load-balance loss by hand, figures for metrics, replayed choices, and that no token is dropped."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Llama4TextConfig

from posttrain.model import NativeLlama4ForCausalLM
from posttrain.model.moe import MoE, Routing
from posttrain.model.router_stats import load_balance_loss, router_stats


def tiny_config(**changes) -> Llama4TextConfig:
    settings = {
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
    got, want = moe(x), _one_token_at_a_time(moe, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    weights = [x, moe.router.weight, moe.experts.gate_up_proj, moe.experts.down_proj]
    mix = torch.randn_like(got)
    for have, expect in zip(
        torch.autograd.grad((got * mix).sum(), weights), torch.autograd.grad((want * mix).sum(), weights), strict=True
    ):
        torch.testing.assert_close(have, expect, rtol=1e-4, atol=1e-5)


def test_every_token_to_one_expert_is_not_dropped():
    moe = tiny_model(num_experts_per_tok=1).model.layers[0].feed_forward
    with torch.no_grad():
        moe.router.weight.zero_()[2] = 1.0
    x = torch.rand(64, 16) + 0.1
    torch.testing.assert_close(moe(x), _one_token_at_a_time(moe, x), rtol=1e-5, atol=1e-6)


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
