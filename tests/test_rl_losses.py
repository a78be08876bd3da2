"""Advantages and losses against numbers worked by hand from their formulas; gradients too."""

import json
import math
from itertools import starmap
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from rollout_records import drawn, one_turn, reply_sample

from posttrain.config.base import validate_config
from posttrain.errors import ConfigError
from posttrain.records import FinishReason, Prompt, RewardResult, Rollout, Row, Scored, Segment, VersionSpan
from posttrain.rl.advantages import ADVANTAGES, is_zero
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.groups import drop_reason, over_batch, overlong_penalty, scored_group
from posttrain.rl.history.recovery import scored_from_json, scores_json
from posttrain.rl.loss_config import CONSTANTS, LossConfig, ReferenceConfig
from posttrain.rl.losses import LOSSES, LossInputs
from posttrain.rl.objective import batch_share, reference_kl
from posttrain.rl.records import Drop, DropReason, Group
from posttrain.rl.training.batches import collate, micro_batches
from posttrain.rl.training.forward import dealt, loss_inputs
from posttrain.rl.training.samples import TrainSample, rollout_samples, train_samples


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


def evaluate(name, policy, sampler, advantages, staleness=None, replies=None, **constants):
    """Loss, its gradient by the policy's log-probabilities, and the outputs. Without `replies` each token is one."""
    policy_T = torch.tensor(policy, dtype=torch.float64).log().requires_grad_()
    inputs = LossInputs(
        policy_T,
        torch.tensor(sampler, dtype=torch.float64).log(),
        torch.tensor(advantages, dtype=torch.float64),
        torch.tensor(staleness or [0] * len(policy)),
        torch.tensor(replies or list(range(len(policy)))),
        max_tokens=10,
    )
    outputs = LOSSES[name](inputs, LossConfig(name=name, **constants))
    outputs.loss_sum.backward(retain_graph=True)
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
    samples = [
        reply_sample((1,) * (1 + i % 7), (2,) * (1 + i % 5), (0.0,) * (1 + i % 5), (0,) * (1 + i % 5), 1.0)
        for i in range(40)
    ]
    batches = micro_batches(samples, max_tokens=48, shared=False)
    assert sorted(map(len, (s for batch in batches for s in batch))) == sorted(map(len, samples))
    assert all(max(map(len, batch)) * len(batch) <= 48 for batch in batches)


def test_micro_batches_of_shared_prefixes_count_a_prompt_once_and_divide_large_groups():
    samples = [
        reply_sample((1 + group,) * 10, (9,) * (2 + i), (0.0,) * (2 + i), (0,) * (2 + i), float(i))
        for i in range(8)
        for group in range(3)
    ]
    batches = micro_batches(samples, max_tokens=40, shared=True)
    assert sorted(map(id, (s for batch in batches for s in batch))) == sorted(map(id, samples))
    sizes = [collate(batch, pad_id=0, shared=True).input_ids_BS.numel() for batch in batches]
    assert max(sizes) <= 40
    # 3 prompts of 10 and replies of 1 to 8 fed tokens; a prompt is read again for each further part of its group.
    prompts = [len({sample.token_ids[0] for sample in batch}) for batch in batches]
    assert sum(sizes) == 10 * sum(prompts) + 3 * sum(range(1, 9))
    assert sum(prompts) > 3
    assert len(micro_batches(samples, max_tokens=40, shared=False)) > 2 * len(batches)


def test_collate_of_shared_prefixes_points_at_the_same_states():
    """The prompt's last state predicts the first token of each reply; what a tool answered is in the branch."""
    turns = TrainSample((11, 12, 21, 31, 32, 22, 23), ((2, 3), (5, 7)), (-1.0, -2.0, -3.0), (1, 0, 0), 0.5)
    plain = reply_sample((11, 12), (24, 25), (-4.0, -5.0), (0, 2), -0.5)
    batch = collate([turns, plain], pad_id=0, shared=True)
    assert batch.input_ids_BS.tolist() == [[11, 12, 21, 31, 32, 22, 24]]
    assert batch.position_T.tolist() == [1, 4, 5, 1, 6]
    assert batch.tree is not None
    assert batch.tree.weights_T.tolist() == [2, 2, 1, 1, 1, 1, 1]
    padded = collate([turns, plain], pad_id=0, shared=False)
    for name in ("target_T", "sampler_logprobs_T", "advantages_T", "staleness_T", "sequence_T"):
        assert torch.equal(getattr(batch, name), getattr(padded, name))


