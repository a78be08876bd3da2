"""An engine's start on a machine as it is: the length that its model allows, its cache on a CPU, why it failed."""

import contextlib
import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.config.engines import DEFAULT_LENGTH, EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.errors import ConfigError, StageError
from posttrain.eval.config import EvalConfig
from posttrain.filtering.config import FilterConfig
from posttrain.model.length import engine_length, model_length
from posttrain.pipeline.engines import attention_problems
from posttrain.pipeline.lengths import length_problems, settled
from posttrain.rl.config import RlConfig
from posttrain.sampling.arguments import cpu_cache_arguments, engine_arguments
from posttrain.sampling.cpu_attention import HEAD_DIMS, attention_faults
from posttrain.sampling.kv_memory import cpu_kv_cache_bytes, free_bytes, token_bytes
from posttrain.sampling.start_failure import PrintedSince, start_error

GIB = 1 << 30
POSITIONS = "max_position_embeddings"


def folder_of(tmp_path: Path, config: dict[str, Any], name: str = "model") -> str:
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    return str(tmp_path / name)


# ------------------------------------------------------------------ what a model can hold


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({POSITIONS: 32768}, 32768),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {POSITIONS: 4096}, POSITIONS: 7}, 4096),
        ({POSITIONS: 8192, "seq_length": 2048}, 2048),
        ({POSITIONS: 8192, "model_max_length": 131072}, 131072),
        ({POSITIONS: 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({POSITIONS: 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        ({POSITIONS: 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({POSITIONS: 131072, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
        ({POSITIONS: 4096, "rope_scaling": None}, 4096),
        ({POSITIONS: 32768, "model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}, 32768),
        ({POSITIONS: 512, "rope_parameters": {"full": {"rope_type": "linear", "factor": 2.0}}}, 1024),
    ],
)
def test_the_length_of_a_model_is_that_which_vllm_derives(tmp_path: Path, config: dict[str, Any], tokens: int):
    found = model_length(folder_of(tmp_path, config))
    assert found is not None
    assert found.tokens == tokens


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"max_position_embeddings": null}', '{"n_positions": "many"}'])
def test_a_config_that_does_not_say_leaves_the_length_open(tmp_path: Path, text: str):
    folder = folder_of(tmp_path, {})
    Path(folder, "config.json").write_text(text)
    assert model_length(folder) is None
    assert engine_length(EngineConfig(), folder) == DEFAULT_LENGTH


def configs(path: str, gpus: float = 0.0) -> dict[str, Any]:
    """Of stages with an engine, the last with two; each engine has so many GPUs."""
    model, data, reward = {"path": path}, {"path": "p.jsonl"}, {"name": "math"}
    judge = {"model": model, "engine": {"max_model_len": 300}}
    rated, sampled = {"judge": {"cpus": 1, "gpus": gpus}}, {"rollout": {"gpus": gpus}}
    return {
        "filter": FilterConfig.model_validate({"judge": model, "data": data, "resources": rated}),
        "eval": EvalConfig.model_validate({"model": model, "data": data, "reward": reward, "resources": sampled}),
        "rl": RlConfig.model_validate(
            {"model": model, "prompts": data, "reward": reward, "judge": judge, "resources": rated | sampled}
        ),
    }


def test_a_default_length_is_what_the_model_can_hold(tmp_path: Path):
    found = {kind: settled(config, kind) for kind, config in configs(folder_of(tmp_path, {POSITIONS: 2000})).items()}
    assert {kind: config.engine.max_model_len for kind, config in found.items()} == dict.fromkeys(found, 2000)
    assert found["rl"].judge.engine.max_model_len == 300
    assert found["filter"].prompt_limit == 1999
    for config in configs(folder_of(tmp_path, {POSITIONS: 10**6})).values():
        assert settled(config, "").engine.max_model_len == DEFAULT_LENGTH


@pytest.mark.parametrize(("kind", "key"), [("filter", "engine"), ("eval", "engine"), ("rl", "engine"), ("rl", "judge")])
def test_a_length_that_was_asked_for_is_refused(tmp_path: Path, kind: str, key: str):
    path = folder_of(tmp_path, {POSITIONS: 299 if key == "judge" else 2000})
    data = configs(path)[kind].model_dump()
    if key == "judge":
        data["model"]["path"] = "elsewhere"
    else:
        data["engine"]["max_model_len"] = 2001
    config = type(configs(path)[kind]).model_validate(data)
    (problem,) = length_problems(config)
    got, limit = (300, 299) if key == "judge" else (2001, 2000)
    name = "judge.engine.max_model_len" if key == "judge" else "engine.max_model_len"
    assert problem.startswith(f"{name}: got {got}: the model in '{path}' can hold {limit} tokens ({POSITIONS}")
    with pytest.raises(ConfigError, match=f"can hold {limit} tokens"):
        settled(config, kind)


def test_a_reply_longer_than_the_model_is_refused_with_its_reason(tmp_path: Path):
    config = configs(folder_of(tmp_path, {POSITIONS: 512}))["eval"]  # whose replies have up to 1024 tokens
    (problem,) = length_problems(config)
    assert "sampling.max_tokens is 1024; it must be below engine.max_model_len (512)" in problem
    assert "can hold 512 tokens" in problem


# ------------------------------------------------------------------ what attention on a CPU can compute

HEADS = {"model_type": "llama4_text", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
UNFIT = {
    "a head of 16": ({"head_dim": 16}, {}, "heads have a size of 16 .head_dim.*; serve the model on a GPU"),
    "a head of the width": ({"head_dim": None, "hidden_size": 160}, {}, "heads have a size of 40"),
    "a chunk of 40": ({"attention_chunk_size": 40}, {}, "within 40 tokens .*multiple of the 32 tokens.*; serve the"),
    "a chunk of 96": ({"attention_chunk_size": 96}, {"block_size": 64}, "within 96 tokens .*; set block_size: 32"),
}
FIT = {
    "whole chunks": {"attention_chunk_size": 96},
    "no chunk": {"attention_chunk_size": None},
    "another use of the key": {"model_type": "made_up", "attention_chunk_size": 40},
    "compressed keys": {"head_dim": 16, "kv_lora_rank": 8},
    "no sizes": {"hidden_size": None, "head_dim": 16},
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_attention_on_a_cpu_cannot_compute_is_named(name: str):
    changes, engine, message = UNFIT[name]
    (fault,) = attention_faults(HEADS | changes, EngineConfig(**engine))
    assert re.search(message, fault)


@pytest.mark.parametrize("name", FIT)
def test_other_models_are_not_refused(name: str):
    assert not list(attention_faults(HEADS | FIT[name], EngineConfig()))


@pytest.mark.parametrize(("kind", "key"), [("filter", "engine"), ("eval", "engine"), ("rl", "engine"), ("rl", "judge")])
def test_it_is_told_before_an_engine_starts_and_of_engines_on_cpus_alone(tmp_path: Path, kind: str, key: str):
    folder = folder_of(tmp_path, {"text_config": {**HEADS, "head_dim": 24}})
    config, start = configs(folder)[kind], f"{'judge.engine' if key == 'judge' else key}: got the model in {folder!r}"
    assert sum(line.startswith(start) for line in attention_problems(config)) == 1
    with pytest.raises(ConfigError, match="heads have a size of 24"):
        settled(config, "test")
    assert attention_problems(configs(folder, gpus=1.0)[kind]) == []


@pytest.mark.slow  # importing vLLM's CPU attention starts a process
def test_the_rules_are_those_of_vllm():
    """Its kernel plans attention for these sizes of heads and for no other; and its chunks are whole blocks."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    from vllm.v1.attention.backends.utils import make_local_attention_virtual_batches

    lengths, starts = torch.tensor([8], dtype=torch.int32), torch.tensor([0, 8], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        planned = []
        for head_dim in range(16, 545, 16):
            isa = _get_attn_isa(dtype, 32, head_dim)
            with contextlib.suppress(RuntimeError):
                ops.cpu_attn_get_scheduler_metadata(
                    1, 2, 1, head_dim, lengths, dtype, starts, True, -1, isa, enable_kv_split=False
                )
                planned.append(head_dim)
        assert planned == list(HEAD_DIMS)
    batch: Any = SimpleNamespace(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, block_table_tensor=torch.zeros(1, 4)
    )
    with pytest.raises(AssertionError, match="attn_chunk_size 40 is not divisible by block_size 32"):
        make_local_attention_virtual_batches(40, batch, 32)


# ------------------------------------------------------------------ the cache on a CPU

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
SIZES |= {"hidden_size": 512}


def test_the_cache_holds_what_the_engine_can_use_or_a_quarter_of_what_is_free():
    assert token_bytes(SIZES, "bfloat16") == 2 * 4 * 2 * 64 * 2
    engine = EngineConfig(max_num_seqs=10)
    size = cpu_kv_cache_bytes(SIZES, "bfloat16", engine, length=1000, free=100 * GIB)
    assert size == 10 * 2048 * 32 * 33  # blocks of 32 tokens: 32 for 1,000, and one more
    whole = EngineConfig(max_num_seqs=10, block_size=128)
    assert cpu_kv_cache_bytes(SIZES, "bfloat16", whole, length=1000, free=100 * GIB) == 10 * 2048 * 128 * 9
    assert cpu_kv_cache_bytes(SIZES, "bfloat16", EngineConfig(), length=10**6, free=100 * GIB) == 25 * GIB
    assert cpu_kv_cache_bytes(SIZES, "float32", engine, length=1000, free=0) == 2 * 4096 * 32 * 33
    assert cpu_kv_cache_bytes({}, "float32", engine, length=1000, free=100 * GIB) == GIB
    assert cpu_kv_cache_bytes({}, "float32", engine, length=1000, free=GIB) == GIB // 4
    assert free_bytes() > 0


def test_an_engine_on_a_cpu_shares_prompts_in_blocks_of_32_tokens_unless_told_otherwise(tmp_path):
    model = ServedModelConfig(path=folder_of(tmp_path, SIZES))
    assert cpu_cache_arguments(model, EngineConfig())["block_size"] == 32
    own = EngineConfig(block_size=64, kv_cache_gib=0.1)
    assert cpu_cache_arguments(model, own).keys() == {"disable_hybrid_kv_cache_manager"}
    assert engine_arguments(model, own)["block_size"] == 64
    assert "block_size" not in engine_arguments(model, EngineConfig())  # on a GPU vLLM chooses


# ------------------------------------------------------------------ why a start failed

PRINTED = """\
(EngineCore pid=71) ERROR 11-26 10:54:40 [core.py:1210] EngineCore failed to start.
(EngineCore pid=71) ERROR 11-26 10:54:40 [core.py:1210] Traceback (most recent call last):
(EngineCore pid=71) ERROR 11-26 10:54:40 [core.py:1210]   File "core.py", line 1180, in run_engine_core
(EngineCore pid=71) ERROR 11-26 10:54:40 [core.py:1210]     raise ValueError("here: is a line of code")
(EngineCore pid=71) ERROR 11-26 10:54:40 [core.py:1210] ValueError: no room; decrease --kv-cache-memory-bytes
(EngineCore pid=71) Process EngineCore:
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_cause_is_in_the_message(tmp_path: Path):
    with (tmp_path / "printed").open("w+b") as file:
        keep = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            os.write(2, b"ValueError: of an earlier start\n")
            printed = PrintedSince()
            os.write(2, PRINTED.encode())
            lines = printed.lines()
        finally:
            os.dup2(keep, 2)
            os.close(keep)
    failed = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    error = start_error("engine-0", failed, lines)
    assert str(error) == ("engine engine-0 could not be started: ValueError: no room; decrease engine.kv_cache_gib")
    assert isinstance(pickle.loads(pickle.dumps(error)), StageError)
    assert "Failed core proc(s)" in str(start_error("engine-0", failed, ["no error here", ""]))


def test_an_error_of_the_actor_itself_is_its_own_cause():
    error = start_error("engine-3", ValueError("two\n lines"), ["KeyError: something that was printed before"])
    assert str(error) == "engine engine-3 could not be started: ValueError: two lines"


@pytest.mark.slow
def test_an_engine_core_that_dies_at_its_start_says_why(ray_session: None, tiny_model: Path, tmp_path: Path):
    import tiny_policy

    from posttrain.config.models import ServedModelConfig
    from posttrain.config.resources import ActorResources
    from posttrain.context import StageContext
    from posttrain.sampling.client import Engines

    engine = EngineConfig(**{**tiny_policy.ENGINE, "kv_cache_gib": 1e6})
    context = StageContext("test", tmp_path, tmp_path / "events.jsonl")
    model = ServedModelConfig(path=str(tiny_model), dtype="float32")
    with (
        pytest.raises(StageError, match=r"engine engine-\d+ could not be started: ValueError: Available memory"),
        Engines(context, model, engine, resources=ActorResources(cpus=0.5)),
    ):
        pass


def test_the_reason_of_a_remote_error_is_what_was_raised_there():
    from ray.exceptions import RayTaskError

    from posttrain.actors.losses import reason_of
    from posttrain.sampling.start_failure import EngineStartError

    remote = RayTaskError("EngineActor.start", "ray::EngineActor.start()\n  a traceback", EngineStartError("no room"))
    assert reason_of(remote) == reason_of(remote.as_instanceof_cause()) == "no room"
    assert reason_of(ExceptionGroup("several", [remote])) == "no room"
    assert reason_of(TimeoutError()) == "TimeoutError"
