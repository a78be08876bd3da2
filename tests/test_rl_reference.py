"""The reference policy: its log-probabilities are the starting policy's, whatever the trainer has learnt since."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_records import reply_sample
from tiny_policy import save_tiny_policy

from posttrain.config.base import validate_config
from posttrain.errors import CheckpointError, ConfigError
from posttrain.model.load import load_model
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.plan import make_plan
from posttrain.rl.config import RlConfig
from posttrain.rl.training.frozen_policy import FrozenPolicy
from posttrain.rl.training.reference import Reference, check_reference
from posttrain.rl.training.samples import TrainSample

TEMPERATURE = 0.7


def make_config(model: Path, reference: dict[str, Any] | None = None, **changes: Any) -> RlConfig:
    data = {
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {"path": "unused.jsonl"},
        "reward": {"name": "unused"},
        "sampling": {"max_tokens": 16, "temperature": TEMPERATURE},
        "micro_batch_tokens": 64,
        "loss": {"reference": {"weight": 0.1, **(reference or {})}},
        "resources": {"reference": {"cpus": 0.25}},
        **changes,
    }
    return validate_config(RlConfig, data, "test")


def samples() -> list[TrainSample]:
    """Of several lengths, out of order: several micro-batches."""
    random = torch.Generator().manual_seed(0)
    found = []
    for length in (20, 9, 31, 12, 27):
        ids = torch.randint(3, 200, (length,), generator=random).tolist()
        reply = tuple(ids[5:])
        found.append(reply_sample(tuple(ids[:5]), reply, (-1.0,) * len(reply), (0,) * len(reply), 0.5))
    return found


def written_out(folder: Path) -> list[list[float]]:
    model: Any = load_model(folder)
    found = []
    for sample in samples():
        ids = torch.tensor([sample.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, sample.trained[0][0] - 1 : -1] / TEMPERATURE
        found.append(
            logits.log_softmax(-1)
            .gather(1, torch.tensor(sample.token_ids[sample.trained[0][0] :])[:, None])[:, 0]
            .tolist()
        )
    return found


def close_to(found: list[list[float]], expected: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, abs=1e-4) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("other", [False, True])
def test_its_logprobs_are_those_of_the_starting_policy_or_of_its_own_folder(policy, tmp_path, other):
    folder = save_tiny_policy(tmp_path / "other", seed=3)
    reference = FrozenPolicy(make_config(policy, {"path": str(folder)} if other else None), 0)
    found = reference.logprobs(samples())
    assert close_to(found, written_out(folder if other else policy))
    assert not close_to(found, written_out(policy if other else folder))


@pytest.mark.slow
def test_it_answers_from_a_process_of_its_own(ray_session, policy):
    async def ask() -> list[list[float]]:
        reference = Reference(make_config(policy), 0)
        try:
            return await reference.logprobs(samples())
        finally:
            reference.close()

    assert close_to(asyncio.run(ask()), written_out(policy))


def test_a_folder_that_cannot_be_a_reference_is_refused_before_anything_is_loaded(policy, tiny_model, tmp_path):
    def check(reference: dict[str, Any] | None = None) -> None:
        config = make_config(policy, reference)
        check_reference(config.loss.reference, config.model)

    check()
    check({"path": str(tiny_model)})  # another shape, the same tokens
    with pytest.raises(CheckpointError, match="no such folder"):
        check({"path": str(tmp_path / "none")})
    other = save_tiny_policy(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    assert '"a"' in text
    (other / "tokenizer.json").write_text(text.replace('"a"', '"\u2603"', 1))
    with pytest.raises(ConfigError, match=r"loss.reference.path: got .* whose tokenizer is not that of model.path"):
        check({"path": str(other)})


def test_the_plan_counts_one_process_whatever_the_trainer_has(policy):
    config = make_config(policy, parallel={"processes": 4})
    node = Node("rl", "rl", config, (), "rl", "rl.yaml", "")
    step = make_plan(Pipeline("test", "test", 0, False, {"rl": node}), Path("run"))[0]
    assert {actor.role: (actor.workers, actor.cpus) for actor in step.actors} == {
        "rollout": (1, 1.0), "trainer": (4, 1.0), "reference": (1, 0.25), "reward": (1, 0.0)
    }  # fmt: skip
