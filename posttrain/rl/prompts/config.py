"""The keys of an RL stage that say which prompts are drawn: the mixture, the profile, the curriculum."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.shared import NotNegative, PathText, Positive, Probability
from posttrain.rl.grading.config import GradingConfig

# Schedules of the curriculum that need no function.
SCHEDULES = ("constant", "linear", "adaptive")


def check_band(band: list[float]) -> list[float]:
    """A band of pass rates; raises ValueError if it is none."""
    if len(band) != 2 or band[0] > band[1]:
        raise ValueError("must be [lowest, highest] with lowest <= highest")
    return band


class ProfileConfig(Config):
    """pass@k profile of the prompts with the starting policy, and the band of pass rates that is trained on."""

    samples: Annotated[int, Field(ge=1)] = Field(default=8, description="Replies sampled for each prompt.")
    prompts: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Profile only so many prompts.")
    band: list[Probability] = Field(
        default_factory=lambda: [0.1, 0.7], description="Lowest and highest pass rate that is medium to hard."
    )

    store: PathText | None = Field(
        default=None,
        description="Folder of profiles that runs share: what one measured of the same policy, reward, sampling and "
        "prompt is reused, and what is new is added. None: only this run's own.",
    )

    @field_validator("band")
    @classmethod
    def _is_band(cls, band: list[float]) -> list[float]:
        return check_band(band)


class CurriculumConfig(Config):
    """Sampling of prompts by how likely their pass rate lies in a band, which moves from `first` to `last`."""

    schedule: str = Field(
        default="linear",
        description="How the band moves: constant (not at all), linear (with the steps), adaptive (with the pass "
        "rate), or a function of yours, path/to/file.py:function or package.module:function.",
    )
    first: list[Probability] = Field(
        default_factory=lambda: [0.2, 0.8], description="Lowest and highest pass rate at the start."
    )
    last: list[Probability] = Field(
        default_factory=lambda: [0.05, 0.6], description="Lowest and highest pass rate at the end."
    )
    half_life: Positive = Field(
        default=20.0, description="Optimizer steps after which what was seen of a prompt counts by half."
    )
    tries: Annotated[int, Field(ge=1)] = Field(
        default=32, description="Prompts looked at for one that is in the band, before the nearest is taken."
    )
    reprobe_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="Largest share of draws, on average, that goes to prompts parked as impossible."
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
                raise ValueError(f"{error}; there are: {', '.join(SCHEDULES)}, or a function of yours") from None
        return schedule

    @field_validator("first", "last")
    @classmethod
    def _is_band(cls, band: list[float]) -> list[float]:
        return check_band(band)


class RefilterConfig(Config):
    """Fresh pass rates from the policy that is trained, beside the training, of prompts whose estimate is stale."""

    every: Annotated[int, Field(ge=1)] = Field(default=10, description="Optimizer steps between two refreshes.")
    prompts: Annotated[int, Field(ge=1)] = Field(default=32, description="Prompts probed in one refresh.")
    samples: Annotated[int, Field(ge=1)] = Field(default=4, description="Replies sampled for each of them.")


class PromptsConfig(GradingConfig):
    """Which prompts are drawn."""

    mixture: dict[str, NotNegative] = Field(
        default_factory=dict,
        description="Share of each capability in every batch, 0 for none; empty: as in the selected prompts.",
    )
    mixture_refills: Annotated[int, Field(ge=0)] = Field(
        default=4,
        description="A dropped group is replaced by one of its capability so often; then another takes its place.",
    )
    curriculum: CurriculumConfig | None = Field(
        default=None, description="Draw prompts by difficulty; None: each once, before any comes again."
    )
    refilter: RefilterConfig | None = Field(
        default=None, description="Refresh the curriculum's estimates during training; None: by training alone."
    )
    profile: ProfileConfig = Field(default_factory=ProfileConfig)

    @field_validator("mixture")
    @classmethod
    def _gives_something(cls, mixture: dict[str, float]) -> dict[str, float]:
        if mixture and not any(mixture.values()):
            raise ValueError("every share is 0, so nothing would be trained on; give one capability more, or none")
        return mixture

    @model_validator(mode="after")
    def _check_refilter(self) -> "PromptsConfig":
        if self.refilter is not None and self.curriculum is None:
            raise ValueError(
                "refilter: refreshes the estimates that a curriculum draws by, and there is none; set curriculum too "
                "(curriculum: {schedule: constant} keeps one band), or remove refilter"
            )
        return self