def test_collate_points_at_the_states_that_predict_each_reply_token():
    samples = [
        reply_sample((11, 12, 13), (21, 22), (-1.0, -2.0), (2, 1), 0.5),
        reply_sample((14,), (23,), (-3.0,), (0,), -0.5),
    ]
    batch = collate(samples, pad_id=0, shared=False)
    assert batch.input_ids_BS.tolist() == [[11, 12, 13, 21], [14, 0, 0, 0]]
    flat = batch.input_ids_BS.flatten()
    # The state at 13 predicts 21, the one at 21 predicts 22, the one at 14 predicts 23.
    assert flat[batch.position_T].tolist() == [13, 21, 14]
    assert batch.target_T.tolist() == [21, 22, 23]
    assert batch.sampler_logprobs_T.tolist() == [-1.0, -2.0, -3.0]
    assert batch.advantages_T.tolist() == [0.5, 0.5, -0.5]
    assert batch.staleness_T.tolist() == [2, 1, 0]
    assert batch.sequence_T.tolist() == [0, 0, 1]
    assert batch.ref_logprobs_T is None
    judged = [replace(sample, ref_logprobs=sample.sampler_logprobs) for sample in samples]
    assert collate(judged, pad_id=0, shared=False).ref_logprobs_T.tolist() == [-1.0, -2.0, -3.0]
    with pytest.raises(ValueError, match="each trained token needs a log-probability of the reference"):
        collate([judged[0], samples[1]], pad_id=0, shared=False)


def test_only_the_tokens_that_the_policy_sampled_are_trained_on():
    """A prompt of two tokens, a call, a tool's result of two, an answer of two; beside it a plain reply."""
    turns = TrainSample((11, 12, 21, 31, 32, 22, 23), ((2, 3), (5, 7)), (-1.0, -2.0, -3.0), (1, 0, 0), 0.5)
    batch = collate([turns, reply_sample((14,), (24,), (-4.0,), (0,), -0.5)], pad_id=0, shared=False)
    flat = batch.input_ids_BS.flatten()
    # 12 predicts the call, the last token of the result the answer's first, and that one the second.
    assert flat[batch.position_T].tolist() == [12, 32, 22, 14]
    assert batch.target_T.tolist() == [21, 22, 23, 24]
    assert batch.sequence_T.tolist() == [0, 0, 0, 1]
    assert batch.advantages_T.tolist() == [0.5, 0.5, 0.5, -0.5]
    with pytest.raises(ValueError, match="3 tokens are trained on, but there are 2 log-probabilities"):
        collate([replace(turns, sampler_logprobs=(-1.0, -2.0))], pad_id=0, shared=False)


def test_grpo_dual_clip_by_hand():
    # c = 3. r = 5, A = -1: 3 instead of 5, no gradient. r = 2, A = -1: plain, 2. r = 5, A = 1: clipped at 1.28.
    # r = 0.5, A = -1: clipped at 0.8, where the dual clip changes nothing.
    policy, sampler, advantages = [0.5, 0.2, 0.5, 0.1], [0.1, 0.1, 0.1, 0.2], [-1.0, -1.0, 1.0, -1.0]
    loss, gradient, outputs = evaluate("grpo", policy, sampler, advantages, dual_clip=3.0)
    assert loss == pytest.approx(3 + 2 - 1.28 + 0.8)
    assert gradient == pytest.approx([0.0, 2.0, 0.0, 0.0])
    assert int(outputs.metrics["clipped_fraction"]) == 3


def test_dr_grpo_by_hand():
    # The four terms of GRPO's test, over max_tokens = 10; the rest of the division is by sequences.
    loss, gradient, outputs = evaluate("dr_grpo", [0.3, 0.1, 0.1, 0.3], [0.2] * 4, [1.0, -1.0, 1.0, -1.0])
    assert loss == pytest.approx((-1.28 + 0.8 - 0.5 + 1.5) / 10)
    assert gradient == pytest.approx([0.0, 0.0, -0.05, 0.15])
    assert outputs.denominator == "sequences"


def test_cispo_by_hand():
    # r = 8: capped at 5, and still a gradient. r = 1.5 and r = 0.25: as they are.
    policy, sampler, advantages = [0.8, 0.3, 0.1], [0.1, 0.2, 0.4], [1.0, -2.0, 1.0]
    loss, gradient, outputs = evaluate("cispo", policy, sampler, advantages)
    # -5 * 1 * log 0.8 + 1.5 * 2 * log 0.3 - 0.25 * 1 * log 0.1
    assert loss == pytest.approx(-5 * math.log(0.8) + 3 * math.log(0.3) - 0.25 * math.log(0.1))
    assert gradient == pytest.approx([-5.0, 3.0, -0.25])
    assert outputs.denominator == "tokens"
    assert int(outputs.metrics["clipped_fraction"]) == 1


