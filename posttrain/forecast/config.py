"""The keys of a cluster file, which `posttrain plan PIPELINE --cluster FILE` reads."""

from typing import Annotated

from pydantic import Field

from posttrain.config.base import Config
from posttrain.config.fields import NotNegative, Positive, Probability

Count = Annotated[int, Field(ge=1)]


class DeviceConfig(Config):
    """One GPU, or one core of a CPU: what it can do at best, and the share of it that programs reach."""

    name: str = Field(description="What the forecast calls it.")
    source: str = Field(description="Where the figures were published, or how they were measured.")
    memory_gib: Positive = Field(description="Memory of one device.")
    tflops: Positive = Field(description="Dense matrix products, 10^12 operations a second, in the dtype of the model.")
    memory_gb_s: Positive = Field(description="Bandwidth of its memory, 10^9 bytes a second.")
    link_gb_s: Positive = Field(description="Bandwidth to other devices of its host, 10^9 bytes a second, one way.")
    host_gb_s: Positive = Field(description="Bandwidth to the memory of its host, 10^9 bytes a second, one way.")
    train_efficiency: Probability = Field(description="Share of `tflops` that training reaches.")
    prefill_efficiency: Probability = Field(description="Share of `tflops` that an engine reaches on prompts.")
    decode_efficiency: Probability = Field(
        description="Share of `memory_gb_s` that an engine reaches while it decodes."
    )
    engine_step_s: NotNegative = Field(
        description="Seconds of an engine's step that depend on neither model nor batch."
    )
    price_per_hour: NotNegative = Field(default=0.0, description="Price of one device for an hour.")
    shares_cores: bool = Field(
        default=False, description="Whether all programs of a host share its devices, as they share the cores of a CPU."
    )


class ReplyLengths(Config):
    """Tokens of a reply, as a lognormal distribution. Example: `{median: 1500, sigma: 1.0}`."""

    median: Positive = Field(default=1000.0, description="Half of the replies are shorter.")
    sigma: NotNegative = Field(
        default=0.8, description="Standard deviation of the logarithm. 0: all replies are equally long."
    )


class WorkloadConfig(Config):
    """What is sampled, scored and trained on. A run that is calibrated from replaces it by what was seen there."""

    prompt_tokens: Count = Field(default=256, description="Tokens of a prompt.")
    reply_tokens: ReplyLengths = Field(
        default_factory=ReplyLengths, description="Tokens of a reply, at most the stage's sampling.max_tokens."
    )
    drop_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.4, description="Share of the groups that are dropped after they are scored: zero advantage, unscored."
    )
    reward_s: NotNegative = Field(default=0.1, description="Seconds from a sampled group to its rewards.")
    judge_tokens: Count = Field(default=128, description="Tokens of a verdict, if the stage has a judge.")


class ClusterConfig(Config):
    """A cluster: hosts with devices of one kind. Example: `{device: h200, hosts: 16, model: llama4-maverick}`."""

    device: str | DeviceConfig = Field(
        description="A bundled name (h100, h200, b200), `cpu` for this machine, which is measured, or the keys of one."
    )
    hosts: Count = Field(default=1, description="Number of hosts.")
    devices_per_host: Count = Field(default=8, description="Devices of a host: GPUs, or cores of its CPU.")
    network_gbit_s: Positive = Field(default=400.0, description="Network of a host, 10^9 bits a second.")
    price_per_hour: NotNegative | None = Field(
        default=None, description="Price of one device for an hour; null: that of the device."
    )
    model: str | None = Field(
        default=None,
        description="Sizes of the policy, as `posttrain plan` takes them: llama4-scout, or a file. null: the model "
        "folder of the stage.",
    )
    judge_model: str | None = Field(
        default=None, description="Sizes of the judge, if the stage has one. null: those of the policy."
    )
    workload: WorkloadConfig = Field(default_factory=WorkloadConfig)

    @property
    def devices(self) -> int:
        """Devices of all hosts."""
        return self.hosts * self.devices_per_host
