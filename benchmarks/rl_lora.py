"""Figures of rl.py for the memory of a trainer of adapters, beside that of a trainer of all weights.

lora_memory   peak memory of a trainer's process in two steps, less what the process had before it loaded the model: all
              weights trained / adapters of rank 16 on attention and experts, in fp32, one rank, ZeRO-1. Each trainer
              has a process of its own and the same rollouts. Beside it, of both: the bytes of the optimizer (masters
              and Adam's moments), of gradients, and of one update that is sent to the engines (attention_sent_mib:
              with adapters of attention alone); the seconds of the second step; and the optimizer's bytes as
              `posttrain plan` counts them
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray.cloudpickle
import torch
from measure import MMAP_THRESHOLD, status_kib
from rl_models import build, save
from rl_prefix import rollouts

from posttrain.config.base import validate_config
from posttrain.config.training import AdaptersConfig, ParallelConfig
from posttrain.parallel.ranks import RankGroup
from posttrain.parallel.tensors import sent_tensors
from posttrain.pipeline.ray_session import ray_session
from posttrain.planning.memory import state_bytes
from posttrain.planning.sizes import adapter_parameters
from posttrain.rl.config import RlConfig
from posttrain.rl.training.adapters import add_adapters

SHAPE, GROUPS, SIZE = (64, 64, 8), 2, "50m"
LORA = {"rank": 16, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Measured:
    """In the rank: a trainer, and the memory of its process."""

    def run(self, config: RlConfig, samples: list[Any]) -> dict[str, float]:
        import ctypes

        from posttrain.compat.deepspeed import inner_optimizer
        from posttrain.rl.training.trainer import PolicyTrainer

        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)  # large blocks that are free do not count as used
        before = status_kib("VmRSS")
        trainer = PolicyTrainer(config, 0)
        results = [trainer.step(samples, step) for step in range(2)]
        peak = status_kib("VmHWM")
        engine = trainer._engine
        inner = inner_optimizer(engine)
        kept = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
        held = {parameter.data_ptr() for parameter in engine.module.parameters()}
        masters = [p for group in inner.param_groups for p in group["params"] if p.data_ptr() not in held]
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        manifest: Any = results[-1].manifest
        found = {
            "peak_mib": (peak - before) / 1024,
            "optimizer_mib": _mib([*kept, *masters]),
            "gradients_mib": _mib(trained),
            "sent_mib": manifest.num_bytes / 2**20,
            "step_s": results[-1].metrics["train_s"],
        }
        trainer.close()
        return found


def _mib(tensors: list[torch.Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def lora_memory() -> tuple[float, dict[str, Any]]:
    shapes = {name: tuple(value.shape) for name, value in build(SIZE).named_parameters()}
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    adapters = adapter_parameters(shapes, AdaptersConfig.model_validate(LORA))
    attention = build(SIZE)
    add_adapters(attention, AdaptersConfig())
    found: dict[str, Any] = {"attention_sent_mib": sum(item.num_bytes for item in sent_tensors(attention)) / 2**20}
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        served = save(SIZE, Path(scratch) / "model")
        for name, lora in (("full", None), ("lora", LORA)):
            group = RankGroup(ParallelConfig(), _config(served.path, lora).resources.trainer, Measured)
            found |= {
                f"{name}_{key}": value
                for key, value in group.get("run", _config(served.path, lora), rollouts(SHAPE, GROUPS)).items()
            }
            plan = state_bytes(total, 0, ParallelConfig(), dtype="float32", adapters=adapters if lora else 0)
            found[f"{name}_planned_optimizer_mib"] = plan.optimizer / 2**20
            group.close()
    return found["full_peak_mib"] / found["lora_peak_mib"], found


def _config(model: str, lora: dict[str, Any] | None) -> RlConfig:
    data = {
        "model": {"path": model, "dtype": "float32"},
        "prompts": {"path": "unused.jsonl"},
        "reward": {"name": "unused"},
        "steps": 2,
        "sampling": {"max_tokens": 128},
        "lora": lora,
    }
    return validate_config(RlConfig, data, "benchmark")
