"""The keys of an RL stage that say what is sampled: from which policy, how, and on which engines.

This is the lowest section. A key that several rooms read is declared in the section of the lowest of them, and the
sections of the rooms above extend that section.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import RESULT_STAYS, Config
from posttrain.config.data import DataConfig
from posttrain.config.engines import EngineConfig, SamplingConfig
from posttrain.config.environments import EnvironmentConfig
from posttrain.config.models import TunedModelConfig
from posttrain.config.resources import ActorResources, RewardResources, RolloutResources, TrainerResources

MOST_ENGINES = 64  # of `resources: auto`
# Settings besides the temperature that change the distribution, each with the value at which it has no effect.
RENORMALISING = {
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


class RlSamplingConfig(SamplingConfig):
    """How training's replies are sampled: from the whole vocabulary, at a temperature that both sides apply.

    There is no `top_p`, nor any other setting that changes the distribution. The engine's log-probabilities would be
    those of the changed distribution, and the trainer's those of the whole vocabulary. For example, with top_p 0.9 a
    token from a nucleus with a mass of 0.9 would have an importance ratio of 0.9 although both sides have the same
    weights.
    """

    @model_validator(mode="before")
    @classmethod
    def _whole_vocabulary(cls, data: object) -> Any:
        """Refuse the keys of RENORMALISING, but ignore those that have no effect, such as `top_p: 1.0`."""
        if not isinstance(data, dict):
            return data
        changing = [f"{key} {data[key]}" for key, neutral in RENORMALISING.items() if data.get(key, neutral) != neutral]
        if changing:
            raise ValueError(
                f"got {', '.join(changing)}: RL samples from the whole vocabulary. The engine's log-probabilities "
                "would be those of the changed distribution and the trainer's those of the whole one, so that every "
                "importance ratio would be wrong; remove the key. For sharper replies lower the temperature, which "
                "both sides apply. `evaluation.top_p` and the eval stage's `sampling.top_p` may be below 1"
            )
        return {key: value for key, value in data.items() if key not in RENORMALISING}


class RlResources(Config):
    """CPUs and GPUs of the engines, the trainer's ranks, the reward actor, the reference, and the judge's engines.

    `auto` is short for `{rollout: {workers: {min: 1, max: 64, forecast: true}}}`.
    """

    rollout: RolloutResources = Field(default_factory=RolloutResources)
    trainer: TrainerResources = Field(default_factory=TrainerResources)
    reward: RewardResources = Field(default_factory=RewardResources)
    reference: TrainerResources | None = Field(
        default=None,
        description="The one process that holds the reference policy; set it together with loss.reference.",
    )
    judge: ActorResources | None = Field(
        default=None, description="Engines that serve the judge; set it together with the section judge."
    )
    trainer_threads: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="On a CPU: the most threads that a rank of the trainer may compute with. It begins with "
        "trainer.cpus of them, gets more while engines wait for it, and gives them back while it waits for engines or "
        "where they do not make steps faster. null: trainer.cpus threads always.",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, data: Any) -> Any:
        if data == "auto":
            return {"rollout": {"workers": {"min": 1, "max": MOST_ENGINES, "forecast": True}}}
        return data

    @model_validator(mode="after")
    def _check_threads(self) -> "RlResources":
        least = max(1, int(self.trainer.cpus))
        if self.trainer_threads is not None and self.trainer.gpus:
            raise ValueError(
                f"trainer_threads is {self.trainer_threads}, and trainer.gpus {self.trainer.gpus:g}: threads matter on "
                "a CPU only; remove one of the two"
            )
        if self.trainer_threads is not None and self.trainer_threads <= least:
            raise ValueError(
                f"trainer_threads is {self.trainer_threads}, and the trainer begins with the {least} of trainer.cpus; "
                f"set trainer_threads: {least + 1} or more, or remove it"
            )
        return self


class WeightsConfig(Config):
    """How new weights are sent to the engines, and how replies that are being sampled continue with them."""

    backend: Literal["shm", "nccl", "ipc"] = Field(
        default="shm",
        description="shm: through shared memory, of which each host of a cluster gets a copy. nccl: a broadcast "
        "between GPUs, of one host or several. ipc: the engine shares a GPU with the trainer and reads its memory.",
    )
    delta: bool = Field(
        default=False,
        description="Send other hosts of a cluster only the bytes that changed since the version before, compressed. "
        "It saves network for CPU time of the trainer's host; the weights that arrive are the same. Only for shm.",
        json_schema_extra=RESULT_STAYS,
    )
    kv: Literal["recompute", "keep"] = Field(
        default="recompute",
        description="What happens to the KV cache of unfinished replies and episodes. recompute: the engine computes "
        "it again with the new weights. keep: they continue on the cache of the old weights.",
    )
    order: Literal["together", "one_by_one"] = Field(
        default="together",
        description="together: all engines load new weights at the same time. one_by_one: one after the other, so "
        "that the others go on sampling.",
    )


class RolloutsConfig(Config):
    """What is sampled, and on which engines.

    `resources` names the actors of all rooms. It is declared here because the checks of this section read it.
    """

    model: TunedModelConfig
    prompts: DataConfig = Field(
        description="The prompts. Each row ends with a user turn and has the fields that the reward reads."
    )
    group_size: int = Field(default=8, description="Number of rollouts of each prompt, at least 2.")
    deterministic: bool = Field(
        default=False,
        description="Get the same weights, bit for bit, from every run with the same seed on the same kind of CPU, "
        "however often the run is resumed. It needs max_staleness 0 and one rollout worker, and samples groups in "
        "waves, which is slower.",
    )
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    sampling: RlSamplingConfig = Field(default_factory=RlSamplingConfig)
    environment: EnvironmentConfig | None = Field(
        default=None,
        description="Rows as episodes of several turns. The environment gives their reward; the section reward scores "
        "all other rows. null: every row has one turn.",
    )
    engine: EngineConfig = Field(default_factory=EngineConfig)
    resources: RlResources = Field(default_factory=RlResources)

    @field_validator("group_size")
    @classmethod
    def _has_baseline(cls, group_size: int) -> int:
        if group_size < 2:
            raise ValueError(
                "must be at least 2: an advantage compares the rewards of one prompt's rollouts with each other, and "
                "the advantage of a single one would always be 0"
            )
        return group_size

    @model_validator(mode="after")
    def _check_sampling(self) -> "RolloutsConfig":
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: RL needs replies that differ, so it must be above 0")
        if self.sampling.max_tokens >= self.engine.length:
            raise ValueError(
                f"sampling.max_tokens ({self.sampling.max_tokens}) must be below engine.max_model_len "
                f"({self.engine.length}): the prompt needs room too"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> "RolloutsConfig":
        """`nccl` and `ipc` need GPUs, and `ipc` needs one GPU that engine and trainer share."""
        backend, resources = self.weights.backend, self.resources
        if backend == "shm":
            return self
        if resources.rollout.is_elastic:
            raise ValueError(
                f"weights.backend: {backend} connects a fixed number of engines, so resources.rollout.workers must be "
                "one number; write it, or weights.backend: shm"
            )
        for name, gpus in (("rollout", resources.rollout.gpus), ("trainer", resources.trainer.gpus)):
            if not gpus:
                raise ValueError(
                    f"weights.backend: {backend} sends weights from GPU to GPU, but resources.{name}.gpus is 0; "
                    "set it, or weights.backend: shm"
                )
        if backend == "nccl":
            if self.weights.order == "one_by_one" and resources.rollout.most > 1:
                raise ValueError("weights.order: one_by_one does not go with weights.backend: nccl, a broadcast to all")
            return self
        if resources.rollout.gpus + resources.trainer.gpus > 1 or resources.rollout.most > 1:
            raise ValueError(
                "weights.backend: ipc needs one engine on the trainer's own GPU: resources.rollout.workers 1, and gpus "
                f"of rollout ({resources.rollout.gpus:g}) and trainer ({resources.trainer.gpus:g}) of 1 in sum"
            )
        return self
