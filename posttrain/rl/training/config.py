"""The keys of an RL stage that say how the policy is trained: steps, optimizer, ranks, and what a bad update does."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import MAY_GROW
from posttrain.config.shared import GradientCheckpointing, OptimizerConfig, ParallelConfig, Positive
from posttrain.rl.grading.config import GradingConfig


class TrainingConfig(GradingConfig):
    """How the policy is trained."""

    steps: Annotated[int, Field(ge=1)] = Field(default=100, description="Optimizer steps.", json_schema_extra=MAY_GROW)
    trainer_deadline_s: Positive = Field(
        default=1800.0, description="A step or checkpoint of the trainer that takes longer means that it is lost."
    )
    trainer_restarts: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Start a trainer that died again from the last checkpoint, so often, instead of ending."
    )
    on_nonfinite: Literal["skip", "stop"] = Field(
        default="skip",
        description="A loss or gradient that is not finite: leave that update out and go on, or stop at once. What it "
        "was computed from is kept under evidence/ either way.",
    )
    max_skipped: Annotated[int, Field(ge=1)] = Field(
        default=5, description="With on_nonfinite skip: stop when so many updates in a row were left out."
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="The trainer's ranks; all of them share each step's rollouts."
    )
    micro_batch_tokens: Annotated[int, Field(ge=64)] = Field(
        default=8192, description="Padded tokens of one forward pass."
    )
    gradient_checkpointing: GradientCheckpointing = "none"

    @model_validator(mode="after")
    def _check_training(self) -> "TrainingConfig":
        if (self.loss.reference is None) != (self.resources.reference is None):
            raise ValueError(
                "loss.reference and resources.reference go together: the penalty, and the CPUs and GPUs of the process "
                "that holds the reference policy; set both or none"
            )
        if self.weights.backend == "ipc" and self.parallel.processes > 1:
            raise ValueError(f"weights.backend: ipc needs parallel.processes 1, got {self.parallel.processes}")
        return self
