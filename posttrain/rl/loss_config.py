"""The section `loss` of an RL stage: the loss, its constants, and the penalty on the divergence from a reference.

Example: `loss: {name: grpo, clip_high: 0.3, reference: {weight: 0.01}}`.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.fields import NotNegative, PathText, Positive

_PPO = ("clip_low", "clip_high", "dual_clip")

# The constants of each loss. A constant that the chosen loss does not use must stay at its default.
CONSTANTS: dict[str, tuple[str, ...]] = {
    "dppo": ("divergence", "ratio_cap", "kl_weight"),
    "grpo": _PPO,
    "dr_grpo": _PPO,
    "cispo": ("cispo_cap",),
    "gspo": ("sequence_clip_low", "sequence_clip_high"),
    "tis": ("tis_cap",),
    "icepop": ("icepop_low", "icepop_high"),
    "decoupled": (*_PPO, "decoupled_cap"),
}


class ReferenceConfig(Config):
    """A penalty on the divergence of the policy from a frozen reference policy, as a term of the loss."""

    weight: Positive = Field(
        description="Weight of the penalty. The mean over the batch's tokens is multiplied by it and added to the loss."
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k2",
        description="Estimator of KL(policy, reference). In expectation, k2 has the gradient of KL(policy, reference), "
        "k3 (used by GRPO) that of KL(reference, policy), and k1 none.",
    )
    ratio_cap: Positive | None = Field(
        default=20.0,
        description="The penalty of each token is weighted by the ratio policy / sampler, but by no more than this; "
        "null uses no weights.",
    )
    path: PathText | None = Field(
        default=None,
        description="Model folder of the reference; null uses model.path, the policy that training starts from.",
    )


class LossConfig(Config):
    """The loss, by its name in `posttrain.rl.losses.LOSSES`, its constants, and the settings that fit any loss."""

    name: Literal["dppo", "grpo", "dr_grpo", "cispo", "gspo", "tis", "icepop", "decoupled"] = Field(
        default="dppo",
        description="dppo: masks tokens that moved far; grpo: clipped ratio, mean over tokens; dr_grpo: the same, mean "
        "over sequences; cispo: capped weight; gspo: one clipped ratio for each sequence; tis, icepop: weight "
        "trainer / sampler, capped or masked; decoupled: clipped ratio to a policy one version old.",
    )
    entropy_bonus: NotNegative = Field(
        default=0.0, description="The mean entropy times this is subtracted from the loss."
    )
    reference: ReferenceConfig | None = Field(
        default=None,
        description="Penalty on the divergence from a reference policy; null has no penalty and loads no second model.",
    )
    truncated: Literal["train", "mask"] = Field(
        default="train",
        description="What to do with replies that sampling.max_tokens cut off. train: train on them. mask: leave their "
        "tokens out of the loss.",
    )
    divergence: Positive = Field(
        default=0.2, description="dppo: tokens whose probability has moved further than this are masked."
    )
    ratio_cap: Positive = Field(default=20.0, description="dppo: importance ratios are capped here.")
    kl_weight: NotNegative = Field(default=1e-3, description="dppo: weight of (log ratio)^2.")
    clip_low: Positive = Field(
        default=0.2, description="grpo, dr_grpo, decoupled: ratios below 1 - clip_low are clipped."
    )
    clip_high: Positive = Field(
        default=0.28, description="grpo, dr_grpo, decoupled: ratios above 1 + clip_high are clipped."
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="grpo, dr_grpo, decoupled: ratios are clipped here too if the advantage is negative; 3 is usual.",
    )
    cispo_cap: Positive = Field(default=5.0, description="cispo: importance ratios are capped here.")
    sequence_clip_low: Positive = Field(
        default=3e-4, description="gspo: ratios of sequences below 1 - sequence_clip_low are clipped."
    )
    sequence_clip_high: Positive = Field(
        default=4e-4, description="gspo: ratios of sequences above 1 + sequence_clip_high are clipped."
    )
    tis_cap: Positive = Field(default=2.0, description="tis: weights trainer / sampler are capped here.")
    icepop_low: Positive = Field(default=0.5, description="icepop: tokens with a smaller weight are masked.")
    icepop_high: Positive = Field(default=5.0, description="icepop: tokens with a larger weight are masked.")
    decoupled_cap: Positive = Field(
        default=5.0, description="decoupled: weights proximal policy / sampler are capped here."
    )

    @model_validator(mode="after")
    def _constants(self) -> "LossConfig":
        for key in dict.fromkeys(key for keys in CONSTANTS.values() for key in keys):
            value = getattr(self, key)
            if key not in CONSTANTS[self.name] and value != type(self).model_fields[key].default:
                users = ", ".join(name for name, keys in CONSTANTS.items() if key in keys)
                raise ValueError(f"{key} ({value}) is not used by loss {self.name}; used by: {users}")
        if self.icepop_low >= self.icepop_high:
            raise ValueError(f"icepop_low ({self.icepop_low}) must be below icepop_high ({self.icepop_high})")
        return self