def test_gspo_by_hand():
    # Reply 0: r = 4 and 1, s = sqrt(4 * 1) = 2, A = 1: clipped at 1.0004, no gradient.
    # Reply 1: r = 0.5, 0.5, 2, s = 0.5^(1/3), A = 1: unclipped, d s / d log pi = s / 3 each.
    # Reply 2: r = 2, s = 2, A = -0.5: unclipped, loss 1, gradient 1.
    # Reply 3: r = 0.5, s = 0.5, A = -1: clipped at 0.9997.
    policy, sampler = [0.4, 0.1, 0.1, 0.1, 0.4, 0.4, 0.1], [0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]
    advantages, replies = [1.0, 1.0, 1.0, 1.0, 1.0, -0.5, -1.0], [0, 0, 1, 1, 1, 2, 3]
    loss, gradient, outputs = evaluate("gspo", policy, sampler, advantages, replies=replies)
    s = 0.5 ** (1 / 3)
    assert loss == pytest.approx(-1.0004 - s + 1 + 0.9997)
    assert gradient == pytest.approx([0.0, 0.0, -s / 3, -s / 3, -s / 3, 1.0, 0.0])
    assert outputs.denominator == "sequences"
    assert int(outputs.metrics["clipped_fraction"]) == 3  # the tokens of replies 0 and 3


def test_tis_by_hand():
    # rho = 8: capped at 2. rho = 1.5 and 0.25: as they are. pi_theta / pi_old is 1; its gradient is that of log pi.
    policy, sampler, advantages = [0.8, 0.3, 0.1], [0.1, 0.2, 0.4], [1.0, -2.0, 1.0]
    loss, gradient, outputs = evaluate("tis", policy, sampler, advantages)
    assert loss == pytest.approx(-2 * 1 + 1.5 * 2 - 0.25)
    assert gradient == pytest.approx([-2.0, 3.0, -0.25])
    assert outputs.denominator == "tokens"
    assert int(outputs.metrics["clipped_fraction"]) == 1


def test_icepop_by_hand():
    # rho = 8 > 5 and rho = 0.25 < 0.5: masked. rho = 1.5 and 4: weights.
    policy, sampler, advantages = [0.8, 0.1, 0.3, 0.4], [0.1, 0.4, 0.2, 0.1], [1.0, 1.0, -2.0, 0.5]
    loss, gradient, outputs = evaluate("icepop", policy, sampler, advantages)
    assert loss == pytest.approx(1.5 * 2 - 4 * 0.5)
    assert gradient == pytest.approx([0.0, 0.0, 3.0, -2.0])
    assert outputs.denominator == "tokens"
    assert int(outputs.metrics["masked_fraction"]) == 2


def test_decoupled_by_hand():
    # d = 0 and d = 1: alpha = 0, w = 1: as in GRPO, r = 1.5 clipped at 1.28 for A = 1, plain for A = -1.
    # d = 2, r = 1.44: alpha = 1/2, w = sqrt(1.44) = 1.2, pi_theta / pi_prox = 1.2, unclipped: 1.2 * 1.2 * 1.
    # d = 3, r = 8: alpha = 2/3, w = 8^(2/3) = 4, pi_theta / pi_prox = 8^(1/3) = 2, clipped at 1.28: 4 * 1.28.
    # d = 3, r = 27, A = -1: w = 27^(2/3) = 9, capped at 5; ratio 3, plain: 5 * 3.
    policy, sampler = [0.3, 0.3, 0.36, 0.8, 0.81], [0.2, 0.2, 0.25, 0.1, 0.03]
    advantages, staleness = [1.0, -1.0, 1.0, 1.0, -1.0], [0, 1, 2, 3, 3]
    loss, gradient, outputs = evaluate("decoupled", policy, sampler, advantages, staleness=staleness)
    assert loss == pytest.approx(-1.28 + 1.5 - 1.44 - 5.12 + 15)
    assert gradient == pytest.approx([0.0, 1.5, -1.44, 0.0, 15.0])  # none through pi_prox
    assert outputs.denominator == "tokens"
    assert int(outputs.metrics["clipped_fraction"]) == 2


