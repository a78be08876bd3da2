"""The keys of an RL stage that choose prompts: mixture of capabilities, profile, curriculum and refilter."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.fields import NotNegative, PathText, Positive, Probability
from posttrain.rl.grading.config import GradingConfig

# The built-in schedules of the curriculum. Any other name is that of a function which the user brings.
SCHEDULES = ("constant", "linear", "adaptive")


def check_band(band: list[float]) -> list[float]:
    """Return the band of pass rates. Raises ValueError unless it is [lowest, highest]."""
    if len(band) != 2 or band[0] > band[1]:
        raise ValueError("must be [lowest, highest] with lowest <= highest")
    return band


class ProfileConfig(Config):
    """The pass@k profile: before training, the starting policy answers each prompt several times.

    Prompts whose pass rate lies in `band` are trained on. Example: `{samples: 8, band: [0.1, 0.7]}`.
    """

    samples: Annotated[int, Field(ge=1)] = Field(default=8, description="Number of replies sampled for each prompt.")
    prompts: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Number of prompts to profile; null profiles all."
    )
    band: list[Probability] = Field(
        default_factory=lambda: [0.1, 0.7],
        description="Lowest and highest pass rate of a prompt that is trained on. The default selects prompts of "
        "medium to hard difficulty.",
    )

    store: PathText | None = Field(
        default=None,
        description="Folder in which runs share their profiles. A pass rate that another run measured with the same "
        "policy, reward, sampling and prompt is reused, and new ones are added. null shares nothing.",
    )

    @field_validator("band")
    @classmethod
    def _is_band(cls, band: list[float]) -> list[float]:
        return check_band(band)


class CurriculumConfig(Config):
    """Draw prompts whose pass rate probably lies in a band. During the training the band moves from `first` to `last`.

    Example: `{first: [0.2, 0.8], last: [0.05, 0.6]}` starts with easier prompts and ends with harder ones.
    """

    schedule: str = Field(
        default="linear",
        description="How the band moves. constant: it stays at `first`. linear: evenly over the steps. adaptive: with "
        "the measured pass rate. Or a function of your own, as path/to/file.py:function or package.module:function.",
    )
    first: list[Probability] = Field(
        default_factory=lambda: [0.2, 0.8], description="Lowest and highest pass rate of the band at the first step."
    )
    last: list[Probability] = Field(
        default_factory=lambda: [0.05, 0.6], description="Lowest and highest pass rate of the band at the last step."
    )
    half_life: Positive = Field(
        default=20.0,
        description="Number of optimizer steps after which an observed reply has half its weight in the estimate of "
        "its prompt's pass rate.",
    )
    tries: Annotated[int, Field(ge=1)] = Field(
        default=32,
        description="Number of prompts to consider in one draw. If none of them is in the band, the nearest is taken.",
    )
    reprobe_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05,
        description="Largest average share of the draws for prompts that are parked as impossible, to learn whether "
        "the policy can solve them by now.",
    )

    @field_validator("schedule")
    @classmethod
    def _is_schedule(cls, schedule: str) -> str:
        if schedule not in SCHEDULES:
            from posttrain.errors import PluginError
            from posttrain.scoring.plugins.lookup import check_function

            try:
                check_function(schedule, "schedule", ("step", "steps", "pass_rate", "position"))
            except PluginError as error:
                raise ValueError(f"{error}; choose {', '.join(SCHEDULES)}, or a function of your own") from None
        return schedule

    @field_validator("first", "last")
    @classmethod
    def _is_band(cls, band: list[float]) -> list[float]:
        return check_band(band)


class RefilterConfig(Config):
    """Measure pass rates again during the training: the current policy answers prompts whose estimate has become old.

    Example: `{every: 10, prompts: 32, samples: 4}` samples 128 replies every ten optimizer steps.
    """

    every: Annotated[int, Field(ge=1)] = Field(
        default=10, description="Number of optimizer steps from one refresh to the next."
    )
    prompts: Annotated[int, Field(ge=1)] = Field(default=32, description="Number of prompts that one refresh measures.")
    samples: Annotated[int, Field(ge=1)] = Field(
        default=4, description="Number of replies that a refresh samples for each of these prompts."
    )


class PromptsConfig(GradingConfig):
    """Which prompts are drawn, and how often."""

    mixture: dict[str, NotNegative] = Field(
        default_factory=dict,
        description="Share of each capability in every batch; 0 leaves a capability out. An empty mixture keeps the "
        "shares of the selected prompts. Example: {math: 0.7, code: 0.3}.",
    )
    mixture_refills: Annotated[int, Field(ge=0)] = Field(
        default=4,
        description="How many times in a row a dropped group is replaced by another of its capability. After that a "
        "group of another capability takes its place, so that one capability cannot hold up the training.",
    )
    curriculum: CurriculumConfig | None = Field(
        default=None,
        description="Draw prompts by difficulty; null draws every prompt once before any prompt is drawn again.",
    )
    refilter: RefilterConfig | None = Field(
        default=None,
        description="Measure the pass rates of the curriculum again during the training; null learns them only from "
        "the groups that are trained on.",
    )
    profile: ProfileConfig = Field(default_factory=ProfileConfig)

    @field_validator("mixture")
    @classmethod
    def _gives_something(cls, mixture: dict[str, float]) -> dict[str, float]:
        if mixture and not any(mixture.values()):
            raise ValueError(
                "every share is 0, so there would be no prompt to train on; give a capability more than 0, or remove "
                "mixture"
            )
        return mixture

    @model_validator(mode="after")
    def _check_refilter(self) -> "PromptsConfig":
        if self.refilter is not None and self.curriculum is None:
            raise ValueError(
                "refilter measures again the pass rates by which a curriculum draws prompts, but there is no "
                "curriculum; set curriculum too (curriculum: {schedule: constant} keeps one band), or remove refilter"
            )
        return self
