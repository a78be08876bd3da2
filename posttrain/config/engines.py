"""Sections about vLLM engines, and how replies are sampled on them."""

from typing import Annotated

from pydantic import Field

from posttrain.config.base import Config
from posttrain.config.fields import Positive

DEFAULT_LENGTH = 4096  # of an engine whose max_model_len is not set


class EngineConfig(Config):
    """The vLLM engine that serves a model. Example: `{max_model_len: 8192, tensor_parallel: 2}`."""

    max_model_len: Annotated[int, Field(ge=16)] | None = Field(
        default=None,
        description="Largest number of tokens of a prompt and its reply together; null: 4096, or what the model can "
        "hold if that is less.",
    )
    max_num_seqs: Annotated[int, Field(ge=1)] = Field(
        default=256, description="Largest number of sequences that the engine decodes at the same time."
    )
    kv_cache_gib: Positive | None = Field(
        default=None,
        description="Memory for the KV cache in GiB. null: on a GPU what gpu_memory_fraction leaves; on a CPU enough "
        "for max_num_seqs sequences of max_model_len, but at most a quarter of the memory that is free when the engine "
        "starts.",
    )
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9, description="Share of a GPU's memory that vLLM may use. It has no meaning on a CPU."
    )
    tensor_parallel: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Number of GPUs that one engine is split over."
    )
    enforce_eager: bool = Field(
        default=True,
        description="Run the model without capturing CUDA graphs. On a CPU this must stay true; on a GPU false is "
        "faster, but the engine takes longer to start.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Compute the KV cache of a prefix once for all requests that begin with it, as the replies of a "
        "group do.",
    )
    block_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Tokens of a block of the KV cache. Requests share whole blocks of a prefix. null: 32 on a CPU, "
        "where vLLM's own 128 would share nothing of shorter prompts; on a GPU what vLLM chooses.",
    )
    stream_interval: Annotated[int, Field(ge=1)] = Field(
        default=256,
        description="Number of tokens after which the engine hands on a part of an unfinished reply. If the engine is "
        "lost, another continues the reply from there. Smaller values cost more calls between processes.",
    )
    deadline_s: Positive = Field(
        default=60.0,
        description="Seconds of silence after which an engine with work to do is asked for a sign of life. If none "
        "comes within the same time, the engine counts as lost and is replaced. It must be longer than the longest "
        "engine step.",
    )

    @property
    def length(self) -> int:
        """Most tokens of a prompt and its reply together. Where a stage runs, this is no more than the model can hold
        (pipeline/lengths.py)."""
        return DEFAULT_LENGTH if self.max_model_len is None else self.max_model_len


class SamplingConfig(Config):
    """How replies are drawn. Example: `{temperature: 1.0, max_tokens: 512}`."""

    temperature: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="The logits are divided by it before a token is drawn. 0 always takes the likeliest token.",
    )
    max_tokens: Annotated[int, Field(ge=1)] = Field(
        default=1024, description="Largest number of tokens of a reply; a longer reply is cut off there."
    )
