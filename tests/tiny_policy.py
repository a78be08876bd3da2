"""A random Llama 4 mixture of experts of about 100,000 parameters with its tokenizer, for tests of whole stages."""

import itertools
import random
from pathlib import Path
from typing import Any

from posttrain.files import write_jsonl

# One shape of engine, with half a CPU, for every test that serves `tiny_model`: an engine that one test leaves warm
# serves the next. Few replies at once, so that some wait; a short deadline, so that a lost engine is soon replaced.
ENGINE: dict[str, Any] = {
    "max_model_len": 256,
    "kv_cache_gib": 0.1,
    "max_num_seqs": 24,
    "stream_interval": 8,
    "deadline_s": 8.0,
}


def save_tiny_policy(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model folder. `changes` go into its config."""
    import torch
    from transformers import Llama4TextConfig

    from posttrain.base.tokenizer import build_tokenizer
    from posttrain.model import NativeLlama4ForCausalLM, save_model

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 1, 0],
        # Short, so that chunk borders and the attention temperature matter within a test's conversations.
        "attention_chunk_size": 16,
        "attn_temperature_tuning": True,
        "floor_scale": 8,
        "attn_scale": 0.3,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "router_aux_loss_coef": 0.0,
    }
    model = NativeLlama4ForCausalLM(Llama4TextConfig(**{**settings, **changes}))
    return save_model(model, tokenizer, folder)


def write_sums(path: Path, count: int, seed: int = 0) -> Path:
    """Write supervised rows of sums with answers of various lengths; every third has a system turn."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        numbers = [rng.randint(1, 9) for _ in range(rng.randint(2, 6))]
        work = ", ".join(f"{a} + {b} = {a + b}" for a, b in itertools.pairwise(numbers))
        reply = f"{work}. Answer: {sum(numbers)}" if index % 2 else f"Answer: {sum(numbers)}"
        messages = [{"role": "user", "content": "Sum: " + " + ".join(map(str, numbers))}]
        if index % 3 == 0:
            messages.insert(0, {"role": "system", "content": "Be short."})
        rows.append({"id": f"r{index}", "messages": [*messages, {"role": "assistant", "content": reply}]})
    write_jsonl(path, rows)
    return path
