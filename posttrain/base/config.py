"""Schema of the `base` stage, which trains the quick start's tiny Llama 4 from random weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import RESULT_STAYS, Config
from posttrain.config.fields import Positive, Probability
from posttrain.config.trackers import TrackersConfig

# A batch must hold at least one document, and every document of the corpus is shorter than this.
MIN_BATCH_TOKENS = 128

Count = Annotated[int, Field(ge=1)]


class ModelSizes(Config):
    """Shape of the Llama 4 text model. As in Llama 4, every fourth layer has no positional embedding."""

    hidden: Count = Field(default=96, description="Width of the residual stream.")
    layers: Count = Field(default=4, description="Number of decoder layers. Every second is a mixture of experts.")
    heads: Count = Field(default=3, description="Number of query heads in a layer.")
    kv_heads: Count = Field(default=1, description="Number of key and value heads in a layer. It must divide `heads`.")
    head_dim: Count = Field(default=32, description="Size of each head. It must be even.")
    ffn: Count = Field(default=256, description="Inner size of the feed-forward network in a dense layer.")
    expert_ffn: Count = Field(default=192, description="Inner size of each routed expert and of the shared expert.")
    experts: Count = Field(
        default=4, description="Number of routed experts in a layer. Each token is routed to one of them."
    )

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelSizes":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: got {self.kv_heads}, which does not divide heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}; rotary position embeddings need an even number")
        return self


class SetSizes(Config):
    """Number of puzzles in each dataset."""

    sft: Count = Field(default=1200, description="Number of examples for supervised fine-tuning.")
    prompts: Count = Field(default=1600, description="Number of prompts for reinforcement learning.")
    heldout: Count = Field(
        default=400, description="Number of puzzles for the final evaluation. They are the same for every seed."
    )
    tune: Count = Field(
        default=300,
        description="Number of puzzles on which settings may be compared, so that nobody tunes on the held-out ones. "
        "They are the same for every seed.",
    )


class TextConfig(Config):
    """The text that the base model is trained on. At one step, the switch, most replies change from worked to terse."""

    worked_share: Probability = Field(
        default=0.9, description="Before the switch: share of the replies that show their steps."
    )
    switch_at: Probability = Field(
        default=0.8, description="The switch comes after this share of the steps. From there on most replies are terse."
    )
    plain_share: Probability = Field(
        default=0.6, description="Before the switch: share of the documents that are not in chat format."
    )
    slip_share: Probability = Field(
        default=0.05, description="Share of the replies with steps in which one step is wrong."
    )
    rate_share: Probability = Field(
        default=0.08, description="Share of the documents that rate a puzzle as easy, medium or hard."
    )


class StageConfig(Config):
    """The `base` stage, which makes the small model and the datasets of the quick start from the run's seed."""

    puzzles: Literal["answers", "tools", "pictures"] = Field(
        default="answers",
        description="The puzzles that the model and the datasets are made for. answers: those of the quick start, "
        "which one reply solves. tools: those of the pipeline `tools`, most of which need a tool or several turns. "
        "pictures: those of the pipeline `quickstart-vision`, five families about drawn pictures and two of text.",
    )
    steps: Count = Field(
        default=800, description="Number of optimizer steps. The switch and the learning rates follow this number."
    )
    batch_tokens: Count = Field(
        default=2048, description="Number of tokens in a step, with padding, over all processes together."
    )
    processes: Annotated[int, Field(ge=1, le=8)] = Field(
        default=2, description="Number of data-parallel training processes, with one thread each."
    )
    muon_learning_rate: Positive = Field(
        default=0.03, description="Highest learning rate of Muon, which trains the matrices inside the layers."
    )
    adam_learning_rate: Positive = Field(
        default=4e-3,
        description="Highest learning rate of AdamW, which trains the embeddings, the head, the routers and the norms.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=20, description="Number of steps over which both learning rates rise from 0 in a line."
    )
    decay_share: Probability = Field(
        default=0.5, description="Both learning rates fall in a line over this last share of the steps."
    )
    balance_coefficient: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="Weight of the load-balance loss, which pushes all experts towards the same load."
    )
    max_grad_norm: Positive = Field(
        default=1.0, description="A gradient whose norm is larger is scaled down to this norm."
    )
    cache: bool = Field(
        default=True,
        description="Reuse a base model that was trained earlier with the same config, seed, code and torch version.",
        json_schema_extra=RESULT_STAYS,
    )
    trackers: TrackersConfig | None = Field(
        default=None,
        description="Where metrics go besides metrics.jsonl. If this is left out, the pipeline's `trackers` apply.",
        json_schema_extra=RESULT_STAYS,
    )
    model: ModelSizes = Field(default_factory=ModelSizes)
    sets: SetSizes = Field(default_factory=SetSizes)
    text: TextConfig = Field(default_factory=TextConfig)

    @model_validator(mode="after")
    def _text_fits(self) -> "StageConfig":
        if self.puzzles == "tools" and (self.text.plain_share or self.text.rate_share):
            raise ValueError(
                f"puzzles: tools has neither plain documents nor ratings; set text.plain_share (got "
                f"{self.text.plain_share:g}) and text.rate_share (got {self.text.rate_share:g}) to 0"
            )
        if self.puzzles == "pictures" and self.text.plain_share:
            raise ValueError(
                f"puzzles: pictures has no plain documents; set text.plain_share (got {self.text.plain_share:g}) to 0"
            )
        return self

    @model_validator(mode="after")
    def _documents_fit(self) -> "StageConfig":
        if self.batch_tokens < MIN_BATCH_TOKENS * self.processes:
            raise ValueError(
                f"batch_tokens: got {self.batch_tokens} for {self.processes} processes; give at least "
                f"{MIN_BATCH_TOKENS} for each, {MIN_BATCH_TOKENS * self.processes} in all"
            )
        return self
