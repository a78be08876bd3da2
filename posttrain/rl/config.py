"""The config of the RL stage: the sections of its rooms, all on one level of the YAML, and the keys of the loop.

Each room declares its keys in its own `config.py`, and its functions take that section:

    RolloutsConfig ◄── GradingConfig ◄─┬─ PromptsConfig ◄──┬── RlConfig
                                       └─ TrainingConfig ◄─┘

A section extends the one that the arrow points to. So a function of grading can read the keys of grading and of
rollouts, and a type checker refuses all others.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import RESULT_STAYS, Config
from posttrain.config.shared import DataConfig, NotNegative, Positive, Probability, TrackersConfig
from posttrain.rl.prompts.config import PromptsConfig
from posttrain.rl.training.config import TrainingConfig


class EvaluationConfig(Config):
    """Pass rates on prompts that are not trained on, of the policy of the time, beside the training."""

    data: DataConfig = Field(description="Held-out prompts: each ends with a user turn. `reward` scores the replies.")
    every: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Policy versions from one evaluation to the next; the first is of the start."
    )
    prompts: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Only so many of them, a fair share of each capability; None: all."
    )
    samples: Annotated[int, Field(ge=1)] = Field(default=1, description="Replies to each prompt.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Of these replies; 0: the likeliest. max_tokens is that of `sampling`."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="With a temperature above 0: only the likeliest tokens that together have this mass."
    )
    correct_threshold: Probability | None = Field(
        default=None, description="That of `reward`, which it must equal where it is given."
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvaluationConfig":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature is 0, so all {self.samples} samples of a prompt would be equal; set it above 0, or "
                "samples: 1"
            )
        return self


class RlConfig(TrainingConfig, PromptsConfig):
    """Asynchronous online RL: prompts in, a better policy out."""

    evaluation: EvaluationConfig | None = Field(
        default=None, description="Measure the policy on held-out prompts during training; None: not."
    )
    groups_per_step: Annotated[int, Field(ge=1)] = Field(
        default=32, description="Groups (prompts) trained on in a step."
    )
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        default=4, description="No token is trained on that is more versions old than this; 0 is strictly on-policy."
    )
    staleness: Literal["pace", "wait", "drop"] = Field(
        default="pace",
        description="How the bound is kept: as many groups are admitted as can be trained in time, and a batch waits "
        "for a slow one only at its last chance; every batch is the oldest groups; or groups too old are dropped.",
    )
    over_provision: NotNegative = Field(
        default=0.5,
        description="With max_staleness 0: at most so many batches of spare groups, as many as the measured share of "
        "dropped groups asks for, so that a batch need not wait for refills.",
    )
    checkpoint_every: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Optimizer steps between checkpoints.", json_schema_extra=RESULT_STAYS
    )
    stop_after_idle_steps: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Stop when so many batches' worth of groups in a row had no advantage."
    )
    parity_tolerance: Positive | None = Field(
        default=None,
        description="Largest mean gap of sampler and trainer log-probabilities; None: 1e-3 fp32, 0.1 bf16.",
    )
    trackers: TrackersConfig | None = Field(
        default=None,
        description="Where metrics go besides metrics.jsonl; absent: as the pipeline says, else nowhere.",
        json_schema_extra=RESULT_STAYS,
    )

    @model_validator(mode="after")
    def _check_deterministic(self) -> "RlConfig":
        if self.deterministic and (self.max_staleness or self.resources.rollout.workers > 1):
            raise ValueError(
                f"deterministic needs max_staleness 0 (got {self.max_staleness}) and resources.rollout.workers 1 "
                f"(got {self.resources.rollout.workers}): else the timing decides what is trained on"
            )
        if self.deterministic and (self.refilter is not None or self.evaluation is not None):
            raise ValueError(
                f"deterministic does not go with {'evaluation' if self.refilter is None else 'refilter'}: the timing "
                "decides beside which groups its replies are sampled; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> "RlConfig":
        if self.evaluation is None:
            return self
        if self.weights.backend != "shm":
            raise ValueError(
                f"evaluation needs weights.backend: shm (got {self.weights.backend}): an engine that evaluates leaves "
                "out the updates that come meanwhile"
            )
        given = self.evaluation.correct_threshold
        if given is not None and given != self.reward.correct_threshold:
            raise ValueError(
                f"evaluation.correct_threshold is {given:g} and reward.correct_threshold is "
                f"{self.reward.correct_threshold:g}: training and evaluation must mean the same by a right reply; set "
                f"reward.correct_threshold: {given:g}, or remove evaluation.correct_threshold"
            )
        return self
