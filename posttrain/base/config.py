"""Schema of the `base` stage, which trains the quick start's tiny Llama 4 from nothing."""

from typing import Annotated

from pydantic import Field, model_validator

from posttrain.config.base import RESULT_STAYS, Config
from posttrain.config.shared import Positive, Probability, TrackersConfig

# More than any document has.
MIN_BATCH_TOKENS = 128

Count = Annotated[int, Field(ge=1)]


class ModelSizes(Config):
    """Shape of the Llama 4 text model. The last layer of every four has no positional embedding."""

    hidden: Count = Field(default=96, description="Width of the residual stream.")
    layers: Count = Field(default=4, description="Decoder layers; every second one is a mixture of experts.")
    heads: Count = Field(default=3, description="Query heads.")
    kv_heads: Count = Field(default=1, description="Key and value heads; a divisor of `heads`.")
    head_dim: Count = Field(default=32, description="Size of a head, even.")
    ffn: Count = Field(default=256, description="Inner size of dense layers.")
    expert_ffn: Count = Field(default=192, description="Inner size of each expert and of the shared expert.")
    experts: Count = Field(default=4, description="Routed experts, of which each token uses one.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelSizes":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, but {self.heads} / {self.kv_heads} leaves a rest")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, but is {self.head_dim}")
        return self


class SetSizes(Config):
    """Number of puzzles in each dataset."""

    sft: Count = Field(default=1200, description="Supervised examples.")
    prompts: Count = Field(default=1600, description="Prompts for reinforcement learning.")
    heldout: Count = Field(default=400, description="Final evaluation; the same for every seed.")
    tune: Count = Field(default=300, description="For choosing settings; the same for every seed.")


class TextConfig(Config):
    """What the base model reads, and how the supervised examples are written."""

    worked_share: Probability = Field(default=0.9, description="Replies that show their steps, before the switch.")
    switch_at: Probability = Field(default=0.8, description="Share of the steps after which most replies are terse.")
    plain_share: Probability = Field(
        default=0.6, description="Documents before the switch that are not in chat format."
    )
    slip_share: Probability = Field(default=0.05, description="Worked replies with a wrong step.")
    rate_share: Probability = Field(default=0.08, description="Documents that rate a puzzle easy, medium or hard.")


class StageConfig(Config):
    """The `base` stage: a small model and the datasets of the quick start, reproducible from the seed."""

    steps: Count = Field(default=800, description="Optimizer steps; the whole schedule scales with it.")
    batch_tokens: Count = Field(default=2048, description="Tokens of a step with padding, over all processes.")
    processes: Annotated[int, Field(ge=1, le=8)] = Field(
        default=2, description="Data-parallel processes, one thread each."
    )
    muon_learning_rate: Positive = Field(default=0.03, description="Peak for the matrices inside the layers (Muon).")
    adam_learning_rate: Positive = Field(
        default=4e-3, description="Peak for embeddings, head, router and norms (AdamW)."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=20, description="Linear warm-up of both rates.")
    decay_share: Probability = Field(
        default=0.5, description="Last share of the steps in which the rates fall linearly."
    )
    balance_coefficient: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="Weight of the expert balance loss."
    )
    max_grad_norm: Positive = Field(default=1.0, description="Gradients with a larger norm are scaled down to it.")
    cache: bool = Field(
        default=True,
        description="Reuse a base trained before with the same config, seed, code and torch.",
        json_schema_extra=RESULT_STAYS,
    )
    trackers: TrackersConfig | None = Field(
        default=None,
        description="Where metrics go besides metrics.jsonl; absent: as the pipeline says, else nowhere.",
        json_schema_extra=RESULT_STAYS,
    )
    model: ModelSizes = Field(default_factory=ModelSizes)
    sets: SetSizes = Field(default_factory=SetSizes)
    text: TextConfig = Field(default_factory=TextConfig)

    @model_validator(mode="after")
    def _documents_fit(self) -> "StageConfig":
        if self.batch_tokens < MIN_BATCH_TOKENS * self.processes:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}, but each of {self.processes} processes needs {MIN_BATCH_TOKENS}"
            )
        return self
