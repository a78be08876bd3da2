"""RL's trainer on real ranks with real DeepSpeed engines, against the loss written out in one plain process."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
from tiny_policy import save_tiny_policy

from posttrain.config.base import validate_config
from posttrain.config.shared import ParallelConfig, TrainerResources
from posttrain.errors import ConfigError
from posttrain.model.load import load_model
from posttrain.parallel.ranks import RankGroup
from posttrain.rl.config import RlConfig
from posttrain.rl.losses import LOSSES, LossInputs
from posttrain.rl.samples import TrainSample
from posttrain.rl.trainer import PolicyTrainer, dealt
from posttrain.sampling.weights import open_weights

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks do not find the tests' folder

STEPS, RATE, TEMPERATURE = 4, 1e-2, 0.8
LAYOUTS = [(1, zero) for zero in (0, 1)] + [(2, zero) for zero in (0, 1, 2, 3)]  # (expert, zero) on two ranks


def make_config(model: str, **changes: Any) -> RlConfig:
    data = {
        "model": {"path": model, "dtype": "float32"},
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
    """Rollouts of several lengths; their micro-batches do not divide evenly between two ranks."""
    random = torch.Generator().manual_seed(step)
    samples = []
    for index in range(7):
        ids = torch.randint(3, 200, (12 + 3 * index,), generator=random).tolist()
        advantage = float(torch.randn((), generator=random))
        cut = 5 + index
        logprobs = (-6 + torch.randn(len(ids) - cut, generator=random)).tolist()
        staleness = (0,) * len(logprobs)
        samples.append(TrainSample(tuple(ids[:cut]), tuple(ids[cut:]), tuple(logprobs), staleness, advantage))
    return samples


def plain_training(model_path: str, config: RlConfig) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and last weights, one sample at a time, from logits and torch's own optimizer."""
    model: Any = load_model(model_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    losses, norms = [], []
    for step in range(STEPS):
        samples = batch(step)
        tokens = sum(len(sample.token_ids) for sample in samples)
        total = 0.0
        for sample in samples:
            ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1] / TEMPERATURE
            policy = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            advantages = torch.full_like(policy, sample.advantage)
            ages, row = torch.tensor(sample.staleness), torch.zeros(len(policy), dtype=torch.int64)
            outputs = LOSSES[config.loss.name](
                LossInputs(policy, torch.tensor(sample.sampler_logprobs), advantages, ages, row, 16), config.loss
            )
            loss = outputs.loss_sum / tokens
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: weight.detach() for name, weight in model.named_parameters()}


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
        weights = self._weights(results[-1]["manifest"])
        trainer.save(f"{folder}/model")
        broken = batch(0)
        broken[3] = replace(broken[3], advantage=math.inf)
        skipped = trainer.step(broken, STEPS - 1)
        unchanged = self._weights(skipped["manifest"])
        trainer.step(batch(0), STEPS - 1)
        trainer.close()
        trainer._engine.destroy()
        return {
            "metrics": [result["metrics"] for result in results],
            "weights": weights,
            "skipped": skipped["metrics"]["skipped"],
            "unchanged": all(weights[name].equal(unchanged[name]) for name in weights),
            "report": trainer.report(),
        }

    def resume(self, config: RlConfig, folder: str) -> dict[str, Any]:
        trainer = PolicyTrainer(config, 0)
        state = trainer.load_checkpoint(f"{folder}/checkpoint")
        for step in range(trainer.policy_version, STEPS):
            result = trainer.step(batch(step), step)
        weights = self._weights(result["manifest"])
        trainer.close()
        trainer._engine.destroy()
        return {"state": state, "weights": weights}

    @staticmethod
    def _weights(manifest: dict[str, Any] | None) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in open_weights(manifest)} if manifest else {}


def layout(expert: int, zero: int) -> dict[str, int]:
    return {"processes": 2, "expert": expert, "zero": zero}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_policy(tmp_path_factory.mktemp("policy") / "model"))


@pytest.fixture(scope="module")
def plain(model):
    return plain_training(model, make_config(model))


@pytest.fixture(scope="module")
def two_ranks(ray_session):
    group = RankGroup(ParallelConfig(processes=2), TrainerResources(cpus=0.25), Cases)
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


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "zero"), LAYOUTS)
def test_ranks_train_as_the_written_out_loss(trained, plain, expert, zero, record_property):
    folder, result = trained(expert, zero)
    losses, norms, weights = plain
    metrics = result["metrics"]
    assert result["report"]["engine"] == "DeepSpeedEngine"
    assert [line["loss"] for line in metrics] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in metrics] == pytest.approx(norms, rel=1e-5)
    assert all(line["tokens_trained"] == sum(len(sample.token_ids) for sample in batch(0)) for line in metrics)
    record_property("weights", gap(result["weights"], weights))
    # Adam divides by the root of tiny squares: rounding of a gradient moves a weight by far more than rounding.
    assert gap(result["weights"], weights) < 1e-3
    exported = dict(load_model(folder / "model").named_parameters())
    assert gap({name: weight.detach() for name, weight in exported.items()}, result["weights"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "zero"), LAYOUTS)
def test_an_infinite_loss_changes_no_weight(trained, expert, zero):
    _, result = trained(expert, zero)
    assert result["skipped"] == 1
    assert result["unchanged"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "exact"), [((2, 1), (2, 1), True), ((2, 3), (2, 3), True), ((2, 3), (1, 1), False)]
)
def test_goes_on_from_a_checkpoint_of_any_layout(trained, two_ranks, model, old, new, exact):
    folder, whole = trained(*old)
    resumed = two_ranks.get("resume", make_config(model, parallel=layout(*new)), str(folder))
    assert resumed["state"] == {"seen": 2}
    difference = gap(resumed["weights"], whole["weights"])
    assert difference == 0 if exact else difference < 1e-3


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
        assert result["skipped"] == 1
        assert result["unchanged"]
        assert gap(two_ranks.get("resume", config, str(folder))["weights"], result["weights"]) == 0
        second[zero] = result["metrics"][1]["loss"]
    # A first step that is a quarter too small leaves it 2.7% off.
    assert second[0] == pytest.approx(second[1], rel=0.01)


def test_every_rank_gets_as_many_forwards_and_every_sample_once(tmp_path):
    config = make_config("unused")
    shares = [dealt(config, batch(0), rank, 4) for rank in range(4)]
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
