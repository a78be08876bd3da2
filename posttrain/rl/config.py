"""The RL stage's knobs."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.shared import (
    ActorResources,
    DataConfig,
    EngineConfig,
    GradientCheckpointing,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Positive,
    Probability,
    RewardConfig,
    SamplingConfig,
    SystemsConfig,
    TrainerResources,
)


class LossConfig(Config):
    """Which loss of `posttrain.rl.losses.LOSSES`, and its constants."""

    name: Literal["dppo", "grpo"] = Field(default="dppo", description="dppo: divergence mask; grpo: clipped ratio.")
    divergence: Positive = Field(default=0.2, description="dppo: tokens whose probability moved further are masked.")
    ratio_cap: Positive = Field(default=20.0, description="dppo: importance ratios are capped here.")
    kl_weight: Annotated[float, Field(ge=0)] = Field(default=1e-3, description="dppo: weight of (log ratio)^2.")
    clip_low: Positive = Field(default=0.2, description="grpo: ratios below 1 - clip_low are clipped.")
    clip_high: Positive = Field(default=0.28, description="grpo: ratios above 1 + clip_high are clipped.")


class ProfileConfig(Config):
    """pass@k profile of the prompts with the starting policy, and the band of pass rates that is trained on."""

    samples: Annotated[int, Field(ge=1)] = Field(default=8, description="Replies sampled for each prompt.")
    prompts: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Profile only so many prompts.")
    band: list[Probability] = Field(
        default_factory=lambda: [0.1, 0.7], description="Lowest and highest pass rate that is medium to hard."
    )

    @field_validator("band")
    @classmethod
    def _two_ends(cls, band: list[float]) -> list[float]:
        if len(band) != 2 or band[0] > band[1]:
            raise ValueError("must be [lowest, highest] with lowest <= highest")
        return band


class RlResources(Config):
    """Engines that generate, and the trainer's ranks beside them."""

    rollout: ActorResources = Field(default_factory=ActorResources)
    trainer: TrainerResources = Field(default_factory=TrainerResources)


class RlConfig(Config):
    """Asynchronous online RL: prompts in, a better policy out."""

    model: ModelConfig
    prompts: DataConfig = Field(description="Rows that end with a user turn and carry what the reward needs.")
    reward: RewardConfig
    systems: SystemsConfig = Field(
        default_factory=SystemsConfig, description="System instructions, sampled for prompts that have none."
    )
    mixture: dict[str, Positive] = Field(
        default_factory=dict, description="Share of each capability in every batch; empty: as in the selected prompts."
    )
    mixture_refills: Annotated[int, Field(ge=0)] = Field(
        default=4,
        description="A dropped group is replaced by one of its capability so often; then another takes its place.",
    )
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    steps: Annotated[int, Field(ge=1)] = Field(default=100, description="Optimizer steps.")
    groups_per_step: Annotated[int, Field(ge=1)] = Field(
        default=32, description="Groups (prompts) trained on in a step."
    )
    group_size: Annotated[int, Field(ge=2)] = Field(default=8, description="Rollouts of one prompt.")
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        default=4, description="No token is trained on that is more versions old than this; 0 is strictly on-policy."
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    advantage: Literal["group_mean", "grpo", "rloo"] = Field(
        default="group_mean", description="Baseline of a group's rewards."
    )
    drop_zero_advantage: bool = Field(default=True, description="Drop and replace groups whose rewards are all equal.")
    min_group: Annotated[int, Field(ge=2)] = Field(
        default=2, description="Fewer scored rollouts than this drop the group."
    )
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="The trainer's ranks; all of them share each step's rollouts."
    )
    micro_batch_tokens: Annotated[int, Field(ge=64)] = Field(
        default=8192, description="Padded tokens of one forward pass."
    )
    gradient_checkpointing: GradientCheckpointing = "none"
    checkpoint_every: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Optimizer steps between checkpoints."
    )
    stop_after_idle_steps: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Stop when so many batches' worth of groups in a row had no advantage."
    )
    parity_tolerance: Positive | None = Field(
        default=None,
        description="Largest mean gap of sampler and trainer log-probabilities; None: 1e-3 fp32, 0.1 bf16.",
    )
    engine: EngineConfig = Field(default_factory=EngineConfig)
    resources: RlResources = Field(default_factory=RlResources)

    @model_validator(mode="after")
    def _fits(self) -> "RlConfig":
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: RL needs replies that differ, so it must be above 0")
        if self.sampling.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"sampling.max_tokens ({self.sampling.max_tokens}) must be below engine.max_model_len "
                f"({self.engine.max_model_len}): the prompt needs room too"
            )
        if self.min_group > self.group_size:
            raise ValueError(f"min_group ({self.min_group}) must not exceed group_size ({self.group_size})")
        return self
