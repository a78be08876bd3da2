"""The reference policy in its own process: a frozen model that gives the log-probabilities of sampled tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch

from posttrain.config.models import ModelConfig
from posttrain.rl.loss_config import ReferenceConfig
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.policy import load_token_policy, sample_logprobs
from posttrain.rl.training.samples import TrainSample


def reference_model(reference: ReferenceConfig, model: ModelConfig) -> ModelConfig:
    """The config of the reference model: its own folder, or the folder from which training starts."""
    return model.model_copy(update={"path": reference.path or model.path})


class FrozenPolicy:
    """The object in the reference's process: it holds the model, on a GPU if there is one."""

    def __init__(self, config: TrainingConfig, seed: int, store: Path | None = None):
        """store: as for `PolicyTrainer`."""
        resources, reference = config.resources.reference, config.loss.reference
        assert resources is not None
        assert reference is not None
        torch.manual_seed(seed)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cpu":
            torch.set_num_threads(max(1, int(resources.cpus)))
        self._max_tokens = config.micro_batch_tokens
        model, shared = reference_model(reference, config.model), config.shared_prefixes
        policy = load_token_policy(
            model, config.sampling.temperature, shared_prefixes=shared, images=config.images, store=store
        )
        self._policy = policy.to(self._device).eval()

    def logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """See `Reference.logprobs`."""
        return sample_logprobs(self._policy, samples, self._max_tokens, device=self._device)
