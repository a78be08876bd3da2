"""One rank of the memory plan's tests: bytes of tensors that a real engine holds, by part, as it works.

    python tests/plan_ranks.py RANK WORLD PORT FOLDER

FOLDER holds cases.json; rank 0 writes NAME.json there: {"backward": bytes by part, "steps": [...]}.
"""

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

# Widths of whole 16-byte words, experts most of the weights: as in the real models, on a small scale.
SHAPE = {
    "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "intermediate_size_mlp": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192,
    "pad_token_id": None,
}  # fmt: skip
BUCKET = 1_000_000  # elements; DeepSpeed's default would be 2 GB in each rank


def live_tensors() -> dict[int, tuple[Any, int]]:
    """Every storage that some tensor holds: address -> (the storage, bytes)."""
    found: dict[int, tuple[Any, int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in gc.get_objects():
            if isinstance(item, torch.Tensor) and not item.is_meta:
                storage = item.untyped_storage()
                found[storage.data_ptr()] = (storage, storage.nbytes())
    found.pop(0, None)
    return found


def count(tensors: Any, live: dict[int, tuple[Any, int]]) -> int:
    """Bytes of the storages of `tensors`, taken out of `live` so that none counts twice."""
    return sum(live.pop(tensor.untyped_storage().data_ptr(), (None, 0))[1] for tensor in tensors)


def bytes_by_part(engine: Any, before: dict[int, Any]) -> dict[str, int]:
    """Bytes of this engine's tensors. before: storages that were there earlier (held, so no address is used again)."""
    gc.collect()
    for parameter in engine.module.parameters():
        _ = parameter.grad  # only what Python has looked at is known to the collector
    live = {address: item for address, item in live_tensors().items() if address not in before}
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = list(engine.module.parameters())
    masters = [p for group in inner.param_groups for p in group["params"]]
    gradients = [t.grad for t in (*parameters, *masters) if t.grad is not None]
    for name in ("averaged_gradients", "all_grad_tensors"):
        for held in getattr(optimizer, name, {}).values():
            gradients += [t for t in ([held] if torch.is_tensor(held) else held or []) if torch.is_tensor(t)]
    gradients += [t for t in (getattr(p, "grad_accum", None) for p in parameters) if t is not None]
    if getattr(optimizer, "grad_partitions_flat_buffer", None) is not None:
        gradients.append(optimizer.grad_partitions_flat_buffer)
    state = [t for values in inner.state.values() for t in values.values() if torch.is_tensor(t)]
    buckets = []
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        buckets += [t for t in getattr(bucket, "buffer", []) if torch.is_tensor(t)]
    # ZeRO-3 keeps its masters in a list of its own, and lends them to the inner optimizer in its step.
    masters += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    masters += getattr(optimizer, "single_partition_of_fp32_groups", [])
    weights = [getattr(p, "ds_tensor", p.data) for p in parameters]
    return {
        "weights": count(weights, live),
        "gradients": count(gradients, live),
        "buckets": count(buckets, live),
        "optimizer": count([*masters, *state], live),
        "rest": sum(size for _, size in live.values()),
    }


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes at the end of a backward that is not the last of its step, and at each step of the inner optimizer."""
    from transformers import Llama4TextConfig

    from posttrain.config.training import AdaptersConfig, OptimizerConfig, ParallelConfig
    from posttrain.model.native import NativeLlama4ForCausalLM
    from posttrain.parallel.engine import build_engine, deepspeed_config

    gc.collect()
    before = live_tensors()
    torch.manual_seed(0)
    model = NativeLlama4ForCausalLM(Llama4TextConfig(**SHAPE)).to(getattr(torch, case["dtype"])).train()
    if case.get("lora"):
        from peft import inject_adapter_in_model

        from posttrain.tune.adapters import adapter_config

        inject_adapter_in_model(adapter_config(model, AdaptersConfig(**case["lora"])), model)
    parallel = ParallelConfig(processes=case["processes"], expert=case["expert"], zero=case["zero"])
    config = deepspeed_config(parallel, OptimizerConfig(), case["dtype"])
    config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    engine = build_engine(model, config)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, 16))

    def backward(last: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)

    backward(True)
    engine.step()  # now there are moments
    backward(False)
    result: dict[str, Any] = {"backward": bytes_by_part(engine, before), "steps": []}
    backward(True)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    inner.register_step_post_hook(lambda *_: result["steps"].append(bytes_by_part(engine, before)))
    engine.step()
    engine.destroy()
    return result


def main() -> None:
    rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    from posttrain.actors.garbage import large_imports
    from posttrain.parallel.ending import end_rank
    from posttrain.parallel.engine import join_ranks

    torch.set_num_threads(1)
    with large_imports():  # `live_tensors` has a million objects less to look at
        join_ranks(rank, world, ("127.0.0.1", port))
        import posttrain.model.native  # noqa: F401
    for case in json.loads((folder / "cases.json").read_text()):
        if case["processes"] == world:
            result = measure(case)
            if rank == 0:
                (folder / f"{case['name']}.json").write_text(json.dumps(result))
    end_rank()


if __name__ == "__main__":
    main()
