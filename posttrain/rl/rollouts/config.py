"""The keys of an RL stage that say what is sampled: from which policy, how, and on which engines.

Each key is declared in the section of the lowest room that needs it; the sections of the rooms above extend that one.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.shared import (
    ActorResources,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RewardResources,
    SamplingConfig,
    TrainerResources,
)

# What an engine can do to the distribution besides the temperature, and the value with which it does nothing.
RENORMALISING = {
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


class RlSamplingConfig(SamplingConfig):
    """How the replies that are trained on are drawn: from the whole vocabulary, at a temperature.

    There is no `top_p` here, nor anything else that changes the distribution: the engine's log-probabilities would be
    of the changed one and the trainer's of the whole vocabulary. With top_p 0.9, a token whose nucleus has a mass of
    0.9 gets an importance ratio of 0.9 from weights that are equal. The temperature is applied on both sides.
    """

    @model_validator(mode="before")
    @classmethod
    def _whole_vocabulary(cls, data: Any) -> Any:
        """Leaves out the keys of RENORMALISING where they change nothing, such as `top_p: 1.0`."""
        if not isinstance(data, dict):
            return data
        changing = [f"{key} {data[key]}" for key, neutral in RENORMALISING.items() if data.get(key, neutral) != neutral]
        if changing:
            raise ValueError(
                f"got {', '.join(changing)}: RL samples from the whole vocabulary. The engine's log-probabilities "
                "would be of what is left of the distribution and the trainer's of all of it, so that every importance "
                "ratio would be wrong; remove the key. Sharper replies: a lower temperature, which both sides apply. "
                "`evaluation.top_p` and the eval stage's `sampling.top_p` may be below 1"
            )
        return {key: value for key, value in data.items() if key not in RENORMALISING}


class RlResources(Config):
    """Engines that generate, the trainer's ranks, the actor of the reward processes, a reference, a judge."""

    rollout: ActorResources = Field(default_factory=ActorResources)
    trainer: TrainerResources = Field(default_factory=TrainerResources)
    reward: RewardResources = Field(default_factory=RewardResources)
    reference: TrainerResources | None = Field(
        default=None, description="Of the one process that holds the reference policy; set it with loss.reference."
    )
    judge: ActorResources | None = Field(
        default=None, description="Engines that serve the judge; set it with the section judge."
    )


class WeightsConfig(Config):
    """How new weights get to the engines, and what becomes of the replies that are being sampled."""

    backend: Literal["shm", "nccl", "ipc"] = Field(
        default="shm",
        description="shm: shared memory, one host; nccl: broadcast between GPUs of any hosts; ipc: the engine reads "
        "the memory of the GPU that it shares with the trainer.",
    )
    kv: Literal["recompute", "keep"] = Field(
        default="recompute",
        description="The KV cache of running replies: compute it again under the new weights, or keep it.",
    )
    order: Literal["together", "one_by_one"] = Field(
        default="together", description="Engines take new weights at the same time, or each when the last one has."
    )


class RolloutsConfig(Config):
    """What is sampled, and on which engines. `resources` names the actors of all rooms, so it is here."""

    model: ModelConfig
    prompts: DataConfig = Field(description="Rows that end with a user turn and carry what the reward needs.")
    group_size: int = Field(default=8, description="Rollouts of one prompt, at least 2.")
    deterministic: bool = Field(
        default=False,
        description="On a CPU, the same weights bit for bit in every run, however often it is resumed. Needs "
        "max_staleness 0 and one rollout worker; groups are sampled in waves.",
    )
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    sampling: RlSamplingConfig = Field(default_factory=RlSamplingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    resources: RlResources = Field(default_factory=RlResources)

    @field_validator("group_size")
    @classmethod
    def _has_baseline(cls, group_size: int) -> int:
        if group_size < 2:
            raise ValueError(
                "must be at least 2: an advantage compares the rewards of one prompt's rollouts with each other, and "
                "that of a single one would always be 0"
            )
        return group_size

    @model_validator(mode="after")
    def _check_sampling(self) -> "RolloutsConfig":
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: RL needs replies that differ, so it must be above 0")
        if self.sampling.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"sampling.max_tokens ({self.sampling.max_tokens}) must be below engine.max_model_len "
                f"({self.engine.max_model_len}): the prompt needs room too"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> "RolloutsConfig":
        """The backends between GPUs need GPUs, and vLLM's `ipc` needs one GPU that engine and trainer share."""
        backend, resources = self.weights.backend, self.resources
        if backend == "shm":
            return self
        for name, gpus in (("rollout", resources.rollout.gpus), ("trainer", resources.trainer.gpus)):
            if not gpus:
                raise ValueError(
                    f"weights.backend: {backend} moves weights from GPU to GPU, and resources.{name}.gpus is 0; "
                    "set it, or weights.backend: shm"
                )
        if backend == "nccl":
            if self.weights.order == "one_by_one" and resources.rollout.workers > 1:
                raise ValueError("weights.order: one_by_one does not go with weights.backend: nccl, a broadcast to all")
            return self
        if resources.rollout.gpus + resources.trainer.gpus > 1 or resources.rollout.workers > 1:
            raise ValueError(
                "weights.backend: ipc needs one engine on the trainer's own GPU: resources.rollout.workers 1, and gpus "
                f"of rollout ({resources.rollout.gpus:g}) and trainer ({resources.trainer.gpus:g}) of 1 in sum"
            )
        return self
