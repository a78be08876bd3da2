"""Schemas of `posttrain plan`: the shape of a model, and how it is to be trained."""

from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config.base import Config
from posttrain.config.shared import GradientCheckpointing, ParallelConfig

Count = Annotated[int, Field(ge=1)]


class ModelShape(Config):
    """Sizes of a Llama 4 text model, under the names of transformers' `Llama4TextConfig`."""

    hidden_size: Count
    intermediate_size: Count = Field(description="Width of each expert and of the shared expert.")
    intermediate_size_mlp: Count = Field(description="Width of dense layers.")
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    vocab_size: Count
    num_local_experts: Count
    num_experts_per_tok: Count = 1
    interleave_moe_layer_step: Count = Field(default=1, description="1: every layer has experts; 2: every other.")
    attention_chunk_size: Count = 8192
    no_rope_layer_interval: Count = Field(default=4, description="4: every fourth layer sees all tokens, unrotated.")
    use_qk_norm: bool = True
    tie_word_embeddings: bool = False

    def fields(self) -> dict[str, Any]:
        """Keyword arguments of `Llama4TextConfig`."""
        return {**self.model_dump(), "pad_token_id": None}


class PlanConfig(Config):
    """How the model is to be trained; what `posttrain plan` takes as KEY=VALUE."""

    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig(processes=8, zero=3))
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tokens: Count = Field(default=8192, description="Tokens of one forward of one rank.")
    gradient_checkpointing: GradientCheckpointing = "full"
    kv_sequences: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Sequences whose keys and values are cached on the same GPU."
    )
    kv_length: Count = Field(default=8192, description="Length of each of them, in tokens.")
    reserve: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of a GPU left for what is not counted: CUDA, NCCL, kernels, fragments."
    )
