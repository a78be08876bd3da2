"""A saved native model in a real vLLM engine: one model in two implementations, beyond a chunk and with temperature.

The attention temperature reaches 1 + 0.3 log(1 + 300 / 8) here, and every prompt is longer than a chunk.
"""

from pathlib import Path

import pytest
import torch
from tiny_policy import save_tiny_policy

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.model import load_model
from posttrain.sampling.requests import Completion, SampleRequest

pytestmark = pytest.mark.slow
CHUNK = 128  # vLLM wants a multiple of its blocks of the KV cache
HEAD = 32  # of the widths that its CPU kernels know, the least
LENGTHS = (140, 250, 300)
REPLY = 20


def prompt(length: int, vocabulary: int) -> tuple[int, ...]:
    ids = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(length))
    return tuple(ids.tolist())


def gap(model, sampled: list[tuple[tuple[int, ...], Completion]]) -> float:
    """Largest difference between the engine's log-probability of a sampled token and the model's."""
    gaps = []
    for prompt_ids, reply in sampled:
        ids = torch.tensor([[*prompt_ids, *reply.token_ids]])
        with torch.no_grad():
            log_probs = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        ours = log_probs.gather(1, torch.tensor(reply.token_ids)[:, None])[:, 0]
        gaps.append((ours - torch.tensor(reply.logprobs)).abs().max().item())
    return max(gaps)


def test_vllm_and_the_native_model_agree(ray_session, tmp_path: Path):
    import ray

    from posttrain.sampling.client import Engines

    folder = save_tiny_policy(tmp_path / "model", seed=3, attention_chunk_size=CHUNK, head_dim=HEAD)
    native = load_model(folder, "native")
    requests = [
        SampleRequest(prompt(length, native.config.vocab_size), temperature=1.0, max_tokens=REPLY) for length in LENGTHS
    ]
    context = StageContext("test", tmp_path, tmp_path / "events.jsonl", warm_engines=False)
    served = ServedModelConfig(path=str(folder), dtype="float32")
    engine = EngineConfig(max_model_len=512, kv_cache_gib=0.1)
    with Engines(context, served, engine, resources=ActorResources(cpus=0.5)) as engines:
        sampled, _, _ = ray.get(engines.actors[0].generate_wave.remote(requests, 0))
    replies = [reply for (reply,) in sampled]
    sampled = [(request.prompt_ids, reply) for request, reply in zip(requests, replies, strict=True)]
    assert sum(len(reply.token_ids) for reply in replies) > 2 * REPLY
    assert gap(native, sampled) < 1e-4
    native.config.attn_temperature_tuning = False
    assert gap(native, sampled) > 1e-2
    unchunked = load_model(folder, "native")
    unchunked.config.attention_chunk_size = 100_000
    assert gap(unchunked, sampled) > 1e-2
