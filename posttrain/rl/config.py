"""The config of the RL stage, which joins the sections of its rooms and adds the keys of the loop.

The YAML shows no rooms: all keys stand on one level. In the code each room declares its keys in its own `config.py`,
and the functions of a room take the section of that room:

    RolloutsConfig ◄── GradingConfig ◄─┬─ PromptsConfig ◄──┬── RlConfig
                                       └─ TrainingConfig ◄─┘

A section extends the section that the arrow points to. So a function of grading can read the keys of grading and of
rollouts, and the type checker refuses any other key.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import RESULT_STAYS, Config
from posttrain.config.data import DataConfig
from posttrain.config.fields import NotNegative, Positive, Probability
from posttrain.config.trackers import TrackersConfig
from posttrain.rl.prompts.config import PromptsConfig
from posttrain.rl.training.config import TrainingConfig


class EvaluationConfig(Config):
    """Measure the current policy on held-out prompts while the training goes on.

    Example: `{data: {path: heldout.jsonl}, every: 20, prompts: 100}`.
    """

    data: DataConfig = Field(
        description="Held-out prompts, each of which ends with a user turn. The section `reward` scores the replies."
    )
    every: Annotated[int, Field(ge=1)] = Field(
        default=20,
        description="Number of policy versions from one evaluation to the next. The first measures the starting "
        "policy.",
    )
    prompts: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Number of held-out prompts to use, with a fair share for each capability; null uses all.",
    )
    samples: Annotated[int, Field(ge=1)] = Field(default=1, description="Number of replies to each prompt.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Sampling temperature of these replies; 0 always takes the likeliest token. Their largest length "
        "is sampling.max_tokens.",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Sample only from the likeliest tokens whose probabilities add up to this. It has no effect at "
        "temperature 0.",
    )
    correct_threshold: Probability | None = Field(
        default=None, description="If given, it must equal reward.correct_threshold, which is what counts."
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> "EvaluationConfig":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature is 0, so all {self.samples} samples of a prompt would be equal; set a temperature above "
                "0, or samples: 1"
            )
        return self


class RlConfig(TrainingConfig, PromptsConfig):
    """Asynchronous online RL. Engines sample groups of rollouts while the trainer makes its steps."""

    evaluation: EvaluationConfig | None = Field(
        default=None,
        description="Measure the policy on held-out prompts during the training; null measures nothing.",
    )
    groups_per_step: Annotated[int, Field(ge=1)] = Field(
        default=32, description="Number of groups in an optimizer step. A group holds all rollouts of one prompt."
    )
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        default=4,
        description="Largest staleness of a token that is trained on, in policy versions. 0 is strictly on-policy.",
    )
    staleness: Literal["pace", "wait", "drop"] = Field(
        default="pace",
        description="How max_staleness is kept. pace: admit only as many groups as can be trained on in time; a batch "
        "waits for a slow group only when no later batch could take that group. wait: every batch is the oldest "
        "groups, so it waits for each of them. drop: groups that are too old are dropped.",
    )
    over_provision: NotNegative = Field(
        default=0.5,
        description="With max_staleness 0: most spare groups that are sampled beside a batch, in batches, so that the "
        "batch need not wait while dropped groups are replaced. How many are sampled follows from the measured share "
        "of dropped groups.",
    )
    checkpoint_every: Annotated[int, Field(ge=1)] = Field(
        default=20,
        description="Number of optimizer steps from one checkpoint to the next.",
        json_schema_extra=RESULT_STAYS,
    )
    stop_after_idle_steps: Annotated[int, Field(ge=1)] = Field(
        default=20,
        description="The run stops when this many batches of groups in a row are dropped because they teach nothing.",
    )
    parity_tolerance: Positive | None = Field(
        default=None,
        description="Largest allowed mean difference between the log-probabilities of sampler and trainer at the same "
        "weights; null means 1e-3 for float32 and 0.1 for bfloat16.",
    )
    trackers: TrackersConfig | None = Field(
        default=None,
        description="Where metrics go besides metrics.jsonl. If this is left out, the pipeline's `trackers` apply.",
        json_schema_extra=RESULT_STAYS,
    )

    @model_validator(mode="after")
    def _check_deterministic(self) -> "RlConfig":
        rollout = self.resources.rollout
        if self.deterministic and (self.max_staleness or rollout.most > 1):
            workers = f"min {rollout.least}, max {rollout.most}" if rollout.is_elastic else rollout.most
            raise ValueError(
                f"deterministic needs max_staleness 0 (got {self.max_staleness}) and resources.rollout.workers 1 "
                f"(got {workers}): otherwise timing decides which groups are trained on"
            )
        if self.deterministic and self.resources.trainer_threads is not None:
            raise ValueError(
                f"deterministic does not go with resources.trainer_threads ({self.resources.trainer_threads}): timing "
                "decides how many threads add up a sum; remove one of the two"
            )
        if self.deterministic and self.evaluation is not None:
            raise ValueError(
                "deterministic does not go with evaluation: timing decides which other replies are sampled in the same "
                "batch as its replies; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_waves(self) -> "RlConfig":
        if self.deterministic and isinstance(self.selection.first_replies, int):
            raise ValueError(
                "deterministic does not go with selection.first_replies: timing would decide which groups go on in the "
                "same wave; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> "RlConfig":
        if self.evaluation is None:
            return self
        if self.weights.backend != "shm":
            raise ValueError(
                f"evaluation needs weights.backend: shm (got {self.weights.backend}): an engine skips the new weights "
                "that come while it evaluates, and only shm lets it load the newest ones afterwards"
            )
        given = self.evaluation.correct_threshold
        if given is not None and given != self.reward.correct_threshold:
            raise ValueError(
                f"evaluation.correct_threshold is {given:g} and reward.correct_threshold is "
                f"{self.reward.correct_threshold:g}: training and evaluation must mean the same by a right reply; set "
                f"reward.correct_threshold: {given:g}, or remove evaluation.correct_threshold"
            )
        return self
