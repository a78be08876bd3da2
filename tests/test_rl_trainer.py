"""RL's trainer on real ranks with real DeepSpeed engines, against the loss written out in one plain process."""

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

import closeness
import pytest
import ray.cloudpickle
import rollout_records
import torch
from closeness import ROUNDING, apart, assert_as_exact, assert_trained_as_exact, float64_inside
from msgspec import to_builtins
from msgspec.structs import replace
from rollout_records import reply_sample
from tiny_policy import save_tiny_policy
from warm_ranks import LentGroup

from posttrain.config.base import validate_config
from posttrain.config.resources import TrainerResources
from posttrain.config.training import ParallelConfig
from posttrain.errors import ConfigError, StageError
from posttrain.model.load import load_model
from posttrain.parallel.tensors import read_weights, whole_tensors
from posttrain.rl.config import RlConfig
from posttrain.rl.losses import LOSSES, LossInputs
from posttrain.rl.objective import batch_share
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.evidence import keep_evidence, read_batch, stop_reason
from posttrain.rl.training.forward import dealt
from posttrain.rl.training.policy import load_token_policy
from posttrain.rl.training.protocol import SkippedUpdate
from posttrain.rl.training.samples import TrainSample
from posttrain.rl.training.trainer import PolicyTrainer
from posttrain.sampling.manifests import Manifest, WeightManifest
from posttrain.sampling.weights import open_weights

for module in (sys.modules[__name__], closeness, rollout_records):  # the ranks do not find the tests' folder
    ray.cloudpickle.register_pickle_by_value(module)

STEPS, RATE, TEMPERATURE = 4, 1e-2, 0.8
# (expert, zero) on two ranks. test_expert_parallel.py trains in all of these without a stage's trainer.
LAYOUTS = [
    (1, 1),
    (2, 1),
    (2, 3),
    *(pytest.param(*layout, marks=pytest.mark.full) for layout in ((1, 0), (2, 0), (2, 2))),
]


def make_config(model: str, router: dict[str, float] | None = None, **changes: Any) -> RlConfig:
    data = {
        "model": {"path": model, "dtype": "float32", "router": router or {}},
        "prompts": {"path": "unused.jsonl"},
        "reward": {"name": "unused"},
        "steps": STEPS,
        "sampling": {"max_tokens": 16, "temperature": TEMPERATURE},
        # A norm that is exceeded: gradients of all experts have a part in every update.
        "optimizer": {"learning_rate": RATE, "weight_decay": 0.01, "max_grad_norm": 1e-2},
        "micro_batch_tokens": 64,
        "resources": {"trainer": {"cpus": 0.25}},
        **changes,
    }
    return validate_config(RlConfig, data, "test")


def batch(step: int) -> list[TrainSample]:
    """Rollouts of several lengths to three prompts; their micro-batches do not divide evenly between two ranks."""
    random, others = torch.Generator().manual_seed(step), torch.Generator().manual_seed(100 + step)
    prompts = [torch.randint(3, 200, (5 + 3 * group,), generator=random).tolist() for group in range(3)]
    samples = []
    for index in range(7):
        prompt = prompts[index // 3]
        ids = prompt + torch.randint(3, 200, (14 + 3 * index - len(prompt),), generator=random).tolist()
        advantage = float(torch.randn((), generator=random))
        cut = len(prompt)
        logprobs = (-6 + torch.randn(len(ids) - cut, generator=random)).tolist()
        staleness = tuple(torch.randint(0, 5, (len(logprobs),), generator=others).tolist())
        reference = tuple((-6 + torch.randn(len(logprobs), generator=others)).tolist())
        samples.append(
            reply_sample(tuple(ids[:cut]), tuple(ids[cut:]), tuple(logprobs), staleness, advantage, reference)
        )
    return samples


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LORA = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "o_proj"]}
LORA_LAYOUTS = [
    (1, 1),
    (2, 3),
    *(pytest.param(*layout, marks=pytest.mark.full) for layout in ((1, 0), (1, 2), (1, 3), (2, 0))),
]


