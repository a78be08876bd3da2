"""Sections about rows with pictures: where the pictures are, and which parts of a model they change."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.fields import PathText, Positive
from posttrain.config.models import ModelConfig
from posttrain.config.training import PARTS, AdaptersConfig, LoraConfig, Part

Modality = Literal["text", "image", "multi-image"]  # of a row: no picture, one, several


class ImagesConfig(Config):
    """The pictures of rows, which a multimodal Llama 4 is given. Example: `images: {root: pictures, max_images: 4}`."""

    root: PathText | None = Field(
        default=None,
        description="The folder that paths of pictures are relative to, and below which all pictures lie; null: the "
        "folder of the data file.",
    )
    max_images: Annotated[int, Field(ge=1)] = Field(default=8, description="Most pictures of a row.")


class TrainedImagesConfig(ImagesConfig):
    """As `ImagesConfig`, and how the parts of the model are trained. Example: `images: {freeze: [vision]}`."""

    freeze: list[Part] = Field(
        default_factory=list,
        description="Parts that are not trained: vision (the encoder with its adapter), projector, text.",
    )
    learning_rates: dict[Part, Positive] = Field(
        default_factory=dict,
        description="Learning rates of single parts at the end of the warm-up, in place of optimizer.learning_rate: "
        "{projector: 1e-4}.",
    )

    @model_validator(mode="after")
    def _trains_a_part(self) -> "TrainedImagesConfig":
        if set(self.freeze) >= set(PARTS):
            raise ValueError(f"freeze: got {', '.join(self.freeze)}, which is the whole model; leave a part to train")
        if both := [part for part in self.learning_rates if part in self.freeze]:
            raise ValueError(f"learning_rates: got {both[0]}, which freeze names too; remove it from one of them")
        return self


def check_trained_images(images: TrainedImagesConfig | None, model: ModelConfig, lora: AdaptersConfig | None) -> None:
    """Raise ValueError for a model or adapters that cannot be trained with pictures."""
    if images is None:
        return
    if model.implementation != "native":
        raise ValueError(
            f"images with model.implementation {model.implementation}; pictures need implementation: native"
        )
    if isinstance(lora, LoraConfig) and lora.dropout:
        raise ValueError(
            f"lora.dropout: got {lora.dropout} with images; dropout is drawn for each token of a row, and the tiles of "
            "a picture have none: set dropout: 0.0"
        )
    if lora is not None and lora.target_parameters and "text" in images.freeze:
        raise ValueError(
            f"lora.target_parameters: got {', '.join(lora.target_parameters)} with images.freeze: [text], to which the "
            "experts belong; set target_parameters: []"
        )
