"""Advantages and losses against numbers worked by hand from their formulas; gradients too."""

import math

import pytest
import torch

from posttrain.rl.advantages import ADVANTAGES, is_zero
from posttrain.rl.config import LossConfig
from posttrain.rl.losses import LOSSES, LossInputs
from posttrain.rl.samples import TrainSample, collate, micro_batches


@pytest.mark.parametrize(
    ("name", "rewards", "expected"),
    [
        ("group_mean", [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        ("group_mean", [1, 0, 0], [2 / 3, -1 / 3, -1 / 3]),
        ("grpo", [1, 0, 0, 1], [1.0, -1.0, -1.0, 1.0]),
        # mean 0.25, deviation sqrt(0.75 * 0.25) = 0.4330127
        ("grpo", [1, 0, 0, 0], [1.7320508, -0.5773503, -0.5773503, -0.5773503]),
        # 1 - mean(0, 0) = 1; 0 - mean(1, 0) = -0.5
        ("rloo", [1, 0, 0], [1.0, -0.5, -0.5]),
    ],
)
def test_advantages_by_hand(name, rewards, expected):
    assert ADVANTAGES[name](rewards) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_have_zero_advantage(name):
    assert is_zero(ADVANTAGES[name]([0.3, 0.3, 0.3]))
    assert not is_zero(ADVANTAGES[name]([0.3, 0.3, 0.2]))


def evaluate(name, policy, sampler, advantages, **constants):
    policy_T = torch.tensor(policy, dtype=torch.float64).log().requires_grad_()
    inputs = LossInputs(
        policy_T, torch.tensor(sampler, dtype=torch.float64).log(), torch.tensor(advantages, dtype=torch.float64)
    )
    outputs = LOSSES[name](inputs, LossConfig(name=name, **constants))
    outputs.loss_sum.backward()
    return float(outputs.loss_sum.detach()), policy_T.grad.tolist(), outputs


def test_dppo_by_hand():
    # Token 1: A > 0, p moved 0.2 -> 0.5 = +0.3 > 0.2: masked. Token 2: A > 0, moved +0.1: kept, r = 1.5.
    # Token 3: A <= 0, moved -0.3 < -0.2: masked. Token 4: A < 0, moved up: kept, r = 0.4 / 0.1 = 4.
    policy, sampler, advantages = [0.5, 0.3, 0.2, 0.4], [0.2, 0.2, 0.5, 0.1], [1.0, 1.0, -1.0, -0.5]
    logs = [math.log(p / s) for p, s in zip(policy, sampler, strict=True)]
    weights = [0.0, 1.5 * 1.0, 0.0, 4.0 * -0.5]
    expected = sum(-w * math.log(p) + 1e-3 * ratio**2 for w, p, ratio in zip(weights, policy, logs, strict=True))
    loss, gradient, outputs = evaluate("dppo", policy, sampler, advantages)
    assert loss == pytest.approx(expected, rel=1e-9)
    assert gradient == pytest.approx([-w + 2e-3 * ratio for w, ratio in zip(weights, logs, strict=True)], rel=1e-9)
    assert outputs.denominator == "tokens"
    assert int(outputs.metrics["masked_fraction"]) == 2


def test_dppo_caps_the_ratio():
    loss, gradient, _ = evaluate("dppo", [0.1], [0.001], [1.0], kl_weight=0.0)  # r = 100, moved 0.099
    assert loss == pytest.approx(-20 * math.log(0.1))
    assert gradient == pytest.approx([-20.0])


def test_grpo_by_hand():
    # r = 1.5, A = 1: clipped at 1.28, no gradient. r = 0.5, A = -1: clipped at 0.8, no gradient.
    # r = 0.5, A = 1: unclipped, loss -0.5, gradient -0.5. r = 1.5, A = -1: unclipped, loss 1.5, gradient 1.5.
    loss, gradient, outputs = evaluate("grpo", [0.3, 0.1, 0.1, 0.3], [0.2, 0.2, 0.2, 0.2], [1.0, -1.0, 1.0, -1.0])
    assert loss == pytest.approx(-1.28 + 0.8 - 0.5 + 1.5)
    assert gradient == pytest.approx([0.0, 0.0, -0.5, 1.5])
    assert int(outputs.metrics["clipped_fraction"]) == 2


def test_micro_batches_hold_every_sample_once_within_the_budget():
    samples = [TrainSample((1,) * (1 + i % 7), (2,) * (1 + i % 5), (0.0,) * (1 + i % 5), 1.0) for i in range(40)]
    batches = micro_batches(samples, max_tokens=48)
    assert sorted(map(len, (s for batch in batches for s in batch))) == sorted(map(len, samples))
    assert all(max(map(len, batch)) * len(batch) <= 48 for batch in batches)


def test_collate_points_at_the_states_that_predict_each_reply_token():
    samples = [TrainSample((11, 12, 13), (21, 22), (-1.0, -2.0), 0.5), TrainSample((14,), (23,), (-3.0,), -0.5)]
    batch = collate(samples, pad_id=0)
    assert batch.input_ids_BS.tolist() == [[11, 12, 13, 21], [14, 0, 0, 0]]
    flat = batch.input_ids_BS.flatten()
    # The state at 13 predicts 21, the one at 21 predicts 22, the one at 14 predicts 23.
    assert flat[batch.position_T].tolist() == [13, 21, 14]
    assert batch.target_T.tolist() == [21, 22, 23]
    assert batch.sampler_logprobs_T.tolist() == [-1.0, -2.0, -3.0]
    assert batch.advantages_T.tolist() == [0.5, 0.5, -0.5]
