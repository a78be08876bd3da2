"""The section `trackers`: where metrics go besides metrics.jsonl."""

from typing import Literal

from pydantic import Field

from posttrain.config.base import Config


class TrackioConfig(Config):
    """Metrics to trackio, which stores them on this machine unless its own environment variables say otherwise."""

    project: str = Field(min_length=1, description="Name of the project. Each stage is a run in it, called RUN-STAGE.")


class WandbConfig(Config):
    """Metrics to Weights & Biases."""

    project: str = Field(
        min_length=1,
        description="Name of the project. Each stage is a run in it, called RUN-STAGE, in the group RUN.",
    )
    mode: Literal["offline", "online"] = Field(
        default="offline",
        description="offline writes into the stage's folder and sends nothing; online sends to the service.",
    )


class TrackersConfig(Config):
    """Where metrics go besides metrics.jsonl. Example: `{tensorboard: true, trackio: {project: mine}}`."""

    tensorboard: bool = Field(
        default=False, description="Write TensorBoard event files into the folder tensorboard/ of the stage."
    )
    trackio: TrackioConfig | None = Field(default=None, description="Send metrics to trackio; null does not.")
    wandb: WandbConfig | None = Field(default=None, description="Send metrics to Weights & Biases; null does not.")

    @property
    def packages(self) -> list[str]:
        """The packages of the trackers that are switched on. The extra of the same name installs each."""
        return [name for name in type(self).model_fields if getattr(self, name)]
