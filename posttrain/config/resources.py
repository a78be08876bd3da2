"""Sections that say what the actors of a stage ask of the Ray cluster."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from posttrain.config.base import RESULT_STAYS, Config


class HostChoice(Config):
    """Which hosts of a cluster the actors of one role may run on. A local session has one host, and ignores it."""

    nodes: list[str] = Field(
        default=[],
        description="Host names or addresses; the actors run on these hosts only. Empty: on any host.",
        json_schema_extra=RESULT_STAYS,
    )
    labels: dict[str, str] = Field(
        default={},
        description="Labels that a host must have, as they were given to it by `ray start --labels`.",
        json_schema_extra=RESULT_STAYS,
    )
    spread: bool = Field(
        default=False,
        description="Place the actors on as many hosts as possible. false: where Ray finds room.",
        json_schema_extra=RESULT_STAYS,
    )
    pack: bool = Field(
        default=False,
        description="Place the actors on as few hosts as possible. false: where Ray finds room.",
        json_schema_extra=RESULT_STAYS,
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> "HostChoice":
        if self.spread and self.pack:
            raise ValueError("spread and pack are both true: actors are placed on many hosts or on few; remove one")
        return self

    @property
    def says_where(self) -> bool:
        """Whether it says anything about the hosts."""
        return bool(self.nodes or self.labels or self.spread or self.pack)


class ActorResources(HostChoice):
    """What the actors of one role ask of the Ray cluster. Example: `{workers: 2, cpus: 1, gpus: 1}` is two engines."""

    workers: Annotated[int, Field(ge=1)] = Field(default=1, description="Number of actors, one engine in each.")
    cpus: Annotated[float, Field(ge=0)] = Field(default=1.0, description="CPUs that Ray reserves for each actor.")
    gpus: Annotated[float, Field(ge=0)] = Field(default=0.0, description="GPUs that Ray reserves for each actor.")


class WorkerRange(Config):
    """How many engines a stage may have at a time. Example: `{min: 1, max: 8}`."""

    min: Annotated[int, Field(ge=1)] = Field(default=1, description="Engines that a run begins with, and always keeps.")
    max: Annotated[int, Field(ge=1)] = Field(description="Most engines.")
    forecast: bool = Field(
        default=False,
        description="After its first steps the run is simulated with each number of engines, and goes on with the "
        "best. false: only what steps measure decides.",
        json_schema_extra=RESULT_STAYS,
    )

    @model_validator(mode="after")
    def _in_order(self) -> "WorkerRange":
        if self.max <= self.min:
            raise ValueError(
                f"max is {self.max} and min is {self.min}: max must be above min; for a fixed number of engines write "
                f"workers: {self.min}"
            )
        return self


class RolloutResources(HostChoice):
    """What the engines of RL ask of the Ray cluster. Their number is fixed, or follows the need within a range."""

    workers: Annotated[int, Field(ge=1)] | WorkerRange = Field(
        default=1,
        description="Number of actors, one engine in each. `{min: 1, max: 8}`: engines join while the trainer waits "
        "for rollouts, and leave while they have nothing to do.",
        json_schema_extra=RESULT_STAYS,
    )
    cpus: Annotated[float, Field(ge=0)] = Field(default=1.0, description="CPUs that Ray reserves for each actor.")
    gpus: Annotated[float, Field(ge=0)] = Field(default=0.0, description="GPUs that Ray reserves for each actor.")

    @property
    def least(self) -> int:
        """Engines that a run begins with."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def most(self) -> int:
        """Most engines at a time."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def is_elastic(self) -> bool:
        """Whether their number may change."""
        return isinstance(self.workers, WorkerRange)

    @property
    def is_forecast(self) -> bool:
        """Whether a forecast chooses their number after the first steps."""
        return isinstance(self.workers, WorkerRange) and self.workers.forecast

    def fixed(self, workers: int) -> ActorResources:
        """The same for a fixed number of engines."""
        return ActorResources(**{**self.model_dump(exclude={"workers"}), "workers": workers})


class RewardResources(Config):
    """What the actor that holds all reward processes asks of the Ray cluster. It runs on the home host."""

    cpus: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="CPUs that Ray reserves for all reward processes together."
    )
    gpus: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="GPUs that Ray reserves for all reward processes together."
    )


class TrainerResources(HostChoice):
    """What each rank of a stage asks of the Ray cluster.

    Ranks run on the home host if it has what all of them ask for, and the section does not say where.
    """

    cpus: Annotated[float, Field(ge=0)] = Field(default=1.0, description="CPUs that Ray reserves for each rank.")
    gpus: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="GPUs that Ray reserves for each rank, at most 1."
    )

    @field_validator("gpus")
    @classmethod
    def _at_most_one(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError("a rank uses at most one GPU; to train on more GPUs raise parallel.processes")
        return gpus
