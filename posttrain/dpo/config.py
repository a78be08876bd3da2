"""The config of the stage `dpo`, direct preference optimization. configs/dpo.yaml is an example."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import MAY_GROW, RESULT_STAYS, Config
from posttrain.config.data import DataConfig
from posttrain.config.fields import PathText, Positive
from posttrain.config.held_out import HeldOutConfig, check_held_out
from posttrain.config.images import TrainedImagesConfig, check_trained_images
from posttrain.config.models import TunedModelConfig
from posttrain.config.resources import TrainerResources
from posttrain.config.trackers import TrackersConfig
from posttrain.config.training import GradientCheckpointing, LoraConfig, OptimizerConfig, ParallelConfig

Count = Annotated[int, Field(ge=1)]


class DpoResources(Config):
    """The processes that the stage starts."""

    trainer: TrainerResources = Field(default_factory=TrainerResources)


class MiningConfig(Config):
    """How preference pairs are made from the rollouts of an RL stage. Example: `mining: {min_margin: 0.3}`."""

    min_margin: Positive = Field(default=0.5, description="Smallest difference in reward between chosen and rejected.")
    max_per_prompt: Count = Field(default=1, description="Most pairs from one prompt; no reply is used twice.")
    reasons: list[Literal["wrong", "truncated"]] = Field(
        default_factory=lambda: ["wrong", "truncated"],
        min_length=1,
        description="What may be rejected. wrong: a complete reply with a lower reward; truncated: one out of tokens.",
    )


class DpoOptimizerConfig(OptimizerConfig):
    """AdamW. The default learning rate is a tenth of that of supervised fine-tuning."""

    learning_rate: Positive = 1e-6


class DpoConfig(Config):
    """Direct preference optimization on given pairs, or on pairs that are mined from rollouts."""

    model: TunedModelConfig
    pairs: DataConfig | None = Field(None, description="Files of pairs; each row has prompt, chosen and rejected.")
    rollouts: PathText | None = Field(
        None, description="Folder of the rollouts of an RL stage, such as ${rl.rollouts}."
    )
    mining: MiningConfig = Field(default_factory=MiningConfig)
    max_pairs: Count | None = Field(
        None, description="Train on at most this many pairs; mined pairs are taken from all capabilities in turn."
    )
    held_out: HeldOutConfig | None = Field(
        None, description="Pairs that are not trained on and on which the loss is measured during the training."
    )
    beta: Positive = Field(0.1, description="How strongly the policy is held near the start policy.")
    loss_type: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = Field(
        "sigmoid",
        description="sigmoid: DPO; sigmoid_norm: DPO with scores divided by reply length; hinge: SLiC; ipo: IPO.",
    )
    nll_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of a supervised loss on the chosen reply, which keeps its probability from falling."
    )
    images: TrainedImagesConfig | None = Field(
        None,
        description="Train a multimodal Llama 4, on pairs with pictures in their prompts and without; {} takes "
        "pictures from the folder of the data file, and those of mined pairs from the RL stage. null: text only.",
    )
    lora: LoraConfig | None = Field(None, description="Train low-rank adapters instead of all weights.")
    optimizer: DpoOptimizerConfig = Field(default_factory=DpoOptimizerConfig)
    epochs: Count = Field(
        1, description="Passes over the pairs. Light preference optimization needs one.", json_schema_extra=MAY_GROW
    )
    batch_size: Count = Field(8, description="Pairs in each forward and backward.")
    gradient_accumulation: Count = Field(1, description="Forwards and backwards in each optimizer step, on each rank.")
    max_length: Annotated[int, Field(ge=2)] = Field(4096, description="Most tokens of a prompt and its longer reply.")
    overlong: Literal["error", "drop"] = Field("error", description="What to do with a pair that is longer.")
    gradient_checkpointing: GradientCheckpointing = "none"
    shared_prefixes: bool = Field(
        True,
        description="Run the prompt of a pair once for both replies. The result is the same. On a GPU, long prompts "
        "need FlexAttention, which torch compiles: false where it cannot.",
        json_schema_extra=RESULT_STAYS,
    )
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
    resources: DpoResources = Field(default_factory=DpoResources)

    @model_validator(mode="after")
    def _one_source(self) -> "DpoConfig":
        if (self.pairs is None) == (self.rollouts is None):
            raise ValueError("exactly one of pairs and rollouts must be set")
        check_held_out(self.held_out, self.model)
        check_trained_images(self.images, self.model, self.lora)
        return self
