"""Schema of the direct preference optimisation stage."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.shared import (
    DataConfig,
    GradientCheckpointing,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Positive,
    TrackersConfig,
    TrainerResources,
)

Count = Annotated[int, Field(ge=1)]


class DpoResources(Config):
    """Who the stage needs."""

    trainer: TrainerResources = Field(default_factory=TrainerResources)


class MiningConfig(Config):
    """How preference pairs are made of the rollouts of an RL stage."""

    min_margin: Positive = Field(default=0.5, description="Least difference in reward between chosen and rejected.")
    max_per_prompt: Count = Field(default=1, description="Pairs from one prompt; no reply is used twice.")
    reasons: list[Literal["wrong", "truncated"]] = Field(
        default_factory=lambda: ["wrong", "truncated"],
        min_length=1,
        description="What may be rejected: a complete reply with a lower reward; a reply that ran out of tokens.",
    )


class DpoOptimizerConfig(OptimizerConfig):
    """AdamW at a rate for preferences: a tenth of that for supervised fine-tuning."""

    learning_rate: Positive = 1e-6


class DpoConfig(Config):
    """Direct preference optimisation on given pairs, or on pairs mined from rollouts."""

    model: ModelConfig
    pairs: DataConfig | None = Field(None, description="Rows of prompt, chosen and rejected.")
    rollouts: str | None = Field(None, description="Folder of an RL stage's rollouts; or ${stage.rollouts}.")
    mining: MiningConfig = Field(default_factory=MiningConfig)
    max_pairs: Count | None = Field(None, description="Train on at most so many pairs, balanced over capabilities.")
    beta: Positive = Field(0.1, description="Strength of the pull towards the start policy.")
    loss_type: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = Field(
        "sigmoid", description="sigmoid is DPO; sigmoid_norm divides by reply length; hinge is SLiC; ipo is IPO."
    )
    nll_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of a supervised term on the chosen reply, which keeps its likelihood from falling."
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters instead of all weights.")
    optimizer: DpoOptimizerConfig = Field(default_factory=DpoOptimizerConfig)
    epochs: Count = Field(1, description="Passes over the pairs. Light preference optimisation needs one.")
    batch_size: Count = Field(8, description="Pairs of one forward and backward.")
    gradient_accumulation: Count = Field(1, description="Forwards and backwards of one optimiser step.")
    max_length: Annotated[int, Field(ge=2)] = Field(4096, description="Longest prompt plus reply, in tokens.")
    overlong: Literal["error", "drop"] = Field("error", description="What to do with a longer pair.")
    gradient_checkpointing: GradientCheckpointing = "none"
    checkpoint_every: Count = Field(200, description="Optimiser steps between checkpoints.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig,
        description="The ranks that train, each with a DeepSpeed engine; each takes rows of its own. One by default.",
    )
    trackers: TrackersConfig | None = Field(
        default=None, description="Where metrics go besides metrics.jsonl; absent: as the pipeline says, else nowhere."
    )
    resources: DpoResources = Field(default_factory=DpoResources)

    @model_validator(mode="after")
    def _one_source(self) -> "DpoConfig":
        if (self.pairs is None) == (self.rollouts is None):
            raise ValueError("exactly one of pairs and rollouts must be set")
        return self
