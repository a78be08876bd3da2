"""Sections that name a model folder, and which code runs the model."""

from typing import Literal

from pydantic import Field

from posttrain.config.base import Config
from posttrain.config.fields import NotNegative, PathText
from posttrain.config.templates import ChatTemplateConfig


class ServedModelConfig(Config):
    """A Hugging Face model folder that an engine serves with its own model code."""

    path: PathText = Field(
        description="Folder with config.json, safetensors and a tokenizer; in a pipeline also ${stage.model}."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Data type of the weights and activations."
    )
    chat_template: ChatTemplateConfig | None = Field(
        default=None,
        description="The chat template, in prompts, training and the folder that is written; null: the model folder's.",
    )


class RouterConfig(Config):
    """How the routers of a native Llama 4 are kept from favouring a few experts during training. 0 switches a part off.

    Example: `router: {balance_loss: 0.01, z_loss: 0.001}`.
    """

    balance_loss: NotNegative = Field(
        default=0.0, description="Weight of the load-balance loss, which pushes all experts towards the same load."
    )
    z_loss: NotNegative = Field(
        default=0.0, description="Weight of the z-loss, which keeps the logits of the router small."
    )
    bias_rate: NotNegative = Field(
        default=0.0,
        description="How far each step moves a bias on the choice of every expert, up for experts with too little "
        "load and down for those with too much. The bias fades to 0 over the training, so the model that is exported "
        "needs none.",
    )


class ModelConfig(ServedModelConfig):
    """A Hugging Face model folder that is trained, and which code runs it."""

    implementation: Literal["native", "transformers"] = Field(
        default="native",
        description="Model code for Llama 4: our own, or that of transformers. Other architectures always use "
        "transformers.",
    )
    router: RouterConfig = Field(
        default_factory=RouterConfig, description="How experts are kept evenly loaded. Off by default."
    )


class TunedModelConfig(ModelConfig):
    """The model of a stage that may start from adapters and go on training them."""

    adapters: Literal["continue", "merge"] = Field(
        default="continue",
        description="What is done if `path` is a folder of adapters. continue: the same adapters are trained on, on "
        "their base. merge: they are added into their base, and the training starts from that whole model.",
    )
