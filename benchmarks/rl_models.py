"""For rl.py: write random Llama 4 models with the quick start's tokenizer to folders, and start engines for them."""

from pathlib import Path
from typing import Any

from posttrain.base.config import ModelSizes
from posttrain.base.model import build_model
from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.model import NativeLlama4ForCausalLM, save_model
from posttrain.sampling.arguments import ENGINE_ENV
from posttrain.sampling.engine import EngineActor

SIZES = {
    "1m": ModelSizes(),
    "50m": ModelSizes(hidden=512, layers=8, heads=8, kv_heads=2, head_dim=64, ffn=2560, expert_ffn=512, experts=8),
    "300m": ModelSizes(hidden=1024, layers=12, heads=16, kv_heads=4, head_dim=64, ffn=5120, expert_ffn=1024, experts=8),
}


def build(size: str, seed: int = 0) -> NativeLlama4ForCausalLM:
    """A model with random weights, in fp32."""
    return build_model(SIZES[size], build_tokenizer(), 0.0, seed=seed)


def save(size: str, folder: Path) -> ServedModelConfig:
    """Write the model's folder."""
    save_model(build(size), build_tokenizer(), folder)
    return ServedModelConfig(path=str(folder), dtype="float32")


def start_engine(name: str, served: ServedModelConfig, engine: EngineConfig, **env: str) -> Any:
    """Start an engine actor. It asks the cluster for few resources, so that others fit beside it."""
    import ray

    options = {"num_cpus": 0.3, "max_concurrency": 100, "runtime_env": {"env_vars": {**ENGINE_ENV, **env}}}
    actor = ray.remote(EngineActor).options(**options).remote(name, served.model_dump(), engine.model_dump())
    ray.get(actor.start.remote())
    return actor
