"""Schema of the `eval` stage: pass@1 and pass@k of a policy on problems it was never trained on."""

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.shared import (
    ActorResources,
    DataConfig,
    EngineConfig,
    FilesConfig,
    Probability,
    RewardConfig,
    SamplingConfig,
    ServedModelConfig,
)


class EvalResources(Config):
    """Who needs what: the policy is the only model of this stage."""

    rollout: ActorResources = Field(default_factory=ActorResources, description="Engines that serve the policy.")


class EvalSamplingConfig(SamplingConfig):
    """How samples are drawn. Nothing is trained on them, so a part of the vocabulary may be left out."""

    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Only the likeliest tokens that together have this probability."
    )


class EvalConfig(Config):
    """The `eval` stage: greedy accuracy, pass@1 and pass@k by capability, with 95% intervals."""

    model: ServedModelConfig = Field(description="The policy to measure.")
    data: DataConfig = Field(description="Held-out prompts: each ends with a user turn.")
    reward: RewardConfig = Field(description="What scores a reply.")
    correct_threshold: Probability | None = Field(
        default=None,
        description="Another place for reward.correct_threshold: a reply with at least this reward counts as right.",
    )
    greedy: bool = Field(default=True, description="Also take the likeliest reply to every prompt.")
    samples: Annotated[int, Field(ge=0)] = Field(default=8, description="Sampled replies a prompt; 0: greedy only.")
    k: Annotated[int, Field(ge=1)] = Field(default=8, description="The k of pass@k, at most `samples`.")
    pass_k_limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Draw samples for this many prompts only, a fair share of each capability; None: for all.",
    )
    sampling: EvalSamplingConfig = Field(
        default_factory=EvalSamplingConfig, description="How samples are drawn; greedy uses its max_tokens only."
    )
    observe: dict[str, str] = Field(
        default_factory=dict,
        description="Regular expressions by name: the share of replies in which each is found, and their accuracy.",
    )
    exclude: list[FilesConfig] = Field(
        default_factory=list, description="Training sets; a held-out problem that stands in one of them is an error."
    )
    key_field: str | None = Field(
        default=None, description="Column with the canonical key of a problem, for `exclude`."
    )
    engine: EngineConfig = Field(default_factory=EngineConfig, description="vLLM engine of the policy.")
    resources: EvalResources = Field(default_factory=EvalResources)

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
        """Where only `correct_threshold` is given, it is the reward's: from here on there is one threshold."""
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
        if self.sampling.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"sampling.max_tokens is {self.sampling.max_tokens}; it must be below engine.max_model_len "
                f"({self.engine.max_model_len}), which also holds the prompt"
            )
        if bool(self.exclude) != (self.key_field is not None):
            raise ValueError("exclude and key_field belong together: set both, or neither")
        return self
