"""Sections about training: the optimizer, the ranks, adapters, and what is kept for the backward pass."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.fields import Positive

GradientCheckpointing = Annotated[
    Literal["none", "full", "selective"],
    Field(
        description="What the backward pass computes again rather than keeping it in memory. none: nothing, which is "
        "fastest. full: whole layers, which saves most. selective: all of a layer but its matrix products and "
        "attention."
    ),
]

# The parts of a model with images: the encoder with its adapter, the projector, and the text model.
Part = Literal["vision", "projector", "text"]
PARTS: tuple[Part, ...] = get_args(Part)


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule. Example: `{learning_rate: 2e-5, schedule: cosine, warmup_steps: 20}`."""

    learning_rate: Positive = Field(default=1e-5, description="Learning rate at the end of the warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="How the learning rate goes on after the warm-up: it stays, or it falls to 0 at the last step in a "
        "line or a half cosine.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Number of steps over which the learning rate rises from 0 in a line."
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of AdamW's mean of the gradients, for each step."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Decay of AdamW's mean of the squared gradients, for each step."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Share of each weight, times the learning rate, that a step takes away."
    )
    max_grad_norm: Positive = Field(
        default=1.0, description="A gradient whose norm is larger is scaled down to this norm."
    )


class ParallelConfig(Config):
    """How training is spread over ranks, each with a DeepSpeed engine. The stage starts the ranks itself.

    Example: `{processes: 16, expert: 8, zero: 2}`: 16 ranks, and each copy of the experts divided over 8 of them.
    """

    processes: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="Number of ranks. Each rank takes rows of its own, so a step trains on that many times the rows.",
    )
    expert: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="Number of ranks over which one copy of the experts is divided (expert parallelism). It must "
        "divide both `processes` and the number of experts.",
    )
    zero: Annotated[int, Field(ge=0, le=3)] = Field(
        default=1,
        description="ZeRO stage, which says what the ranks divide among them. 0: nothing; 1: the optimizer state; "
        "2: the gradients too; 3: the weights too.",
    )
    offload: Literal["none", "optimizer"] = Field(
        default="none",
        description="optimizer keeps the optimizer state on the CPU and computes its step there; it needs zero 1 to 3.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "ParallelConfig":
        if self.processes % self.expert:
            raise ValueError(f"expert: got {self.expert}, which does not divide processes {self.processes}")
        if self.offload != "none" and self.zero == 0:
            raise ValueError("offload: optimizer needs zero: 1, 2 or 3 (with 0 no state is divided or moved)")
        return self


class AdaptersConfig(Config):
    """Low-rank adapters (LoRA) in place of training all weights. Example: `{rank: 8, alpha: 16, save: both}`.

    What is null is taken from the adapters that the training continues, else it has the default that is named.
    """

    rank: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Rank of each adapter. Default: 16.")
    alpha: Positive | None = Field(
        default=None, description="The output of an adapter is multiplied by alpha / rank. Default: 32."
    )
    target_modules: list[str] | None = Field(
        default=None,
        description="Names of the linear modules that get an adapter. Default: those of the attention, q_proj, k_proj, "
        "v_proj and o_proj.",
    )
    target_parameters: list[str] | None = Field(
        default=None,
        description="Names of weights that hold all experts in one tensor, such as experts.gate_up_proj. Each expert "
        "gets an adapter of its own. Default: none.",
    )

    save: Literal["merged", "adapter", "both"] = Field(
        default="merged",
        description="What the stage writes. merged: a whole model in model/. adapter: only the adapters in model/, in "
        "peft's format, on the base model.path. both: a whole model in model/ and the adapters in adapter/.",
    )

    @model_validator(mode="after")
    def _names_targets(self) -> "AdaptersConfig":
        if self.target_modules == [] and not self.target_parameters:
            raise ValueError(
                "target_modules and target_parameters are both empty; name at least one module or parameter to adapt"
            )
        if "lm_head" in (self.target_modules or ()):
            raise ValueError(
                "target_modules: got lm_head: log-probabilities are computed from the head's weight and not by its "
                "layer, so an adapter of it would never be used; leave it out"
            )
        return self

    def filled(self, start: "AdaptersConfig | None" = None) -> Self:
        """The section without nulls. start: the section that describes the adapters that are continued."""
        return self.model_copy(
            update={
                name: getattr(start, name) if start is not None else default
                for name, default in _LORA_DEFAULTS.items()
                if getattr(self, name) is None
            }
        )


class LoraConfig(AdaptersConfig):
    """Adapters whose training may drop some of their inputs."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Share of an adapter's inputs that is set to 0 in training."
    )

    @model_validator(mode="after")
    def _fits(self) -> "LoraConfig":
        if self.target_parameters and self.dropout > 0:
            raise ValueError(
                f"dropout: got {self.dropout} with target_parameters; adapters of experts are added to the weight, "
                "which no dropout goes through: set dropout: 0.0"
            )
        return self


_LORA_DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "alpha": 32.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": [],
}
