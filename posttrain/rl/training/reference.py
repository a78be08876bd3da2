"""The reference policy: a frozen model in a process of its own, which gives the log-probabilities of sampled tokens.

It is loaded from `loss.reference.path`, by default from the folder that training starts from; that folder does not
change, so a resumed stage has the same reference. Left out: an optimizer, and more than one process (a model that one
GPU cannot hold cannot be a reference).
"""

from collections.abc import Sequence

import torch
from msgspec.structs import replace

from posttrain.config.shared import ParallelConfig
from posttrain.errors import ConfigError
from posttrain.model.load import load_tokenizer
from posttrain.parallel.ranks import RankGroup
from posttrain.rl.config import RlConfig
from posttrain.rl.records import ScoredGroup
from posttrain.rl.training.policy import load_token_policy, sample_logprobs
from posttrain.rl.training.samples import TrainSample, is_trained_on, train_samples


def reference_config(config: RlConfig) -> RlConfig:
    """The config under which the reference is the policy. `loss.reference` must be set."""
    assert config.loss.reference is not None
    path = config.loss.reference.path or config.model.path
    model = config.model.model_copy(update={"path": path})
    return config.model_copy(update={"model": model, "gradient_checkpointing": "none"})


def check_reference(config: RlConfig) -> None:
    """Raise `ConfigError` or `CheckpointError` where the reference cannot be that of the policy. Loads no weights."""
    if config.loss.reference is None or config.loss.reference.path is None:
        return
    own, other = (load_tokenizer(path).get_vocab() for path in (config.model.path, config.loss.reference.path))
    if own != other:
        raise ConfigError(
            "loss.reference.path",
            [f"got {config.loss.reference.path!r}, whose tokenizer is not that of model.path {config.model.path!r}: "
             "the ids of one would mean other tokens to the other"],
        )  # fmt: skip


class Reference:
    """The process of the reference policy, with `resources.reference`; must be used inside a Ray session.

    It starts in the background; the first call waits for it.
    """

    def __init__(self, config: RlConfig, seed: int):
        resources = config.resources.reference
        assert resources is not None
        self._process = RankGroup(ParallelConfig(), resources, FrozenPolicy, config, seed, name="the reference")

    async def logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Log-probability of each sample's trained tokens at the sampling temperature, in the order given."""
        return await self._process.call("logprobs", list(samples))

    def close(self) -> None:
        """End the process."""
        self._process.close()


class FrozenPolicy:
    """In the process: the model, on its GPU if it has one."""

    def __init__(self, config: RlConfig, seed: int):
        resources = config.resources.reference
        assert resources is not None
        torch.manual_seed(seed)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cpu":
            torch.set_num_threads(max(1, int(resources.cpus)))
        self._max_tokens = config.micro_batch_tokens
        self._policy = load_token_policy(reference_config(config)).to(self._device).eval()

    def logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """See `Reference.logprobs`."""
        return sample_logprobs(self._policy, samples, self._max_tokens, self._device)


async def with_reference(scored: ScoredGroup, reference: Reference) -> ScoredGroup:
    """The group with the reference's log-probabilities of every rollout that is trained on."""
    values = iter(await reference.logprobs(train_samples([scored], 0)))
    found = tuple(
        tuple(next(values)) if is_trained_on(rollout, advantage) else ()
        for rollout, advantage in zip(scored.group.rollouts, scored.advantages, strict=True)
    )
    return replace(scored, ref_logprobs=found)