def test_decoupled_on_fresh_tokens_is_grpo():
    batch = [0.3, 0.1, 0.1, 0.3], [0.2] * 4, [1.0, -1.0, 1.0, -1.0]
    loss, gradient, _ = evaluate("grpo", *batch)
    fresh_loss, fresh_gradient, _ = evaluate("decoupled", *batch, staleness=[0, 1, 1, 0])
    assert fresh_loss == pytest.approx(loss)
    assert fresh_gradient == pytest.approx(gradient)


def test_entropy_bonus_by_hand():
    # Loss sum 0.52 over 4 tokens, less 0.1 * (0.5 + 0.7 + 0 + 0.8) / 4.
    _, _, outputs = evaluate("grpo", [0.3, 0.1, 0.1, 0.3], [0.2] * 4, [1.0, -1.0, 1.0, -1.0])
    entropy_T = torch.tensor([0.5, 0.7, 0.0, 0.8], requires_grad=True)
    unused: Any = None
    share = batch_share(
        outputs, unused, entropy_T, num_tokens=4, num_sequences=2, config=LossConfig(name="grpo", entropy_bonus=0.1)
    )
    assert float(share.detach()) == pytest.approx(0.52 / 4 - 0.1 * 2.0 / 4)
    (gradient,) = torch.autograd.grad(share, entropy_T)
    assert gradient.tolist() == pytest.approx([-0.025] * 4)


def reference_terms(policy, sampler, reference, **settings):
    """The terms, and their sum's gradient by the policy's log-probabilities."""
    policy_T, sampler_T, reference_T = (
        torch.tensor(x, dtype=torch.float64).log() for x in (policy, sampler, reference)
    )
    policy_T.requires_grad_()
    nothing_T = torch.zeros(len(policy), dtype=torch.int64)
    inputs = LossInputs(policy_T, sampler_T, nothing_T.double(), nothing_T, nothing_T, 10, reference_T)
    terms_T = reference_kl(inputs, ReferenceConfig(weight=1.0, **settings))
    terms_T.sum().backward()
    return terms_T.tolist(), policy_T.grad.tolist()


@pytest.mark.parametrize(
    ("estimator", "terms", "gradient"),
    [
        # Token 1: pi = 0.4, reference 0.1, l = log 4. Token 2: pi = 0.1, reference 0.2, l = -log 2.
        ("k1", [math.log(4), -math.log(2)], [1.0, 1.0]),
        ("k2", [math.log(4) ** 2 / 2, math.log(2) ** 2 / 2], [math.log(4), -math.log(2)]),
        ("k3", [0.25 - 1 + math.log(4), 2 - 1 - math.log(2)], [0.75, -1.0]),
    ],
)
def test_reference_kl_by_hand(estimator, terms, gradient):
    batch = [0.4, 0.1], [0.1, 0.2], [0.1, 0.2]  # r = 4, capped at 3, and 0.5
    for cap, weights in ((3.0, [3.0, 0.5]), (None, [1.0, 1.0])):
        found_terms, found_gradient = reference_terms(*batch, estimator=estimator, ratio_cap=cap)
        assert found_terms == pytest.approx([w * term for w, term in zip(weights, terms, strict=True)])
        assert found_gradient == pytest.approx([w * slope for w, slope in zip(weights, gradient, strict=True)])


