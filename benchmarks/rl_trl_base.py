"""Train the dense base of a race of rl_trl.py: a LlamaForCausalLM, from random weights.

    python benchmarks/rl_trl_base.py SPEC.json

The spec is that of posttrain/base/rank.py, and may have the key `course`: `walk`, the puzzles of rl_trl_puzzles.py
instead of the quick start's. Processes and optimizers are those of the quick start; only model and text differ.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl_trl_puzzles import WALK_COURSE
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.base import model as base_model
from posttrain.base import rank
from posttrain.base.config import ModelSizes
from posttrain.base.courses import COURSES

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}


def build_dense(sizes: ModelSizes, tokenizer: Any, balance_coefficient: float, *, seed: int) -> LlamaForCausalLM:
    """A dense model in fp32, initialised like the quick start's model. Its sizes are `SIZES`; `sizes` is ignored."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **special, dtype="float32"))
    base_model.initialize(model, SIZES["num_hidden_layers"], seed)
    model.model.register_forward_hook(_without_balance_loss)
    return model


def _without_balance_loss(module: Any, inputs: Any, output: Any) -> None:
    output.aux_loss = None  # an attribute that the rank reads


if __name__ == "__main__":
    is_walk = json.loads(Path(sys.argv[1]).read_text()).get("course") == "walk"
    # "answers" is the key of StageConfig that the spec's config has.
    COURSES["answers"] = replace(WALK_COURSE if is_walk else COURSES["answers"], build_model=build_dense)
    rank.main(sys.argv[1])
