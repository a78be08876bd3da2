"""Sections about reward plug-ins, and the system instructions whose verifiers are rewards too."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from posttrain.config.base import RESULT_STAYS, Config
from posttrain.config.fields import PathText, Positive, Probability


class RewardFunctionConfig(Config):
    """A reward plug-in. Example: `{name: exact_match, args: {marker: "Answer:"}}`."""

    name: str = Field(
        description="Which function: a registered name (`posttrain rewards list`), package.module:function, or "
        "path/to/file.py:function."
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments that the function is called with."
    )


class RewardConfig(RewardFunctionConfig):
    """A reward plug-in, and the reward processes that run it."""

    python: PathText | None = Field(
        default=None,
        description="Another interpreter, in which the reward runs with packages of its own, such as "
        ".venv-other/bin/python (`posttrain environments install`). null: this one.",
    )
    workers: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Number of reward processes that score side by side."
    )
    timeout_s: Positive = Field(
        default=10.0,
        description="Seconds that the reward of one rollout may take. After that its process is killed, and the "
        "rollout is unscored.",
    )
    alarm_fraction: Probability = Field(
        default=0.2,
        description="The run raises an alarm when more than this share of the replies has no score: in the profile, "
        "over the groups of a step, and in an evaluation.",
        json_schema_extra=RESULT_STAYS,
    )
    correct_threshold: Probability = Field(
        default=0.5,
        description="A reply with at least this reward counts as right, wherever right replies are counted: in the "
        "profile, the selection of prompts, the metrics and evaluations.",
    )


class VerifierConfig(RewardFunctionConfig):
    """A reward plug-in that checks whether a reply follows a system instruction."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2,
        description="w in the reward (1 - w) R + w V, where R is the reward of the task and V that of the verifier.",
    )


class SystemInstruction(Config):
    """One system instruction and how often it is drawn. Example: `{text: "Answer briefly.", weight: 0.5}`."""

    text: str = Field(description="The text of the system turn; an empty text means that there is no system turn.")
    weight: Positive = Field(
        default=1.0, description="How often this instruction is drawn, relative to the weights of the others."
    )
    verifier: VerifierConfig | None = Field(
        default=None,
        description="A reward that checks replies to prompts which drew this instruction; null leaves only the reward "
        "of the task.",
    )

    @model_validator(mode="after")
    def _has_text(self) -> "SystemInstruction":
        if self.verifier is not None and not self.text:
            raise ValueError("verifier: an empty text is no system turn, so there is nothing to verify; remove it")
        return self


class SystemsConfig(Config):
    """The system instructions that are sampled for prompts which have no system turn of their own."""

    instructions: list[SystemInstruction] = Field(
        default_factory=list, description="The instructions to draw from; an empty list adds no system turn."
    )

    @model_validator(mode="after")
    def _distinct(self) -> "SystemsConfig":
        texts = [item.text for item in self.instructions]
        if len(set(texts)) != len(texts):
            raise ValueError("each instruction may appear once; give it a larger weight instead")
        return self