def plain_training(
    model_path: str, config: RlConfig, dtype: torch.dtype = torch.float32
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and last weights, one sample at a time, from logits and torch's own optimizer.

    In float64 the model is transformers' own: the native one's grouped products have no float64.
    """
    if dtype == torch.float64:
        with float64_inside():
            return _plain_training(load_model(model_path, "transformers").double().train(), config)
    return _plain_training(load_model(model_path).train(), config)


def _plain_training(model: Any, config: RlConfig) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    losses, norms = [], []
    for step in range(STEPS):
        samples = batch(step)
        tokens = sum(sample.num_trained for sample in samples)
        total = 0.0
        for sample in samples:
            ids = torch.tensor([sample.token_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, sample.trained[0][0] - 1 : -1] / TEMPERATURE
            logprobs = logits.log_softmax(-1)
            policy = logprobs.gather(1, torch.tensor(sample.token_ids[sample.trained[0][0] :])[:, None])[:, 0]
            advantages = torch.full_like(policy, sample.advantage)
            ages, row = torch.tensor(sample.staleness), torch.zeros(len(policy), dtype=torch.int64)
            sampler, reference = torch.tensor(sample.sampler_logprobs), torch.tensor(sample.ref_logprobs)
            inputs = LossInputs(policy, sampler, advantages, ages, row, 16, reference)
            outputs = LOSSES[config.loss.name](inputs, config.loss)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            loss = batch_share(
                outputs, inputs, entropy, num_tokens=tokens, num_sequences=len(samples), config=config.loss
            )
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, config.optimizer.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {item.name: value.clone() for item, value in read_weights(whole_tensors(model))}


def plain_adapter_training(config: RlConfig) -> list[Any]:
    """As `plain_training` with the adapters that a rank makes: in fp32, and in float64."""
    torch.manual_seed(0)
    ours: Any = load_token_policy(config.model, TEMPERATURE, lora=config.lora).policy
    theirs = config.model.model_copy(update={"implementation": "transformers"})
    exact: Any = load_token_policy(theirs, TEMPERATURE, lora=config.lora).policy.double()
    with torch.no_grad():
        adapters = {name: value for name, value in ours.named_parameters() if value.requires_grad}
        for name, value in exact.named_parameters():
            if value.requires_grad:
                value.copy_(adapters.pop(name))
    assert not adapters
    with float64_inside():
        in_float64 = _plain_training(exact.train(), config)
    return [_plain_training(ours.train(), config), in_float64]


class Cases:
    """In each rank: trainers of several layouts, one after another."""

    def run(self, config: RlConfig, folder: str) -> dict[str, Any]:
        """Train, with a checkpoint in the middle; then a step that must change nothing; returns what there was."""
        trainer = PolicyTrainer(config, 0)
        results = []
        for step in range(STEPS):
            results.append(trainer.step(batch(step), step))
            if step == 1:
                trainer.save_checkpoint(f"{folder}/checkpoint", {"seen": 2})
        weights = self._weights(results[-1].manifest)
        trainer.save(f"{folder}/model")
        broken = batch(0)
        broken[3] = replace(broken[3], advantage=math.inf)
        skipped = trainer.step(broken, STEPS - 1)
        unchanged = self._weights(skipped.manifest)
        again = trainer.step(broken, STEPS - 1)
        good = trainer.step(batch(0), STEPS - 1)
        after = self._weights(good.manifest)
        third = trainer.step(broken, STEPS - 1)
        trainer.close()
        trainer._engine.destroy()
        return {
            "metrics": [result.metrics for result in results],
            "weights": weights,
            "skipped": skipped.metrics,
            "nonfinite": [result.nonfinite for result in (skipped, again, good, third)],
            "after": after,
            "unchanged": all(weights[name].equal(unchanged[name]) for name in weights),
            "report": trainer.report(),
        }

    def losses(self, configs: list[RlConfig]) -> list[dict[str, Any]]:
        """What a few steps of each config give."""
        found = []
        for config in configs:
            trainer = PolicyTrainer(config, 0)
            results = [trainer.step(batch(step), step) for step in range(STEPS)]
            weights = self._weights(results[-1].manifest)
            trainer.close()
            trainer._engine.destroy()
            found.append({"metrics": [result.metrics for result in results], "weights": weights})
        return found

    def resume(self, config: RlConfig, folder: str) -> dict[str, Any]:
        trainer = PolicyTrainer(config, 0)
        state = trainer.load_checkpoint(f"{folder}/checkpoint")
        for step in range(trainer.policy_version, STEPS):
            result = trainer.step(batch(step), step)
        weights = self._weights(result.manifest)
        after = self._weights(trainer.step(batch(0), STEPS - 1).manifest)
        trainer.close()
        trainer._engine.destroy()
        return {"state": state, "weights": weights, "after": after}

    @staticmethod
    def _weights(manifest: Manifest | None) -> dict[str, torch.Tensor]:
        return (
            {name: value.clone() for name, value in open_weights(manifest)}
            if isinstance(manifest, WeightManifest)
            else {}
        )


def layout(expert: int, zero: int) -> dict[str, int]:
    return {"processes": 2, "expert": expert, "zero": zero}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_policy(tmp_path_factory.mktemp("policy") / "model"))


@pytest.fixture(scope="module")
def plain(model):
    """The written-out training: in fp32, and in float64."""
    return [plain_training(model, make_config(model), dtype) for dtype in (torch.float32, torch.float64)]


@pytest.fixture(scope="module")
def plain_adapters():
    """The written-out training of adapters, once for each section `lora`."""
    found: dict[str, list[Any]] = {}

    def get(config: RlConfig) -> list[Any]:
        assert config.lora is not None
        key = config.lora.model_dump_json()
        if key not in found:
            found[key] = plain_adapter_training(config)
        return found[key]

    return get


@pytest.fixture(scope="module")
def two_ranks(ranks):
    group = LentGroup(ranks, ParallelConfig(processes=2), TrainerResources(), Cases)
    yield group
    group.close()


@pytest.fixture(scope="module")
def trained(two_ranks, model, tmp_path_factory):
    """What each layout gives, trained once."""
    found: dict[tuple[int, int], tuple[Path, dict[str, Any]]] = {}

    def get(expert: int, zero: int) -> tuple[Path, dict[str, Any]]:
        if (expert, zero) not in found:
            folder = tmp_path_factory.mktemp("run")
            config = make_config(model, parallel=layout(expert, zero))
            found[expert, zero] = folder, two_ranks.get("run", config, str(folder))
        return found[expert, zero]

    return get


def gap(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest value."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want)


def start_of(model: str) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in load_model(model).named_parameters()}


def assert_steps_as_exact(metrics: list[dict[str, Any]], peer: Any, exact: Any) -> None:
    """Loss and norm of each step, against what `plain_training` gives in fp32 and in float64."""
    largest = -min(min(sample.sampler_logprobs) for sample in batch(0))  # terms of both signs add up to the loss
    for place, (name, scale) in enumerate((("loss", largest), ("grad_norm", 0.0))):
        found = [line[name] for line in metrics]
        for count in (1, STEPS):  # the first step alone, where Adam has not yet had its say
            columns = (torch.tensor(x[:count], dtype=torch.float64) for x in (found, peer[place], exact[place]))
            assert_as_exact(*columns, scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "zero"), LAYOUTS)
def test_ranks_train_as_the_written_out_loss(trained, plain, model, expert, zero, record_property):
    folder, result = trained(expert, zero)
    peer, exact = plain
    metrics = result["metrics"]
    assert result["report"]["engine"] == "DeepSpeedEngine"
    assert_steps_as_exact(metrics, peer, exact)
    assert all(line["tokens_trained"] == sum(sample.num_trained for sample in batch(0)) for line in metrics)
    record_property("weights", gap(result["weights"], peer[2]))
    assert_trained_as_exact(result["weights"], peer[2], exact[2], start_of(model))
    exported = dict(load_model(folder / "model").named_parameters())
    assert gap({name: weight.detach() for name, weight in exported.items()}, result["weights"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "zero"), LORA_LAYOUTS)
def test_adapters_train_as_the_written_out_loss_and_go_on(two_ranks, model, plain_adapters, tmp_path, expert, zero):
    lora = {**LORA, "target_parameters": EXPERTS if expert == 1 else []}
    config = make_config(model, parallel=layout(expert, zero), lora=lora)
    result = two_ranks.get("run", config, str(tmp_path))
    peer, exact = plain_adapters(config)
    start = start_of(model)
    trained = {**start, **result["weights"]}  # what no step changes is not sent
    assert_steps_as_exact(result["metrics"], peer, exact)
    assert_trained_as_exact(trained, peer[2], exact[2], start)
    assert result["unchanged"]
    exported = dict(load_model(tmp_path / "model").named_parameters())
    assert gap({name: weight.detach() for name, weight in exported.items()}, trained) == 0
    changed = {name for name in start if not start[name].equal(trained[name])}
    assert changed == {n for n in start if n.endswith(("q_proj.weight", "o_proj.weight", *lora["target_parameters"]))}
    resumed = two_ranks.get("resume", config, str(tmp_path))
    for name in ("weights", "after"):
        assert result[name].keys() == resumed[name].keys()
        assert all(value.equal(result[name][key]) for key, value in resumed[name].items())


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "zero"), LAYOUTS)
def test_an_infinite_loss_changes_no_weight(trained, expert, zero):
    _, result = trained(expert, zero)
    assert result["skipped"]["skipped"] == 1
    assert result["unchanged"]
    # Metrics are written as JSON, which has no inf: what is not finite is not told as if it were a figure.
    assert all(math.isfinite(value) for value in result["skipped"].values())
    assert "loss" not in result["skipped"]
    first, second, good, third = result["nonfinite"]
    assert good is None
    assert [found.skipped_in_a_row for found in (first, second, third)] == [1, 2, 1]
    assert first.policy_version == STEPS
    assert 3 in first.samples
    assert len(first.samples) < 7  # of a micro-batch, wherever it was trained
    json.dumps(to_builtins(first), allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "exact"), [((2, 1), (2, 1), True), ((2, 3), (2, 3), True), ((2, 3), (1, 1), False)]
)
def test_goes_on_from_a_checkpoint_of_any_layout(trained, two_ranks, model, old, new, exact):
    folder, whole = trained(*old)
    resumed = two_ranks.get("resume", make_config(model, parallel=layout(*new)), str(folder))
    assert resumed["state"] == {"seen": 2}
    # The whole run left two updates out before the last one: they touched no state of the optimizer.
    for name in ("weights", "after"):
        difference = apart(resumed[name], whole[name], start_of(model))
        assert difference == 0 if exact else difference < ROUNDING


@pytest.mark.slow
def test_bf16_without_zero_trains_as_with_it_and_goes_on(two_ranks, model, tmp_path):
    """DeepSpeed's optimizer for it begins with a step of its own, and keeps moments by its fp32 masters."""
    second = {}
    for zero in (0, 1):
        folder = tmp_path / f"zero{zero}"
        folder.mkdir()
        bf16 = {"path": model, "dtype": "bfloat16"}
        data = make_config(model, parallel=layout(1, zero)).model_dump()
        config = validate_config(RlConfig, {**data, "model": bf16}, "test")
        result = two_ranks.get("run", config, str(folder))
        assert result["skipped"]["skipped"] == 1
        assert result["unchanged"]
        assert gap(two_ranks.get("resume", config, str(folder))["weights"], result["weights"]) == 0
        second[zero] = result["metrics"][1]["loss"]
    # A first step that is a quarter too small leaves it 2.7% off.
    assert second[0] == pytest.approx(second[1], rel=0.01)


@pytest.mark.slow
def test_every_kind_of_loss_on_two_ranks_is_the_written_out_one(two_ranks, model):
    """Losses by tokens and by sequences, one ratio a reply, ages, and both terms that go with any of them."""
    reference = {"weight": 0.2, "estimator": "k3", "ratio_cap": 3.0}
    losses = [
        {"name": "gspo", "entropy_bonus": 0.01, "sequence_clip_low": 0.5, "sequence_clip_high": 0.5},
        {"name": "dr_grpo", "reference": {**reference, "estimator": "k2"}},
        {"name": "decoupled", "reference": reference, "entropy_bonus": 0.01},
        {"name": "grpo", "dual_clip": 3.0},
        {"name": "cispo"},
        {"name": "tis"},
        {"name": "icepop"},
    ]
    assert {loss["name"] for loss in losses} | {make_config(model).loss.name} == LOSSES.keys()
    resources = {"trainer": {"cpus": 0.25}, "reference": {}}

    def make(loss: dict[str, Any]) -> RlConfig:
        asked = resources if "reference" in loss else {"trainer": {"cpus": 0.25}}
        return make_config(model, parallel=layout(1, 1), loss=loss, resources=asked)

    configs = [make(loss) for loss in losses]
    for config, result in zip(configs, two_ranks.get("losses", configs), strict=True):
        # Adam divides by the root of tiny squares, which makes much of rounding: how much, the plain training says.
        peer, exact = plain_training(model, config), plain_training(model, config, torch.float64)
        assert_steps_as_exact(result["metrics"], peer, exact)
        assert_trained_as_exact(result["weights"], peer[2], exact[2], start_of(model))
        assert all(("reference_kl" in line) == (config.loss.reference is not None) for line in result["metrics"])


@pytest.mark.slow
def test_figures_of_a_batch_are_those_of_all_its_tokens(trained, model):
    """Against one plain forward of each rollout with the starting weights; the tokens are spread over two ranks."""
    line = trained(1, 1)[1]["metrics"][0]
    policy: Any = load_model(model)
    gaps, advantages = [], []
    for sample in batch(0):
        ids = torch.tensor([sample.token_ids])
        logits = policy(input_ids=ids, use_cache=False).logits[0, sample.trained[0][0] - 1 : -1] / TEMPERATURE
        logprobs = (
            logits.log_softmax(-1)
            .gather(1, torch.tensor(sample.token_ids[sample.trained[0][0] :])[:, None])[:, 0]
            .detach()
        )
        gaps.append(logprobs - torch.tensor(sample.sampler_logprobs))
        advantages += [sample.advantage] * sample.num_trained
    gaps_T = torch.cat(gaps)
    assert line["ratio_max"] == pytest.approx(float(gaps_T.exp().max()), rel=1e-4)
    assert line["sampler_trainer_gap_max"] == pytest.approx(float(gaps_T.abs().max()), rel=1e-4)
    assert line["mismatch_kl"] == pytest.approx(float((gaps_T.exp() - 1 - gaps_T).mean()), rel=1e-4)
    assert line["advantage_std"] == pytest.approx(float(torch.tensor(advantages).std(correction=0)), rel=1e-5)


def test_when_training_stops_for_updates_that_were_left_out():
    def stops(**changes: Any) -> list[bool]:
        config = make_config("unused", **changes)
        found = SkippedUpdate(3, 3, 1e-2, "nan", "nan", [], skipped_in_a_row=1)
        return [stop_reason(config, replace(found, skipped_in_a_row=skipped)) is not None for skipped in range(1, 7)]

    assert stops() == [False, False, False, False, True, True]
    assert stops(max_skipped=2) == [False, True, True, True, True, True]
    assert stops(on_nonfinite="stop") == [True] * 6


@pytest.mark.slow
def test_the_trainer_computes_with_the_threads_that_it_is_given(ranks, model):
    trainer = TrainerClient(make_config(model), 0)
    try:
        threads = [trainer.step(batch(0), 0).metrics["train_threads"]]
        for number in (2, 1):
            trainer.set_threads(number)
            threads.append(trainer.step(batch(len(threads)), len(threads)).metrics["train_threads"])
    finally:
        trainer.close()
    assert threads == [1, 2, 1]


@pytest.mark.slow
def test_a_step_that_was_left_out_can_be_run_again_from_its_evidence(ranks, model, tmp_path):
    config = make_config(model, on_nonfinite="stop")
    broken = batch(0)
    broken[3] = replace(broken[3], advantage=math.inf)
    broken[5] = replace(broken[5], ref_logprobs=(), sampler_logprobs=(math.nan, *broken[5].sampler_logprobs[1:]))
    broken = [replace(sample, ref_logprobs=()) for sample in broken]
    trainer = TrainerClient(config, 0)
    try:
        trainer.step(batch(1), 0)
        result = trainer.step(broken, 1)
        with pytest.raises(StageError, match=r"step 1: the loss is (nan|inf|-inf).*on_nonfinite is stop.*step_1.json"):
            asyncio.run(keep_evidence(config, tmp_path, trainer, samples=broken, nonfinite=result.nonfinite))
        asyncio.run(keep_evidence(config, tmp_path, trainer, samples=broken, nonfinite=None))
    finally:
        trainer.close()
    evidence = tmp_path / "evidence"
    assert sorted(path.name for path in evidence.iterdir()) == ["step_1.json", "step_1.parquet", "step_1_model"]
    kept = read_batch(evidence / "step_1.json")
    assert [repr(sample) for sample in kept] == [repr(sample) for sample in broken]  # nan is not equal to itself
    found = json.loads((evidence / "step_1.json").read_text())
    assert {3, 5} <= set(found["samples"])
    again_config = make_config(str(evidence / "step_1_model"))
    trainer = TrainerClient(again_config, 0)
    try:
        again = trainer.step(kept, found["step"]).nonfinite
        good = trainer.step([kept[index] for index in range(7) if index not in found["samples"]], found["step"])
    finally:
        trainer.close()
    assert again is not None
    same = ("loss", "grad_norm", "samples", "learning_rate")
    assert {name: getattr(again, name) for name in same} == {name: found[name] for name in same}
    assert good.nonfinite is None


def test_every_rank_gets_as_many_forwards_and_every_sample_once(tmp_path):
    max_tokens = make_config("unused").micro_batch_tokens
    shares = [dealt(batch(0), max_tokens, shared=True, rank=rank, world=4) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
    seen = [sample for share in shares for chunk, weight in share if weight for sample in chunk]
    assert sorted(seen, key=len) == batch(0)
    assert any(weight == 0 for share in shares for _, weight in share)


def test_a_layout_that_the_model_cannot_have_is_refused_first(model, tmp_path):
    from posttrain.context import StageContext
    from posttrain.rl.stage import run

    config = make_config(model, parallel={"processes": 3, "expert": 3})
    with pytest.raises(ConfigError, match="does not divide the model's 4 experts"):
        run(config, StageContext("rl", tmp_path, tmp_path / "events.jsonl"))
