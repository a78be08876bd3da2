"""Schema of the `filter` stage: a judge rates how hard each supervised row is, and the easy majority goes."""

from typing import Annotated

from pydantic import Field

from posttrain.config.base import Config
from posttrain.config.shared import ActorResources, DataConfig, ServedModelConfig
from posttrain.judging.config import JudgeQuestion


class FilterResources(Config):
    """Who needs what: the judge is the only model of this stage."""

    judge: ActorResources = Field(default_factory=ActorResources, description="Engines that serve the judge.")


class FilterConfig(JudgeQuestion):
    """The `filter` stage: rate every row with a judge and keep the hardest."""

    judge: ServedModelConfig = Field(description="The model that rates; an instruction-tuned one with a chat template.")
    data: DataConfig = Field(description="Supervised rows: each ends with an assistant turn.")
    keep_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5,
        description="Share of the rows that stays, the hardest; exactly round(keep_fraction * rows) of them.",
    )
    stratify: bool = Field(default=True, description="Keep the same share of every capability.")
    resources: FilterResources = Field(default_factory=FilterResources)
