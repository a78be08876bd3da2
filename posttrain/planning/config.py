"""Config of `posttrain plan`: the shape of a model, and how it is to be trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.training import AdaptersConfig, GradientCheckpointing, ParallelConfig
from posttrain.parallel.engine import lora_problems

Count = Annotated[int, Field(ge=1)]


class ModelShape(Config):
    """Sizes of a Llama 4 text model, under the names of transformers' `Llama4TextConfig`."""

    hidden_size: Count = Field(description="Width of the residual stream.")
    intermediate_size: Count = Field(description="Width of each expert and of the shared expert.")
    intermediate_size_mlp: Count = Field(description="Width of the feed-forward part of dense layers.")
    num_hidden_layers: Count = Field(description="Number of layers.")
    num_attention_heads: Count = Field(description="Number of query heads.")
    num_key_value_heads: Count = Field(description="Number of key and value heads, which groups of query heads share.")
    head_dim: Count = Field(description="Width of one head.")
    vocab_size: Count = Field(description="Number of token ids.")
    num_local_experts: Count = Field(description="Number of routed experts in a layer.")
    num_experts_per_tok: Count = Field(default=1, description="Number of routed experts that each token is sent to.")
    interleave_moe_layer_step: Count = Field(
        default=1, description="Every such layer has experts: with 1 all layers, with 2 every second one."
    )
    attention_chunk_size: Count = Field(
        default=8192, description="Number of tokens of a chunk, outside of which chunked layers do not attend."
    )
    no_rope_layer_interval: Count = Field(
        default=4,
        description="Every such layer attends to all earlier tokens without rotary positions: with 4 every fourth.",
    )
    use_qk_norm: bool = Field(default=True, description="Whether queries and keys are normalised after the rotation.")
    tie_word_embeddings: bool = Field(
        default=False, description="Whether the output layer shares the weights of the input embeddings."
    )

    def fields(self) -> dict[str, Any]:
        """Keyword arguments of `Llama4TextConfig`."""
        return {**self.model_dump(), "pad_token_id": None}


class PlanConfig(Config):
    """How the model is to be trained, as the KEY=VALUE arguments of `posttrain plan`."""

    parallel: ParallelConfig = Field(
        default_factory=lambda: ParallelConfig(processes=8, zero=3),
        description="How training is spread over ranks, one GPU each.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Data type of the weights and activations."
    )
    lora: AdaptersConfig | None = Field(default=None, description="Adapters that are trained instead of all weights.")
    tokens: Count = Field(default=8192, description="Number of tokens in one forward pass of one rank.")
    gradient_checkpointing: GradientCheckpointing = "full"
    kv_sequences: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Number of sequences whose KV cache lies on the same GPU; 0 if engines have their own."
    )
    kv_length: Count = Field(default=8192, description="Length of each such sequence in tokens.")
    reserve: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="Share of a GPU's memory that is left free for what is not counted: CUDA, NCCL, kernels and "
        "fragmentation.",
    )

    @model_validator(mode="after")
    def _trains_adapters(self) -> "PlanConfig":
        problems = lora_problems(self.parallel, self.lora) if self.lora is not None else []
        if problems:
            raise ValueError("; ".join(f"parallel.expert: got {self.parallel.expert}{item}" for item in problems))
        return self
