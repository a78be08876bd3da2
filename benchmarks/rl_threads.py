"""Figure of rl.py for the cores between engine and trainer: `resources.trainer_threads` beside fixed numbers.

  threads_following   seconds of a step with the better of one and two threads of the trainer, fixed / seconds of a step
      where the number follows what is measured, between one and two; the lowest of the balances of rl_overlap.py. The
      first half of the steps, in which it tries numbers, does not count. 1 is what following can reach at best. Beside
      it the seconds of each, and the last number of threads

All run in turns, with one engine, asynchronously. On two cores a second thread of the trainer is at the engine's cost.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from rl_models import save
from rl_overlap import BALANCES, STALENESS, stage_steps

from posttrain.pipeline.ray_session import ray_session

STEPS, ROUNDS = 40, 1
ROLLOUT = {"cpus": 0}
KINDS: dict[str, dict[str, Any]] = {
    "one": {"rollout": ROLLOUT, "trainer": {"cpus": 1}},
    "two": {"rollout": ROLLOUT, "trainer": {"cpus": 2}},
    "following": {"rollout": ROLLOUT, "trainer": {"cpus": 1}, "trainer_threads": 2},
}


def threads_following() -> tuple[float, dict[str, float]]:
    detail: dict[str, float] = {}
    ratios = []
    for balance in BALANCES:
        found = _seconds(balance)
        ratios.append(min(found["one_s"], found["two_s"]) / found["following_s"])
        detail |= {f"{balance}_{name}": value for name, value in found.items()}
    return min(ratios), detail


def _seconds(balance: str) -> dict[str, float]:
    walls: dict[str, list[float]] = {kind: [] for kind in KINDS}
    last = 0
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        model = save("1m", Path(scratch) / "model").path
        for number in range(ROUNDS):
            for kind, resources in KINDS.items():
                folder = Path(scratch) / f"{kind}-{number}"
                steps = stage_steps(
                    folder, model, balance, staleness=STALENESS, seed=number, steps=STEPS, resources=resources
                )
                walls[kind] += [step["step_wall_s"] for step in steps[STEPS // 2 :]]
                last = steps[-1]["train_threads"]
    return {**{f"{kind}_s": statistics.fmean(values) for kind, values in walls.items()}, "last_threads": last}
