"""Config of the `filter` stage, in which a judge rates how hard each supervised row is and the easy ones are
dropped.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from posttrain.config.base import Config
from posttrain.config.data import DataConfig, DedupConfig, EvaluationSetsConfig
from posttrain.config.images import ImagesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.judging.config import EndpointConfig, JudgeQuestion


class FilterResources(Config):
    """Resources of the filter stage, whose only model is the judge."""

    judge: ActorResources | None = Field(
        default_factory=ActorResources,
        description="Engines that serve the judge, and what each asks for; null if the judge is an endpoint.",
    )


class JudgeEndpoint(Config):
    """A judge on a server of its own.

    judge: {endpoint: {base_url: "http://127.0.0.1:8000/v1", model: judge-70b}}
    """

    endpoint: EndpointConfig = Field(description="The server, and the name of the model there.")


def _has_endpoint(judge: object) -> bool:
    """Whether the section `judge`, raw or validated, names an endpoint."""
    return isinstance(judge, JudgeEndpoint) or (isinstance(judge, Mapping) and judge.get("endpoint") is not None)


def _one_form(judge: object) -> Any:
    """Either a model folder or an endpoint; raises ValueError for both and for neither. Unknown keys are told later."""
    if not isinstance(judge, Mapping) or set(judge) - {*ServedModelConfig.model_fields, "endpoint"}:
        return judge
    form = (
        "give one: path is the folder of a model that engines of this stage serve, endpoint is a server that already "
    )
    form += "runs"
    if _has_endpoint(judge) and set(judge) != {"endpoint"}:
        raise ValueError(f"has both {min(set(judge) - {'endpoint'})} and endpoint; {form}")
    if not _has_endpoint(judge) and judge.get("path") is None:
        raise ValueError(f"has neither path nor endpoint; {form}")
    return judge


class FilterConfig(JudgeQuestion):
    """The `filter` stage: rate every row with a judge and keep the hardest."""

    judge: Annotated[
        Annotated[ServedModelConfig, Tag("Model")] | Annotated[JudgeEndpoint, Tag("Endpoint")],
        Discriminator(lambda judge: "Endpoint" if _has_endpoint(judge) else "Model"),
        BeforeValidator(_one_form),
    ] = Field(
        description="The model that rates, an instruction-tuned one with a chat template: a model folder (path, dtype) "
        "that engines of this stage serve, or endpoint."
    )
    data: DataConfig = Field(description="The supervised rows to rate; each ends with an assistant turn.")
    images: ImagesConfig | None = Field(
        default=None,
        description="The pictures of rows, which the judge is shown before its question; null: rows have none. A judge "
        "on engines must be a multimodal Llama 4.",
    )
    dedup: DedupConfig | None = Field(
        default=None,
        description="Before the judge sees them, remove rows that repeat an earlier one; null removes none.",
    )
    decontaminate: EvaluationSetsConfig | None = Field(
        default=None,
        description="Before the judge sees them, remove rows that contain text of evaluation sets; null removes none.",
    )
    keep_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5,
        description="Share of the rows that is kept, the hardest ones: exactly round(keep_fraction * rows) rows.",
    )
    stratify: bool = Field(
        default=True,
        description="Keep the same share of every capability, and within one of every modality (text, one picture, "
        "several), to within one row, so that a kind of rows that are all easy stays in the data. false keeps the "
        "hardest rows, whatever they are about.",
    )
    resources: FilterResources = Field(
        default_factory=FilterResources, description="CPUs and GPUs of the judge's engines."
    )

    @property
    def source(self) -> ServedModelConfig | EndpointConfig:
        """Where the judge runs."""
        return self.judge.endpoint if isinstance(self.judge, JudgeEndpoint) else self.judge

    @classmethod
    def has_endpoint(cls, data: Mapping[str, object]) -> bool:
        """Whether the config, as it was written, names an endpoint."""
        return _has_endpoint(data.get("judge"))

    @model_validator(mode="before")
    @classmethod
    def _no_engines_with_an_endpoint(cls, data: object) -> Any:
        """The default resources are those of a judge on engines only."""
        if isinstance(data, Mapping) and cls.has_endpoint(data):
            resources = data.get("resources", {})
            if isinstance(resources, Mapping) and "judge" not in resources:
                return {**data, "resources": {**resources, "judge": None}}
        return data

    @model_validator(mode="after")
    def _resources_fit(self) -> "FilterConfig":
        if isinstance(self.judge, JudgeEndpoint) and self.resources.judge is not None:
            raise ValueError("resources.judge: an endpoint needs no engines; remove resources.judge, or endpoint")
        if isinstance(self.judge, ServedModelConfig) and self.resources.judge is None:
            raise ValueError("resources.judge: got null, but engines serve judge.path; remove it for the defaults")
        return self
