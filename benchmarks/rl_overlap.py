"""Figure of rl.py for the overlap of generation and training: one stage, run strictly on-policy and asynchronously.

  async_overlap   speed of the asynchronous stage / speed of the strict one (max_staleness 0, where generation and
      training wait for each other), divided by what this ratio would be with perfect overlap:
      (T_gen + T_train) / max(T_gen, T_train). Both times are of one step of the strict stage: T_gen is how long its
      trainer waits for a batch, T_train the rest of the step. Values above 1 are possible, because more requests in
      flight fill the engine's batches better. The figure is the lowest of three balances

With three cores, engine, trainer and controller have one each. With two they share them, also with other programs.

The balances of generation and training are set by the shape of a step: few long replies to short prompts; many replies
of medium length; short replies to long prompts, which the engine reads once for a group and the trainer once for each
reply.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rl_models import save

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.files import read_jsonl
from posttrain.pipeline.ray_session import ray_session
from posttrain.rl.config import RlConfig

# Groups of a step, replies of a group, tokens of a reply, words of a prompt.
BALANCES = {"generation": (4, 4, 96, 4), "balanced": (16, 8, 24, 16), "training": (16, 8, 8, 60)}
STALENESS, WARM, STEPS, ROUNDS = 3, 3, 10, 2


def async_overlap() -> tuple[float, dict[str, float]]:
    found = {balance: _overlap(balance) for balance in BALANCES}
    detail = {f"{balance}_{name}": value for balance, figures in found.items() for name, value in figures.items()}
    return min(figures["ratio"] for figures in found.values()), {**detail, "max_staleness": STALENESS}


def _overlap(balance: str, seed: int = 0) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        model = save("1m", Path(scratch) / "model").path
        rounds = []
        for number in range(ROUNDS):
            strict, overlapped = (
                stage_steps(Path(scratch) / f"{number}-{staleness}", model, balance, staleness=staleness, seed=seed)
                for staleness in (0, STALENESS)
            )
            gen_s = statistics.median(step["wait_s"] for step in strict)
            wall_s = statistics.median(step["step_wall_s"] for step in strict)
            # Asynchronous steps come in bursts, so their mean is taken and not their median.
            async_s = statistics.fmean(step["step_wall_s"] for step in overlapped)
            ideal = wall_s / max(gen_s, wall_s - gen_s)
            speedup = statistics.fmean(step["step_wall_s"] for step in strict) / async_s
            rounds.append({"ratio": speedup / ideal, "speedup": speedup, "ideal": ideal, "t_gen_ms": 1e3 * gen_s,
                           "t_train_ms": 1e3 * (wall_s - gen_s), "async_step_ms": 1e3 * async_s})  # fmt: skip
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def stage_steps(
    folder: Path,
    model: str,
    balance: str,
    *,
    staleness: int,
    seed: int,
    steps: int = STEPS,
    resources: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The metrics of each step after the first ones."""
    from posttrain.rl.stage import run

    groups, replies, tokens, words = BALANCES[balance]
    folder.mkdir()
    rows = [
        {"id": f"r{index}", "messages": [{"role": "user", "content": f"{index} + 1 " * (words // 4)}]}
        for index in range(64)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "model": {"path": model, "dtype": "float32"}, "prompts": {"path": str(folder / "prompts.jsonl")},
        "reward": {"name": f"{Path(__file__).with_name('rl_reward.py')}:every_second"},
        "steps": WARM + steps, "groups_per_step": groups,
        "group_size": replies, "max_staleness": staleness, "sampling": {"max_tokens": tokens},
        "optimizer": {"learning_rate": 1e-6}, "engine": {"max_model_len": 512, "kv_cache_gib": 0.25},
        "checkpoint_every": WARM + steps,
        "resources": resources or {"rollout": {"cpus": 0.9}, "trainer": {"cpus": 0.9}},
    }  # fmt: skip
    context = StageContext("rl", folder, folder / "events.jsonl", seed, warm_engines=True)
    run(validate_config(RlConfig, data, "benchmark"), context)
    return list(read_jsonl(folder / "metrics.jsonl"))[WARM:]