def test_gradient_of_each_estimator_in_expectation():
    """Over all tokens, weighted as the sampler draws them: k2 has KL(policy, reference)'s, k3 the other's, k1 none."""
    sampler_V, reference_V = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=torch.float64)
    logits_V = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)

    def gradient(loss):
        return torch.autograd.grad(loss, logits_V)[0]

    def sampled(estimator, ratio_cap=100.0):
        nothing_V = torch.zeros(3, dtype=torch.int64)
        inputs = LossInputs(
            logits_V.log_softmax(0), sampler_V.log(), nothing_V.double(), nothing_V, nothing_V, 10, reference_V.log()
        )
        config = ReferenceConfig(weight=1.0, estimator=estimator, ratio_cap=ratio_cap)
        return gradient((sampler_V * reference_kl(inputs, config)).sum())

    policy_V = logits_V.log_softmax(0)
    reverse = gradient((policy_V.exp() * (policy_V - reference_V.log())).sum())
    forward = gradient((reference_V * (reference_V.log() - logits_V.log_softmax(0))).sum())
    assert torch.allclose(sampled("k1"), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(sampled("k2"), reverse, atol=1e-12)
    assert torch.allclose(sampled("k3"), forward, atol=1e-12)
    assert not torch.allclose(reverse, forward, atol=0.05)
    assert not torch.allclose(sampled("k2", None), reverse, atol=0.01)  # the sampler is not the policy


def test_reference_term_of_the_loss_by_hand():
    # Loss sum 0.52 over 4 tokens; k2 of l = log 2 on each, weighted by r = 1.5, 0.5, 0.5, 1.5: mean log(2)^2 / 2.
    config = LossConfig(name="grpo", reference=ReferenceConfig(weight=0.1))
    policy, sampler = [0.3, 0.1, 0.1, 0.3], [0.2] * 4
    _, _, outputs = evaluate("grpo", policy, sampler, [1.0, -1.0, 1.0, -1.0])
    zero_T = torch.zeros(4)
    policy_T = torch.tensor(policy).log()
    inputs = LossInputs(policy_T, torch.tensor(sampler).log(), zero_T, zero_T, zero_T, 10, policy_T - math.log(2))
    share = batch_share(outputs, inputs, zero_T, num_tokens=4, num_sequences=2, config=config)
    assert float(share.detach()) == pytest.approx(0.52 / 4 + 0.1 * math.log(2) ** 2 / 2)
    unreferenced = LossInputs(policy_T, policy_T, zero_T, zero_T, zero_T, 10)
    with pytest.raises(ValueError, match="no log-probabilities of the reference"):
        batch_share(outputs, unreferenced, zero_T, num_tokens=4, num_sequences=2, config=config)


def test_reference_and_its_resources_go_together():
    for changes in ({"loss": {"reference": {"weight": 0.1}}}, {"resources": {"reference": {}}}):
        with pytest.raises(ConfigError, match=r"loss.reference and resources.reference go together"):
            make_rl_config(**changes)


def random_samples(n=48):
    random = torch.Generator().manual_seed(1)

    def sample(index):
        length = 1 + index % 7
        ids = tuple(torch.randint(1, 100, (length,), generator=random).tolist())
        logprobs = tuple((-2 * torch.rand(length, generator=random)).tolist())
        ages = tuple(torch.randint(0, 5, (length,), generator=random).tolist())
        advantage = float(torch.randn((), generator=random))
        reference = tuple((-2 * torch.rand(length, generator=random)).tolist())
        return reply_sample((1,) * (1 + index % 3), ids, logprobs, ages, advantage, reference)

    return [sample(index) for index in range(n)]


def batch_loss(chunks, config, *, shared=False):
    """Loss of a batch in these micro-batches, what was clipped or masked, and the gradient.

    The policy's log-probability of token i is a parameter: one place for the gradients of any split.
    """
    samples = [sample for chunk in chunks for sample in chunk]
    tokens = sum(sample.num_trained for sample in samples)
    weights_V = torch.linspace(-1.0, 1.0, 100, dtype=torch.float64).requires_grad_()
    total, counted = 0.0, 0
    for chunk in chunks:
        batch = collate(chunk, pad_id=0, shared=shared)
        policy_T = batch.sampler_logprobs_T.double() + weights_V[batch.target_T]
        inputs = loss_inputs(policy_T, batch, 8)
        outputs = LOSSES[config.name](inputs, config)
        share = batch_share(outputs, inputs, -policy_T, num_tokens=tokens, num_sequences=len(samples), config=config)
        share.backward()
        total += float(share.detach())
        counted += sum(int(value) for value in outputs.metrics.values())
    return total, counted, weights_V.grad


def assert_split_changes_nothing(samples, config, ranks):
    loss, counted, gradient = batch_loss([samples], config)
    assert float(gradient.abs().max()) > 0
    for shared, tokens in ((False, 64), (True, 32)):
        dealings = (dealt(samples, tokens, shared=shared, rank=rank, world=ranks) for rank in range(ranks))
        shares = [chunk for dealing in dealings for chunk, weight in dealing if weight]
        assert len(shares) > 3
        other_loss, other_counted, other_gradient = batch_loss(shares, config, shared=shared)
        assert other_loss == pytest.approx(loss, rel=1e-9)
        assert other_counted == counted
        assert torch.allclose(gradient, other_gradient, rtol=1e-9, atol=1e-12)
    return loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_loss_and_gradient_do_not_depend_on_the_split(name, ranks):
    samples = random_samples()
    assert_split_changes_nothing(samples, LossConfig(name=name), ranks)
    terms = {"entropy_bonus": 0.01, "reference": ReferenceConfig(weight=0.1)}
    with_terms = [
        assert_split_changes_nothing(samples, LossConfig(name=name, **{key: value}), ranks)
        for key, value in terms.items()
    ]
    plain = batch_loss([samples], LossConfig(name=name))[0]
    both = assert_split_changes_nothing(samples, LossConfig(name=name, **terms), ranks)
    assert both - plain == pytest.approx(sum(with_terms) - 2 * plain)
    assert both != pytest.approx(plain)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_replies_are_in_no_sum_and_no_denominator_however_it_is_split(name):
    config = make_rl_config(loss={"truncated": "mask"})
    lengths = [(2, 16, 5, 9), (16, 7, 3, 16), (12, 4, 16, 16)] * 3
    groups = [scored_rewards(config, [1.0, 0.25, 0.5, 0.0], row) for row in lengths]
    everything = train_samples([scored_rewards(make_rl_config(), [1.0, 0.25, 0.5, 0.0], row) for row in lengths], 1)
    samples = train_samples(groups, 1)
    assert samples == [sample for sample in everything if len(sample.token_ids) < 16]
    loss = assert_split_changes_nothing(samples, LossConfig(name=name), 2)
    assert loss != pytest.approx(batch_loss([everything], LossConfig(name=name))[0])


@pytest.mark.parametrize("key", sorted({key for keys in CONSTANTS.values() for key in keys}))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_its_constants_and_refuses_the_others(name, key):
    """The table of constants says what the code does: a constant changes the losses that list it, and no other."""
    value = {"icepop_high": 1.5, "divergence": 0.01}.get(key, 1.05 if key.endswith(("cap", "dual_clip")) else 0.9)
    batch = collate(random_samples(), pad_id=0, shared=False)
    inputs = loss_inputs(batch.sampler_logprobs_T + torch.linspace(-1.5, 1.5, 100)[batch.target_T], batch, 8)
    changed = LossConfig.model_construct(**{**LossConfig(name=name).model_dump(), key: value})  # not validated
    differs = not LOSSES[name](inputs, LossConfig(name=name)).loss_sum.equal(LOSSES[name](inputs, changed).loss_sum)
    assert differs == (key in CONSTANTS[name])
    if differs:
        assert getattr(LossConfig(**{"name": name, key: value}), key) == value
    else:
        users = ", ".join(loss for loss, keys in CONSTANTS.items() if key in keys)
        with pytest.raises(ConfigError, match=rf"{key} \({value}\) is not used by loss {name}; used by: {users}"):
            validate_config(LossConfig, {"name": name, key: value}, "test")


def make_rl_config(**changes):
    data = {"model": {"path": "m"}, "prompts": {"path": "p"}, "reward": {"name": "r"}, "sampling": {"max_tokens": 16}}
    return validate_config(RlConfig, {**data, **changes}, "test")


def scored_rewards(config, rewards, lengths=(2, 2, 2, 2), versions=0):
    """A group with these rewards; a reply of 16 tokens is cut off."""

    def rollout(index, length):
        reason = "length" if length == 16 else "stop"
        spans = (VersionSpan(versions, 0, 1), VersionSpan(versions + 1, 1, length))
        ids = tuple(25 * index + place for place in range(length))
        return one_turn("p", "g", index, (1,), ids, "", (-1.0,) * length, spans, reason)

    group = Group(0, drawn(Row("p", "math", ()), (), (1,)), tuple(starmap(rollout, enumerate(lengths))))
    scores = [Scored(None, "timeout", "slow") if value is None else Scored(RewardResult(value)) for value in rewards]
    return scored_group(group, scores, config)


def test_batch_norm_by_hand():
    # Centred: [0.5, -0.5, 0.5, -0.5] and [0.15, -0.05, -0.05, -0.05]. Squares: 4 * 0.25 + 0.0225 + 3 * 0.0025 = 1.03;
    # the mean is 0, so the deviation is sqrt(1.03 / 8) = 0.358818.
    config = make_rl_config(advantage="batch_norm")
    groups = [scored_rewards(config, rewards) for rewards in ([1.0, 0.0, 1.0, 0.0], [0.2, 0.0, 0.0, 0.0])]
    deviation = math.sqrt(1.03 / 8)
    centred = [0.5, -0.5, 0.5, -0.5, 0.15, -0.05, -0.05, -0.05]
    batch = over_batch(groups, config.advantage)
    assert [sample.advantage for sample in train_samples(batch, 1)] == pytest.approx(
        [value / deviation for value in centred], rel=1e-5
    )
    # Dropping is judged by the group: equal rewards are no advantage, whatever the batch.
    assert str(drop_reason(scored_rewards(config, [0.2] * 4), config)) == "zero_advantage"
    assert [drop_reason(group, config) for group in groups] == [None, None]
    assert over_batch(groups, "group_mean") == groups


def played_group(config, *paid_and_returned):
    """A group of episodes: what was paid for each turn, and what the environment returned, None if it was unscored."""
    rollouts, scores = [], []
    for index, (paid, returned) in enumerate(paid_and_returned):
        turns = [Segment((9, 2), True, (-1.0, -1.0), (VersionSpan(0, 0, 2),)) for _ in paid]
        segments = [part for turn in turns for part in (turn, Segment((30,), False))][:-1]
        parts = {f"turn {turn}": value for turn, value in enumerate(paid, 1) if value}
        result = None if returned is None else RewardResult(sum(paid) + returned, parts)
        scores.append(Scored(result, "scored" if result else "error"))
        fields = (Prompt((), (1,)), tuple(segments), "", FinishReason.STOP)
        rollouts.append(Rollout("p", "g", index, *fields, scored=scores[-1]))
    return scored_group(Group(0, drawn(Row("p", "math", ()), (), (1,)), tuple(rollouts)), scores, config)


def test_advantages_of_turns_by_hand():
    # Rewards 1.5, 0.25 and 0.5, mean 0.75. Without what was paid for the first turns: 1, 0.25 and 0, mean 5/12.
    config = make_rl_config(advantage_per="turn")
    scored = played_group(config, ((0.5, 0.0), 1.0), ((0.0, 0.25), 0.0), ((0.5,), 0.0), ((0.0, 0.0), None))
    assert scored.advantages == pytest.approx((0.75, -0.5, -0.25, None))
    assert scored.turn_advantages[0] == pytest.approx((0.75, 7 / 12))
    assert scored.turn_advantages[1] == pytest.approx((-0.5, -1 / 6))
    assert scored.turn_advantages[2:] == ((-0.25,), ())
    first, second, third = train_samples([scored], 0)
    assert [[count for count, _ in sample.spans] for sample in (first, second, third)] == [[2, 2], [2, 2], [2]]
    batch = collate([first, third], 0, shared=False)
    assert batch.advantages_T.tolist() == pytest.approx([0.75, 0.75, 7 / 12, 7 / 12, -0.25, -0.25])
    # Each of 1.5, 0.25, 0.5 minus the mean of the others, and each of 1, 0.25, 0.
    rloo = played_group(make_rl_config(advantage_per="turn", advantage="rloo"), *(
        ((0.5, 0.0), 1.0), ((0.0, 0.25), 0.0), ((0.5,), 0.0)
    ))  # fmt: skip
    assert rloo.turn_advantages == (
        pytest.approx((1.125, 0.875)), pytest.approx((-0.75, -0.25)), pytest.approx((-0.375,))
    )  # fmt: skip


def test_turns_differ_in_advantage_only_by_what_was_paid_for_turns():
    """Without such rewards every turn has the advantage of its episode, as it has by default."""
    only_returned = [((0.0, 0.0, 0.0), 1.0), ((0.0,), 0.0)]
    for config in (make_rl_config(advantage_per="turn"), make_rl_config()):
        scored = played_group(config, *only_returned)
        assert [sample.spans for sample in train_samples([scored], 0)] == [[(2, 0.5)] * 3, [(2, -0.5)]]
    paid = [((1.0, 0.0), 0.0), ((0.0, 1.0), 0.0)]  # equal sums, at other turns
    assert str(drop_reason(played_group(make_rl_config(), *paid), make_rl_config())) == "zero_advantage"
    by_turn = make_rl_config(advantage_per="turn")
    scored = played_group(by_turn, *paid)
    assert drop_reason(scored, by_turn) is None
    assert scored.turn_advantages == ((0.0, -0.5), (0.0, 0.5))
    assert scored_from_json(scored.group, json.loads(json.dumps(scores_json(scored)))) == scored


def test_a_turn_keeps_its_advantage_in_a_branch_and_at_another_temperature():
    """By hand: the second turn is not trained on, and the third is in a branch of its own."""
    said = Segment((9, 2), True, (-1.0, -1.0), (VersionSpan(0, 0, 2),))
    segments = (said, Segment((30,), False), replace(said, trained=False), Segment((31,), False, keeps=1), said)
    rollout = Rollout("p", "g", 0, Prompt((), (1,)), segments, "", FinishReason.STOP)
    one, other = rollout_samples(rollout, 0, 0.5, turn_advantages=(0.1, 0.2, 0.3))
    assert (one.spans, other.spans) == ([(2, 0.1)], [(2, 0.3)])


@pytest.mark.parametrize(("changes", "key"), [
    ({"advantage": "batch_norm"}, "advantage: batch_norm"), ({"loss": {"name": "gspo"}}, "loss.name: gspo")
])  # fmt: skip
def test_what_has_one_advantage_for_a_rollout_has_none_for_turns(changes, key):
    with pytest.raises(ConfigError, match=f"advantage_per: turn does not go with {key}"):
        make_rl_config(advantage_per="turn", **changes)


def test_overlong_penalty_by_hand():
    # L = 16, b = 4: nothing up to 12 tokens, then a quarter of the weight for each token, all of it at 16.
    config = make_rl_config(overlong={"buffer_tokens": 4, "weight": 0.5})
    found = [overlong_penalty(length, config.overlong, 16) for length in (2, 12, 13, 14, 16, 17)]
    assert found == pytest.approx([0.0, 0.0, -0.125, -0.25, -0.5, -0.5])
    # Equal rewards with unequal penalties teach: rewards 1, 1, 0.75, 0.5; mean 0.8125.
    scored = scored_rewards(config, [1.0] * 4, lengths=(2, 12, 14, 16))
    assert scored.rewards == (1.0, 1.0, 1.0, 1.0)
    assert scored.advantages == pytest.approx((0.1875, 0.1875, -0.0625, -0.3125))
    assert scored.reasons == ("", "", "overlong -0.25", "overlong -0.5")
    assert drop_reason(scored, config) is None
    assert drop_reason(scored, make_rl_config()) is None
    assert str(drop_reason(scored_rewards(make_rl_config(), [1.0] * 4, (2, 12, 14, 16)), config)) == "zero_advantage"
    unscored = scored_rewards(config, [1.0, None, 1.0, 0.0], lengths=(2, 14, 2, 2))
    assert unscored.reasons[1] == "timeout: slow; overlong -0.25"
    assert unscored.advantages[1] is None


def test_overlong_buffer_fits_the_reply():
    with pytest.raises(ConfigError, match=r"overlong.buffer_tokens \(17\) must not exceed sampling.max_tokens \(16\)"):
        make_rl_config(overlong={"buffer_tokens": 17})


def test_masked_truncation_leaves_the_reply_out_but_not_its_reward():
    config = make_rl_config(loss={"truncated": "mask"})
    scored = scored_rewards(config, [1.0, 0.0, 0.0, 0.0], lengths=(2, 3, 16, 4))
    assert scored.advantages == (0.75, -0.25, None, -0.25)  # the mean is that of all four
    assert [sample.num_trained for sample in train_samples([scored], 1)] == [2, 3, 4]  # all that is counted
    assert drop_reason(scored, config) is None
    assert str(drop_reason(scored_rewards(config, [1.0, 0.0, 0.0, 0.0], (16, 16, 16, 16)), config)) == "truncated"
    # 0.5 is the mean, and what differs from it is masked.
    assert str(drop_reason(scored_rewards(config, [0.5, 0.5, 1.0, 0.0], (2, 2, 16, 16)), config)) == "zero_advantage"
    assert drop_reason(scored_rewards(config, [1.0, None, None, None]), config) == Drop(DropReason.UNSCORED, "timeout")
    trained = scored_rewards(make_rl_config(), [1.0, 0.0, 0.0, 0.0], lengths=(2, 3, 16, 4))
    assert len(train_samples([trained], 1)) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rollout_with_a_sampler_logprob_that_is_not_finite_is_unscored(bad):
    config = make_rl_config()
    group = scored_rewards(config, [1.0, 0.0, 0.0, 0.0]).group
    first = group.rollouts[0]
    broken = replace(first, segments=(replace(first.segments[0], sampler_logprobs=(-1.0, bad)),))
    group = replace(group, rollouts=(broken, *group.rollouts[1:]))
    scored = scored_group(group, [Scored(RewardResult(value)) for value in (1.0, 1.0, 0.0, 0.5)], config)
    assert scored.rewards == (None, 1.0, 0.0, 0.5)
    assert scored.advantages == pytest.approx((None, 0.5, -0.5, 0.0))
    assert scored.reasons[0] == "infrastructure: 1 of the sampler's log-probabilities are not finite"
    assert len(train_samples([scored], 1)) == 3


def test_staleness_of_each_token_is_from_its_span():
    scored = scored_rewards(make_rl_config(), [1.0, 0.0, 0.0, 0.0], lengths=(3, 2, 2, 2), versions=4)
    assert [sample.staleness for sample in train_samples([scored], 6)] == [(2, 1, 1), (2, 1), (2, 1), (2, 1)]
