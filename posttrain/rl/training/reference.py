"""The reference policy, which gives the log-probabilities of sampled tokens: a frozen model in a process of its own.

It is loaded from `loss.reference.path`, or by default from the folder from which training starts. That folder does not
change, so a resumed stage has the same reference. A training of adapters needs no second model, because the policy
without new ones, or with continued ones as they were, is the start (`AdaptersOff`). Left out: an optimizer, and more
than one process, so the reference must fit on one GPU.
"""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from posttrain.config.models import ModelConfig
from posttrain.config.training import ParallelConfig
from posttrain.errors import ConfigError
from posttrain.hosts.away import now_away
from posttrain.hosts.placement import in_cluster
from posttrain.model.tokenizer import load_tokenizer
from posttrain.parallel.ranks import RankGroup
from posttrain.rl.loss_config import ReferenceConfig
from posttrain.rl.records import ScoredGroup
from posttrain.rl.training.client import TrainerClient, absolute
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.samples import TrainSample, is_trained_on, num_trained, train_samples


def check_reference(reference: ReferenceConfig | None, model: ModelConfig) -> None:
    """Raise `ConfigError` or `CheckpointError` if a model cannot be the reference of a policy. No weights are loaded.

    reference: None if the stage has no reference. model: the policy's.
    """
    if reference is None or reference.path is None:
        return
    own, other = (load_tokenizer(path).get_vocab() for path in (model.path, reference.path))
    if own != other:
        raise ConfigError(
            "loss.reference.path",
            [f"got {reference.path!r}, whose tokenizer is not that of model.path {model.path!r}: "
             "token ids would mean different tokens to the two models"],
        )  # fmt: skip


class Reference:
    """The process of the reference policy, with the resources `resources.reference`. Ray must be initialised.

    The process starts in the background, and the first call waits for it. store: the file of the prompts' pictures;
    None for a policy that is shown none.
    """

    def __init__(self, config: TrainingConfig, seed: int, store: Path | None = None):
        resources = config.resources.reference
        assert resources is not None
        own = absolute(config) if in_cluster() else config
        self._process = RankGroup(ParallelConfig(), resources, frozen_policy, own, seed, store, name="the reference")

    async def logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Log-probability of each sample's trained tokens at the sampling temperature, in the order given."""
        return await self._process.call("logprobs", list(samples))

    def close(self) -> None:
        """End the process."""
        self._process.close()


class AdaptersOff:
    """The reference of a training of adapters: the policy without new ones, or with continued ones as they were.

    The trainer computes it between steps.
    """

    def __init__(self, trainer: TrainerClient):
        self._trainer = trainer

    async def logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """See `Reference.logprobs`."""
        return await self._trainer.async_logprobs(list(samples), False)


def frozen_policy(config: TrainingConfig, seed: int, store: Path | None = None) -> Any:
    """The `FrozenPolicy`. Only its own process calls this, so that the controller's process needs no torch."""
    from posttrain.rl.training.frozen_policy import FrozenPolicy

    if now_away():
        from posttrain.rl.training.away import config_here

        config = config_here(config, "resources.reference", store)
    return FrozenPolicy(config, seed, store)


async def with_reference(scored: ScoredGroup, reference: Reference | AdaptersOff) -> ScoredGroup:
    """The group with the reference's log-probabilities of every rollout that is trained on."""
    values = chain.from_iterable(await reference.logprobs(train_samples([scored], 0)))
    found = tuple(
        tuple(islice(values, num_trained(rollout))) if is_trained_on(rollout, advantage) else ()
        for rollout, advantage in zip(scored.group.rollouts, scored.advantages, strict=True)
    )
    return replace(scored, ref_logprobs=found)
