"""Config of the `eval` stage, which measures pass@1 and pass@k of a policy on problems that it was never trained on."""

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.data import DataConfig, FilesConfig
from posttrain.config.engines import EngineConfig, SamplingConfig
from posttrain.config.environments import EnvironmentConfig, with_reward
from posttrain.config.fields import Probability
from posttrain.config.images import ImagesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources, RewardResources
from posttrain.config.rewards import RewardConfig


class EvalResources(Config):
    """CPUs and GPUs of the engines that serve the policy, and of the reward actor."""

    rollout: ActorResources = Field(
        default_factory=ActorResources, description="Engines that serve the policy, and what each asks for."
    )
    reward: RewardResources = Field(default_factory=RewardResources)


class EvalSamplingConfig(SamplingConfig):
    """How replies are sampled. Nothing is trained on them, so a part of the vocabulary may be excluded."""

    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Draw only from the likeliest tokens that together have this probability; 1 excludes none.",
    )


class EvalConfig(Config):
    """The `eval` stage: greedy accuracy, pass@1 and pass@k by capability, with 95% intervals."""

    model: ServedModelConfig = Field(description="The policy to measure.")
    data: DataConfig = Field(description="The held-out prompts; each ends with a user or tool turn.")
    reward: RewardConfig = Field(description="The reward that scores each reply.")
    environment: EnvironmentConfig | None = Field(
        default=None,
        description="Rows as episodes of several turns, as in training. The environment gives their reward; the "
        "section reward scores all other rows.",
    )
    images: ImagesConfig | None = Field(
        default=None,
        description="Show the pictures of rows to a multimodal Llama 4; {} takes them from the folder of the data "
        "file. null: text only.",
    )
    correct_threshold: Probability | None = Field(
        default=None,
        description="Another place for reward.correct_threshold: a reply with at least this reward counts as right.",
    )
    greedy: bool = Field(
        default=True, description="Also take the greedy reply to every prompt, in which each token is the likeliest."
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        default=8, description="Number of replies sampled for each prompt; 0 measures greedy replies only."
    )
    k: Annotated[int, Field(ge=1)] = Field(default=8, description="The k of pass@k, at most `samples`.")
    pass_k_limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Number of prompts for which replies are sampled, a fair share of each capability; null samples "
        "for all prompts. Greedy replies are taken for all prompts in any case.",
    )
    sampling: EvalSamplingConfig = Field(
        default_factory=EvalSamplingConfig,
        description="How replies are sampled. Greedy replies use only its max_tokens.",
    )
    observe: dict[str, str] = Field(
        default_factory=dict,
        description="Regular expressions by name. For each, the results hold the share of replies in which it is "
        "found, and the accuracy of those replies.",
    )
    exclude: list[FilesConfig] = Field(
        default_factory=list,
        description="Training sets. A held-out problem that also appears in one of them is an error.",
    )
    key_field: str | None = Field(
        default=None, description="Column with the canonical key of a problem, by which `exclude` compares problems."
    )
    engine: EngineConfig = Field(
        default_factory=EngineConfig, description="Settings of the vLLM engine that serves the policy."
    )
    resources: EvalResources = Field(
        default_factory=EvalResources, description="CPUs and GPUs of the policy's engines and of the reward actor."
    )

    @field_validator("observe")
    @classmethod
    def _patterns_compile(cls, observe: dict[str, str]) -> dict[str, str]:
        for name, pattern in observe.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None
        return observe

    @model_validator(mode="before")
    @classmethod
    def _threshold_of_the_reward(cls, data: Any) -> Any:
        """Copy `correct_threshold` into the reward if only it is given, so that the stage reads one threshold."""
        data = with_reward(data)
        reward = data.get("reward") if isinstance(data, dict) else None
        if not isinstance(reward, dict) or data.get("correct_threshold") is None or "correct_threshold" in reward:
            return data
        return {**data, "reward": {**reward, "correct_threshold": data["correct_threshold"]}}

    @model_validator(mode="after")
    def _consistent(self) -> "EvalConfig":
        if self.correct_threshold not in (None, self.reward.correct_threshold):
            raise ValueError(
                f"correct_threshold is {self.correct_threshold:g} and reward.correct_threshold is "
                f"{self.reward.correct_threshold:g}: they mean the same; remove one of the two"
            )
        if not self.greedy and not self.samples:
            raise ValueError("greedy is false and samples is 0, so there is nothing to measure; set one of them")
        if self.samples and self.k > self.samples:
            raise ValueError(f"k is {self.k} and samples is {self.samples}: pass@k needs at least k samples a prompt")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0, so all samples would be equal; set it above 0, or samples: 0")
        if self.sampling.max_tokens >= self.engine.length:
            raise ValueError(
                f"sampling.max_tokens is {self.sampling.max_tokens}; it must be below engine.max_model_len "
                f"({self.engine.length}), which also holds the prompt"
            )
        if bool(self.exclude) != (self.key_field is not None):
            raise ValueError("exclude and key_field belong together: set both, or neither")
        return self
