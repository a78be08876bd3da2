"""The keys of an RL stage that say how the policy is trained: steps, optimizer, ranks, and what happens on failures."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import MAY_GROW, RESULT_STAYS
from posttrain.config.fields import Positive
from posttrain.config.images import TrainedImagesConfig, check_trained_images
from posttrain.config.training import AdaptersConfig, GradientCheckpointing, OptimizerConfig, ParallelConfig
from posttrain.model.adapter_start import continues
from posttrain.rl.grading.config import GradingConfig


class TrainingConfig(GradingConfig):
    """How the policy is trained."""

    steps: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Number of optimizer steps.", json_schema_extra=MAY_GROW
    )
    trainer_deadline_s: Positive = Field(
        default=1800.0,
        description="Seconds that a step or a checkpoint may take. If one takes longer, the trainer counts as lost.",
    )
    trainer_restarts: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="How many times a lost trainer is started again from the last checkpoint before the stage fails.",
    )
    on_nonfinite: Literal["skip", "stop"] = Field(
        default="skip",
        description="What to do when a loss or gradient is not finite. skip: leave out this update and go on. stop: "
        "end the stage. In both cases the rollouts that caused it are kept under evidence/.",
    )
    max_skipped: Annotated[int, Field(ge=1)] = Field(
        default=5, description="With on_nonfinite: skip, the stage ends after this many skipped updates in a row."
    )
    lora: AdaptersConfig | None = Field(
        default=None,
        description="Train low-rank adapters instead of all weights. Engines are sent weights with the adapters added.",
    )
    images: TrainedImagesConfig | None = Field(
        default=None,
        description="Train a multimodal Llama 4, on prompts with pictures and without; {} takes pictures from the "
        "folder of the data file. null: text only, and of a multimodal model only the text model is trained.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig,
        description="The trainer's ranks. They share the rollouts of each step. A run that was interrupted may go on "
        "with others, unless it is deterministic.",
        json_schema_extra=RESULT_STAYS,
    )
    micro_batch_tokens: Annotated[int, Field(ge=64)] = Field(
        default=8192,
        description="Largest number of tokens in one forward pass of a rank. What rollouts share, such as the prompt "
        "of a group, counts once; padding counts for a model that cannot share it.",
    )
    gradient_checkpointing: GradientCheckpointing = "none"
    shared_prefixes: bool = Field(
        default=True,
        description="Run what rollouts have in common, such as the prompt of a group, once in each forward. The result "
        "is the same. On a GPU, long prompts need FlexAttention, which torch compiles: false where it cannot.",
        json_schema_extra=RESULT_STAYS,
    )

    @model_validator(mode="after")
    def _check_training(self) -> "TrainingConfig":
        check_trained_images(self.images, self.model, self.lora)
        has_process = self.resources.reference is not None
        if (self.loss.reference is None and has_process) or (self._needs_reference_process and not has_process):
            raise ValueError(
                "loss.reference and resources.reference go together: the penalty, and the CPUs and GPUs of the process "
                "that holds the reference policy; set both or none. Only the reference of a training with `lora` that "
                "has no loss.reference.path and no model.router.bias_rate needs no process: it is the policy without "
                "its new adapters, or with continued ones as they were"
            )
        if self.weights.backend == "ipc" and self.parallel.processes > 1:
            raise ValueError(f"weights.backend: ipc needs parallel.processes 1, got {self.parallel.processes}")
        return self

    @property
    def _needs_reference_process(self) -> bool:
        """Whether the reference is another model than the policy with its adapters off, or as they were."""
        reference = self.loss.reference
        if reference is None:
            return False
        trains_all = self.lora is None and not continues(self.model)
        return trains_all or reference.path is not None or self.model.router.bias_rate > 0
