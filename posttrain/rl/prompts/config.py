"""The keys of an RL stage that choose prompts: mixture of capabilities, selection and profile."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from posttrain.config.base import Config
from posttrain.config.fields import NotNegative, PathText, Positive, Probability
from posttrain.config.images import Modality
from posttrain.rl.grading.config import GradingConfig

# Keys of earlier versions, and what to write instead.
GONE = {
    "curriculum": "prompts are drawn by beliefs about their pass rates without it; remove it, or set "
    "selection.half_life for curriculum.half_life",
    "refilter": "every group that is trained on or dropped renews the belief about its prompt; remove it, or set a "
    "shorter selection.half_life",
}
FIRST_REPLIES = 2  # of a group, as selection.first_replies: auto has it; the fewest that can differ


class ProfileConfig(Config):
    """The pass@k profile: before training, the starting policy answers each prompt several times.

    It tells how hard the prompts are, and the selection begins with what it found. Example: `{samples: 8}`.
    """

    samples: Annotated[int, Field(ge=1)] = Field(default=8, description="Number of replies sampled for each prompt.")
    prompts: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Number of prompts to profile; null profiles all."
    )
    band: list[Probability] | None = Field(
        default=None,
        description="Lowest and highest pass rate of a prompt that is trained on. Example: [0.1, 0.7]. Prompts "
        "outside of it, and those that are not profiled, are never drawn, however much the policy learns. null leaves "
        "out none.",
    )
    store: PathText | None = Field(
        default=None,
        description="Folder in which runs share their profiles. A pass rate that another run measured with the same "
        "policy, reward, sampling and prompt is reused, and new ones are added. null shares nothing.",
    )

    @field_validator("band")
    @classmethod
    def _is_band(cls, band: list[float] | None) -> list[float] | None:
        if band is not None and (len(band) != 2 or band[0] > band[1]):
            raise ValueError("must be [lowest, highest] with lowest <= highest")
        return band


class SelectionConfig(Config):
    """Which prompt is drawn next. Example: `{predictor: level}`."""

    draw: Literal["beliefs", "in_turn"] = Field(
        default="beliefs",
        description="beliefs: prompts whose groups will probably have an advantage, by the replies so far. in_turn: "
        "every prompt once before any is drawn again.",
    )
    half_life: Positive = Field(
        default=20.0,
        description="Number of optimizer steps after which an observed reply has half its weight in the belief about "
        "its prompt's pass rate.",
    )
    predictor: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="A field of the rows that tells about their difficulty, such as a level or a judge's label. A "
        "prompt that was not seen yet is expected to be like those with the same value. null: like all of its "
        "capability.",
    )

    first_replies: Annotated[int, Field(ge=2)] | Literal["auto"] | None = Field(
        default="auto",
        description="A group begins with so many replies. If they are equal, and the beliefs say that the others would "
        "hardly make a difference, it is dropped; else the others are sampled. A group that they could not end is "
        "sampled whole at once. auto: 2, where groups are larger and may be dropped by their first replies (not with "
        "draw: in_turn, drop_zero_advantage: false, deterministic, or a larger min_group). null samples every group "
        "whole.",
    )

    @model_validator(mode="after")
    def _check_draw(self) -> "SelectionConfig":
        if self.draw == "in_turn" and self.predictor is not None:
            raise ValueError(
                f"draw: in_turn takes every prompt in turn, so predictor {self.predictor!r} would have no effect; set "
                "draw: beliefs, or remove predictor"
            )
        if self.draw == "in_turn" and isinstance(self.first_replies, int):
            raise ValueError(
                f"first_replies ({self.first_replies}) needs the beliefs, which draw: in_turn does without; set draw: "
                "beliefs, or remove first_replies"
            )
        return self


class ModalityCurriculumConfig(Config):
    """How the shares of modalities follow what each still learns. Example: `{floor: 0.3}`."""

    floor: Probability = Field(
        default=0.5,
        description="The least share of a modality, as a part of its share in modalities. The rest goes to modalities "
        "whose replies pass more often, or more rarely, than the beliefs about their prompts expect.",
    )
    half_life: Positive = Field(
        default=8.0, description="Number of optimizer steps after which what a modality learned counts half."
    )


class PromptsConfig(GradingConfig):
    """Which prompts are drawn, and how often."""

    mixture: dict[str, NotNegative] = Field(
        default_factory=dict,
        description="Share of each capability in every batch; 0 leaves a capability out. An empty mixture keeps the "
        "shares of the selected prompts. Example: {math: 0.7, code: 0.3}.",
    )
    modalities: dict[Modality, NotNegative] = Field(
        default_factory=dict,
        description="Share of each modality in every batch: text, image (prompts with one picture), multi-image. 0 "
        "leaves one out. Within a modality the capabilities have their shares of mixture. Empty: the modalities have "
        "no quota. Example: {text: 0.4, image: 0.4, multi-image: 0.2}.",
    )
    modality_curriculum: ModalityCurriculumConfig | None = Field(
        default=None,
        description="Move the shares of modalities by measured progress: more of what still improves. null keeps them.",
    )
    mixture_refills: Annotated[int, Field(ge=0)] = Field(
        default=4,
        description="How many times in a row a dropped group is replaced by another of its capability. After that a "
        "group of another capability takes its place, so that one capability cannot hold up the training.",
    )
    selection: SelectionConfig = Field(default_factory=SelectionConfig)
    profile: ProfileConfig | None = Field(
        default=None,
        description="Measure the prompts before the training, for a report or to leave out those outside of a band; "
        "null starts the training at once, and learns from its groups.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_gone(cls, data: Any) -> Any:
        if isinstance(data, dict) and (found := [key for key in GONE if data.get(key) is not None]):
            raise ValueError("; ".join(f"{key} is no key any more: {GONE[key]}" for key in found))
        return {key: value for key, value in data.items() if key not in GONE} if isinstance(data, dict) else data

    @property
    def first_replies(self) -> int | None:
        """How many replies a group begins with; None: all of them. See `selection.first_replies`."""
        asked = self.selection.first_replies
        if asked != "auto":
            return asked
        may_stop = self.selection.draw == "beliefs" and self.drop_zero_advantage and not self.deterministic
        return FIRST_REPLIES if may_stop and self.min_group <= FIRST_REPLIES < self.group_size else None

    @model_validator(mode="after")
    def _check_first_replies(self) -> "PromptsConfig":
        first = self.selection.first_replies
        if not isinstance(first, int):
            return self
        if not self.min_group <= first < self.group_size:
            raise ValueError(
                f"selection.first_replies is {first}; it must be at least min_group ({self.min_group}) and less than "
                f"group_size ({self.group_size})"
            )
        if not self.drop_zero_advantage:
            raise ValueError(
                "selection.first_replies drops groups whose replies are equal, which drop_zero_advantage: false keeps; "
                "remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_modality_curriculum(self) -> "PromptsConfig":
        if self.modality_curriculum is None:
            return self
        if sum(share > 0 for share in self.modalities.values()) < 2:
            raise ValueError(
                f"modality_curriculum moves the shares of modalities, which has {self.modalities or 'none'}; give at "
                "least two of them a share, or remove modality_curriculum"
            )
        if self.selection.draw != "beliefs":
            raise ValueError(
                f"modality_curriculum needs the beliefs about prompts, which selection.draw: {self.selection.draw} "
                "does without; set draw: beliefs, or remove modality_curriculum"
            )
        return self

    @field_validator("mixture", "modalities")
    @classmethod
    def _gives_something(cls, shares: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        if shares and not any(shares.values()):
            what = "a capability" if info.field_name == "mixture" else "a modality"
            raise ValueError(
                f"every share is 0, so there would be no prompt to train on; give {what} more than 0, or remove "
                f"{info.field_name}"
            )
        return shares
