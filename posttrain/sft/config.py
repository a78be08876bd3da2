"""The config of the stage `sft`, supervised fine-tuning. configs/sft.yaml is an example."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import MAY_GROW, RESULT_STAYS, Config
from posttrain.config.data import DataConfig
from posttrain.config.held_out import HeldOutConfig, check_held_out
from posttrain.config.images import TrainedImagesConfig, check_trained_images
from posttrain.config.models import TunedModelConfig
from posttrain.config.resources import TrainerResources
from posttrain.config.trackers import TrackersConfig
from posttrain.config.training import GradientCheckpointing, LoraConfig, OptimizerConfig, ParallelConfig

Count = Annotated[int, Field(ge=1)]
DEFAULT_BATCH_SIZE = 8  # conversations, as in DPO


class SftResources(Config):
    """The processes that the stage starts."""

    trainer: TrainerResources = Field(default_factory=TrainerResources)


class SftConfig(Config):
    """Supervised fine-tuning on the assistant turns of conversations."""

    model: TunedModelConfig
    data: DataConfig
    held_out: HeldOutConfig | None = Field(
        None, description="Rows that are not trained on and on which the loss is measured during the training."
    )
    images: TrainedImagesConfig | None = Field(
        None,
        description="Train a multimodal Llama 4, on rows with pictures and without; {} takes pictures from the folder "
        "of the data file. null: text only, and of a multimodal model only the text model is trained and written.",
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters instead of all weights.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    epochs: Count = Field(
        1, description="Passes over the data. Light fine-tuning needs one.", json_schema_extra=MAY_GROW
    )
    packing: bool = Field(True, description="Put whole conversations side by side into rows of batch_tokens.")
    batch_tokens: Count | None = Field(
        None, description="With packing: tokens in each forward and backward, and so in each row; null: max_length."
    )
    batch_size: Count | None = Field(
        None, description="Without packing: conversations in each forward and backward; null: 8."
    )
    gradient_accumulation: Count = Field(1, description="Forwards and backwards in each optimizer step, on each rank.")
    max_length: Annotated[int, Field(ge=2)] = Field(4096, description="Most tokens of a conversation.")
    overlong: Literal["error", "drop"] = Field("error", description="What to do with a conversation that is longer.")
    gradient_checkpointing: GradientCheckpointing = "none"
    checkpoint_every: Count = Field(
        200, description="Optimizer steps between checkpoints.", json_schema_extra=RESULT_STAYS
    )
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig,
        description="The ranks that train, each with a DeepSpeed engine and with rows of its own. One by default.",
    )
    trackers: TrackersConfig | None = Field(
        default=None,
        description="Where metrics go besides metrics.jsonl. If this is left out, the pipeline's `trackers` apply.",
        json_schema_extra=RESULT_STAYS,
    )
    resources: SftResources = Field(default_factory=SftResources)

    @property
    def row_tokens(self) -> int | None:
        """Tokens of a row of packed conversations; None without packing."""
        return (self.batch_tokens or self.max_length) if self.packing else None

    @property
    def rows_of_a_batch(self) -> int:
        """Rows in each forward and backward."""
        return 1 if self.packing else self.batch_size or DEFAULT_BATCH_SIZE

    @model_validator(mode="after")
    def _fits(self) -> "SftConfig":
        if self.packing and self.batch_size is not None:
            raise ValueError("packing: true takes batch_tokens and no batch_size; set packing: false, or batch_tokens")
        if not self.packing and self.batch_tokens is not None:
            raise ValueError("packing: false takes batch_size and no batch_tokens; set packing: true, or batch_size")
        if self.gradient_checkpointing == "selective" and self.lora and self.parallel.zero == 3:
            raise ValueError(
                "gradient_checkpointing: got selective with lora and parallel.zero 3, for which TRL always uses full "
                "checkpointing; set it to full, or parallel.zero to 0, 1 or 2"
            )
        if self.batch_tokens is not None and self.batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens {self.batch_tokens} is less than max_length {self.max_length}")
        check_trained_images(self.images, self.model, self.lora)
        check_held_out(self.held_out, self.model)
        return self
