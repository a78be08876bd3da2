"""Losses of RL stay finite, in value and gradient, however far policy, sampler and reference are apart."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rl.loss_config import CONSTANTS, LossConfig, ReferenceConfig
from posttrain.rl.losses import LOSSES, MAX_LOG_RATIO, LossInputs, ratio_of
from posttrain.rl.objective import KL_ESTIMATORS, batch_share, reference_kl

# Log ratios of policy to sampler and of policy to reference. Both borders of fp32's exp, 88.7 and -103.9, lie within.
LOG_RATIOS = st.one_of(
    st.floats(-200, 200, width=32), st.sampled_from([-200.0, -104.0, -88.8, -88.0, 0.0, 30.0, 88.0, 88.8, 200.0])
)
TOKENS = st.lists(
    st.tuples(LOG_RATIOS, LOG_RATIOS, st.floats(-10, 10, width=32), st.integers(0, 5)), min_size=1, max_size=12
)


def inputs_of(tokens, reply_tokens, max_tokens=8):
    """Inputs in fp32 with these log ratios, the policy's log-probabilities a leaf; all log-probabilities are <= 0."""
    to_sampler_T, to_reference_T, advantages_T = (
        torch.tensor(column, dtype=torch.float32) for column in list(zip(*tokens, strict=True))[:3]
    )
    policy_T = torch.minimum(torch.minimum(to_sampler_T, to_reference_T), torch.zeros(())).requires_grad_()
    with torch.no_grad():
        sampler_T, reference_T = policy_T - to_sampler_T, policy_T - to_reference_T
    staleness_T = torch.tensor([token[3] for token in tokens])
    sequence_T = torch.arange(len(tokens)) // reply_tokens
    return LossInputs(policy_T, sampler_T, advantages_T, staleness_T, sequence_T, max_tokens, reference_T)


def loss_and_gradient(inputs, config):
    outputs = LOSSES[config.name](inputs, config)
    num_tokens, num_sequences = len(inputs.sequence_T), len(inputs.sequence_T.unique())
    loss = batch_share(
        outputs, inputs, -inputs.policy_logprobs_T, num_tokens=num_tokens, num_sequences=num_sequences, config=config
    )
    (gradient_T,) = torch.autograd.grad(loss, inputs.policy_logprobs_T)
    return loss.detach(), gradient_T


REFERENCES = st.one_of(
    st.none(),
    st.builds(
        ReferenceConfig,
        weight=st.just(0.1),
        estimator=st.sampled_from(sorted(KL_ESTIMATORS)),
        ratio_cap=st.sampled_from([None, 20.0]),
    ),
)


@pytest.mark.parametrize("name", LOSSES)
@given(tokens=TOKENS, reply_tokens=st.integers(1, 4), reference=REFERENCES, dual_clip=st.sampled_from([None, 3.0]))
def test_loss_and_gradient_are_finite_for_any_log_ratio(name, tokens, reply_tokens, reference, dual_clip):
    has_dual_clip = "dual_clip" in CONSTANTS[name]
    config = LossConfig(name=name, reference=reference, dual_clip=dual_clip if has_dual_clip else None)
    loss, gradient_T = loss_and_gradient(inputs_of(tokens, reply_tokens), config)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient_T).all()
    assert torch.isfinite(gradient_T.square().sum())  # so is the norm that the gradient is clipped by


@given(log_ratios=st.lists(st.floats(-200, MAX_LOG_RATIO, width=32), min_size=1, max_size=40))
def test_the_ratio_of_a_real_token_is_exp_bit_for_bit(log_ratios):
    log_ratio_T = torch.tensor(log_ratios, requires_grad=True)
    ratio_T, exp_T = ratio_of(log_ratio_T), log_ratio_T.exp()
    weights_T = torch.linspace(-2, 3, len(log_ratios))
    assert torch.equal(ratio_T, exp_T)
    assert torch.equal(*(torch.autograd.grad((weights_T * x).sum(), log_ratio_T)[0] for x in (ratio_T, exp_T)))


def test_the_ratio_goes_on_as_the_tangent_of_exp():
    log_ratio_T = torch.tensor([MAX_LOG_RATIO, MAX_LOG_RATIO + 2, 200.0], dtype=torch.float64, requires_grad=True)
    ratio_T = ratio_of(log_ratio_T)
    largest = math.exp(MAX_LOG_RATIO)
    assert ratio_T.tolist() == pytest.approx([largest, 3 * largest, (201 - MAX_LOG_RATIO) * largest])
    (slope_T,) = torch.autograd.grad(ratio_T.sum(), log_ratio_T)
    assert slope_T.tolist() == pytest.approx([largest] * 3)
    assert ratio_of(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, 0.0]
    assert ratio_of(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("ratio_cap", [None, 20.0])
def test_k3_pulls_a_policy_that_is_far_below_its_reference_up(ratio_cap):
    inputs = inputs_of([(0.0, -200.0, 0.0, 0)], 1)
    config = ReferenceConfig(weight=1.0, estimator="k3", ratio_cap=ratio_cap)
    (gradient_T,) = torch.autograd.grad(reference_kl(inputs, config).sum(), inputs.policy_logprobs_T)
    assert float(gradient_T) == pytest.approx(1 - math.exp(MAX_LOG_RATIO))


def test_a_token_far_above_the_sampler_with_a_bad_advantage_is_pushed_down():
    for name in ("grpo", "dr_grpo", "decoupled"):  # those whose gradient grows with the ratio
        _, gradient_T = loss_and_gradient(inputs_of([(150.0, 0.0, -1.0, 1)], 1), LossConfig(name=name))
        assert float(gradient_T) > 1e10
