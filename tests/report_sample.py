"""Writes a run directory as a finished quick start leaves it, with made-up numbers, for the tests of the report."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

from posttrain.metrics.intervals import wilson_ci95

CAPABILITIES = ("sum", "code", "sort", "string", "countdown")
START = 1_795_000_000.0
STAGES = (("base", 84.0), ("filter", 21.0), ("sft", 14.0), ("rl", 118.0), ("dpo", 19.0))
STARTS = {"sft": "${base.model}", "rl": "${sft.model}", "dpo": "${rl.model}"}  # the model that a stage starts from
EVALUATION_S = 9.0
ACCURACY = {"base": 0.466, "sft": 0.482, "rl": 0.752, "dpo": 0.747}
# share of replies that show their work; accuracy of these, and of the others
WORKED = {"base": (0.33, 0.71, 0.35), "sft": (0.31, 0.73, 0.37), "rl": (0.95, 0.77, 0.41), "dpo": (0.94, 0.77, 0.4)}
STEPS = 34
GROUP = 8
FAULTS = (
    {"event": "engine_replaced", "name": "engine-0", "reason": "its process ended"},
    {"event": "reward_restarted", "reason": "no answer for 60 s"},
    {"event": "alarm", "reason": "unscored", "values": {"unscored_fraction": 0.25, "step": 20}},
    {"event": "rolled_back", "steps": 2},
)
RL_CONFIG = "reward: {name: final_answer, alarm_fraction: 0.2, correct_threshold: 0.5}\n"
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def write_sample(root: Path, seed: int = 0) -> Path:
    """The whole of a run: every file that the report reads."""
    rng = random.Random(seed)
    starts, at = {}, START
    for name, wall in STAGES:
        starts[name] = at
        at += wall + 1.5
        folder = root / name
        (folder / "model").mkdir(parents=True)
        (folder / "config.yaml").write_text(f"seed: {seed}\nstage: {name}\n" + (RL_CONFIG if name == "rl" else ""))
        (folder / "DONE").write_text("{}")
    stages = "".join(
        f"  - {{name: {name}, kind: {name}, config: {{model: {{path: '{start}'}}}}}}\n"
        for name, start in STARTS.items()
    )
    (root / "pipeline.yaml").write_text(f"name: quickstart\nstages:\n  - {{name: base, kind: base}}\n{stages}")
    events = _stage_events(starts)
    _write_filter(root / "filter", rng)
    _write_tuning(root, starts, rng)
    events += _write_rl(root / "rl", starts["rl"], rng)
    write_lines(root / "events.jsonl", sorted(events, key=lambda event: event["t"]))
    (root / "summary.json").write_text(json.dumps(_summary(at - START)))
    return root


def results(accuracy: float, worked: tuple[float, float, float] | None = None, n: int = 130) -> dict[str, Any]:
    """The results.json of one policy, of `n` problems a capability."""
    rng = random.Random(accuracy)
    cells: dict[str, Any] = {}
    shifts = {name: rng.uniform(-0.12, 0.12) for name in sorted(CAPABILITIES)}
    for name, shift in {**shifts, "all": 0.0}.items():
        problems = n * (len(CAPABILITIES) if name == "all" else 1)
        value = min(max(accuracy + shift, 0.02), 0.98)
        cells[name] = {
            "n": problems,
            **_share("greedy", value, problems),
            "greedy_n": problems,
            **_share("pass@1", value * 0.93, problems),
            **_share("pass@k", 1 - (1 - value) ** 2.1, problems),
            "k": 8,
            "observed": {},
        }
        if worked:
            share, accuracy_with, accuracy_without = worked
            having = round(share * problems)
            cells[name]["observed"]["worked"] = {
                **_share("share", share, problems),
                "of": problems,
                "n": having,
                **_share("accuracy", accuracy_with, having),
                **_share("accuracy_otherwise", accuracy_without, problems - having),
            }
    return cells


def _share(name: str, value: float, n: int) -> dict[str, Any]:
    if not n:
        return {name: None, f"{name}_ci95": None}
    return {name: round(value * n) / n, f"{name}_ci95": list(wilson_ci95(round(value * n), n))}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _summary(wall_s: float) -> dict[str, Any]:
    sft = {"tokens": 26640, "kl_from_start": 0.0281, "entropy_before": 0.512, "entropy_after": 0.463}
    stats = {"sft": sft, "dpo": {**sft, "tokens": 21600, "kl_from_start": 0.0034}}
    record = {"status": "done", "input_hash": "0" * 16, "outputs": {}}
    return {
        "status": "done",
        "wall_s": wall_s,
        "peak_rss_gib": 7.42,
        "command": "posttrain run quickstart --run-dir runs/quickstart",
        "versions": {"python": "3.11.9", "torch": "2.13.0+cpu", "vllm": "0.32.0", "trl": "1.16.0"},
        "stages": [{"name": n, "kind": n, "wall_s": wall, "stats": stats.get(n, {}), **record} for n, wall in STAGES],
        "evaluations": [
            {"name": f"{name}.eval", "kind": "eval", "wall_s": EVALUATION_S, **record} for name in ACCURACY
        ],
        "eval": {name: results(accuracy, WORKED[name]) for name, accuracy in ACCURACY.items()},
    }  # fmt: skip


def _stage_events(starts: dict[str, float]) -> list[dict[str, Any]]:
    events = []
    for name, wall in STAGES:
        end = starts[name] + wall
        events.append({"t": starts[name], "stage": name, "event": "stage_start", "kind": name})
        events.append({"t": end, "stage": name, "event": "stage_done"})
        if name in ACCURACY:
            events.append({"t": end, "stage": f"{name}.eval", "event": "stage_start", "kind": "eval"})
            events.append({"t": end + EVALUATION_S, "stage": f"{name}.eval", "event": "stage_done"})
    return events


def _write_filter(folder: Path, rng: random.Random) -> None:
    rows = []
    for i in range(1200):
        score = rng.betavariate(1.4, 1.8)
        tag = "easy" if score < 0.35 else "medium" if score < 0.65 else "hard"
        difficulty = {"tag": tag, "score": score, "probabilities": {tag: 1.0}, "judge": "base"}
        rows.append({"id": str(i), "capability": CAPABILITIES[i % 5], "messages": [], "difficulty": difficulty})
    rows.sort(key=lambda row: -row["difficulty"]["score"])
    write_lines(folder / "kept.jsonl", rows[:600])
    write_lines(folder / "dropped.jsonl", rows[600:])


def _write_tuning(root: Path, starts: dict[str, float], rng: random.Random) -> None:
    base = [{"step": 10 * i, "t": starts["base"] + i, "loss": 0.4 + 3 * math.exp(-i / 12)} for i in range(1, 80)]
    sft, dpo = [], []
    for step in range(1, 25):
        loss = 0.62 * math.exp(-step / 9) + 0.41 + rng.gauss(0, 0.02)
        entropy = 0.52 - 0.06 * (1 - math.exp(-step / 8)) + rng.gauss(0, 0.006)
        sft.append(
            {"step": step, "t": starts["sft"] + step / 3, "loss": loss, "entropy": entropy, "tokens": 1110 * step}
        )
        margin = 0.3 * (1 - math.exp(-step / 12)) + rng.gauss(0, 0.02)
        dpo.append({"step": step, "t": starts["dpo"] + step / 3, "loss": 0.693 - margin / 3, "margin": margin,
                    "accuracy": 0.5 + margin, "tokens": 900 * step})  # fmt: skip
    for name, lines in (("base", base), ("sft", sft), ("dpo", dpo)):
        write_lines(root / name / "metrics.jsonl", lines)
    write_lines(root / "dpo" / "pairs.jsonl", [{"reason": "wrong" if i % 5 else "truncated"} for i in range(256)])


def _write_rl(folder: Path, start: float, rng: random.Random) -> list[dict[str, Any]]:
    metrics, events, clock = [], [_busy("engine-0", "generate", start + 3, start + 13)], start + 14.0
    events.append({"t": start + 2, "stage": "rl", "event": "parity", "max_gap": 2.3e-6, "tokens": 1312})
    for step in range(STEPS):
        train, wait = rng.uniform(1.6, 2.4), rng.uniform(0.05, 0.9)
        began, ended = clock + wait, clock + wait + train
        events += [
            _busy("trainer", "train", began, ended),
            _busy("engine-0", "generate", clock, ended - 0.05),
            _busy("engine-0", "update_weights", ended, ended + 0.06),
            _busy("reward", "score", ended - 0.4, ended - 0.1),
        ]
        clock = ended
        pass_rate = 0.36 + 0.3 * (1 - math.exp(-step / 14)) + rng.gauss(0, 0.03)
        metrics.append(_rl_line(step, clock, pass_rate, train, wait, rng))
    events += [{"t": start + 40 + i, "stage": "rl", **fault} for i, fault in enumerate(FAULTS)]
    write_lines(folder / "metrics.jsonl", metrics)
    (folder / "rollouts").mkdir()
    for step in range(STEPS):
        rows = [_rollout(step, 16 * step + i, rng) for i in range(16)]
        parquet.write_table(arrow.Table.from_pylist(rows), folder / "rollouts" / f"step_{step:06d}.parquet")
    parquet.write_table(
        arrow.Table.from_pylist([_profiled(i, rng) for i in range(1500)]), folder / "difficulty.parquet"
    )
    return events


def _busy(actor: str, what: str, start: float, end: float) -> dict[str, Any]:
    return {"t": end, "stage": "rl", "event": "busy", "actor": actor, "what": what, "start": start, "end": end}


def _rl_line(step: int, t: float, pass_rate: float, train: float, wait: float, rng: random.Random) -> dict[str, Any]:
    reward = 0.5 + (pass_rate - 0.5) / 3
    easy, hard, ages = rng.randint(2, 9), rng.randint(6, 13), [rng.choice([0, 1, 1, 2, 3]) for _ in range(32)]
    unscored, share = 25 if step == 20 else 0, step / (STEPS - 1)
    return {
        "step": step, "t": t, "policy_version": step + 1, "reward_mean": reward, "pass_rate": pass_rate,
        **{f"reward/{name}": reward + 0.05 * i - 0.1 + rng.gauss(0, 0.05) for i, name in enumerate(CAPABILITIES)},
        "loss": rng.gauss(0, 0.02), "grad_norm": -1.0 if step == 9 else 0.6, "skipped": int(step == 9),
        "learning_rate": 3e-4, "entropy": 0.48 - 0.005 * step,
        "router_entropy": 1.2, "expert_load_max": 1.9, "dead_experts": int(step == 2),
        "mismatch_kl": abs(rng.gauss(6e-4, 2e-4)), "ess": 0.985 + rng.gauss(0, 0.004), "masked_fraction": 0.004,
        "staleness_mean": sum(ages) / 32, "staleness_max": max(ages),
        **{f"staleness/{age}": ages.count(age) for age in sorted(set(ages))},
        "queue_age_s_mean": rng.uniform(0.2, 0.9), "queue_age_s_max": rng.uniform(1, 3), "places_lent": step % 3,
        "queue_groups": rng.randint(0, 24), "in_flight_groups": rng.randint(24, 48), "groups_trained": 32,
        "groups_generated": 32 + easy + hard, "groups_dropped_zero_advantage": easy + hard,
        "groups_too_easy": easy, "groups_too_hard": hard, "groups_dropped_unscored": 3 if unscored else 0,
        "groups_dropped_truncated": 0, "groups_dropped_stale": int(step > 25), "groups_dropped_lost": int(step == 25),
        "rollouts_unscored": unscored, "unscored_fraction": unscored / 100,
        "prompts_seen": 700 + 20 * step, "prompts_mixed": 540.0 - 9 * step,
        "tokens_trained": 7800 + 60 * step, "tokens_generated": 11000 + 80 * step, "tokens_dropped": 3000,
        "generate_tokens_per_s": 4200 + rng.gauss(0, 220), "step_wall_s": train + wait,
        "idle/trainer": wait / (train + wait), "idle/engine-0": 0.03, "idle/reward": 0.9,
        "train_s": train, "publish_s": 0.05, "wait_s": wait, "reply_tokens_mean": 18 + 0.5 * step,
        "episodes": 40, "episode/turns": 2.5, "episode/tokens": 300.0 + step, "episode/tool_calls": 1.25,
        "episode/malformed_calls": 0.5 * (1 - share), "episode/tool_failures": 0.25,
        "episode/cached": 0.6 + share / 10,
        "dropped_reply_tokens_mean": 15 + 0.6 * step, "truncated_fraction": 0.03,
    }  # fmt: skip


def _profiled(i: int, rng: random.Random) -> dict[str, Any]:
    ease = rng.betavariate(0.6, 0.7)
    passes = sum(rng.random() < ease for _ in range(GROUP))
    return {
        "prompt_id": str(i), "capability": CAPABILITIES[i % 5], "pass_rate": passes / GROUP, "n": GROUP,
        "passes": passes, "policy_version": 0, "selected": 0.1 <= passes / GROUP <= 0.7,
        "band_low": 0.1, "band_high": 0.7,
    }  # fmt: skip


def _rollout(step: int, i: int, rng: random.Random) -> dict[str, Any]:
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(3, 6))]
    total, work = numbers[0], []
    for value in numbers[1:]:
        work.append(f"{total} + {value} = {total + value}")
        total += value
    right = rng.random() < 0.55 and i % 7 != 3
    reply = ", ".join(work) + f". Answer: {total if right else total + 1}"
    if i % 7 == 3:
        reply = f"Answer: {HOSTILE}"
    tokens = [reply[k : k + 3] for k in range(0, len(reply), 3)]
    cut = rng.randint(1, len(tokens) - 1)
    several = [[step, 0, cut], [step + 1, cut, len(tokens)]]
    status = rng.choice(["trained"] * 6 + ["dropped:zero_advantage"] * 3 + ["dropped:unscored"])
    scored = status != "dropped:unscored"
    prompt = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": f"Sum: {numbers}"}]
    return {
        "step": step if status == "trained" else None, "group_id": f"g{i // 8}", "prompt_id": f"sum-{i // 8}",
        "capability": CAPABILITIES[i // 8 % 5], "index": i % 8, "prompt": json.dumps(prompt), "reply": reply,
        "reward": float(right) if scored else None,
        "reason": ("right" if right else f"expected {total}") if scored else "grader timed out",
        "advantage": round(rng.gauss(0, 1), 3) if status == "trained" else None, "finish_reason": "stop",
        "policy_version": step, "versions": json.dumps(several if rng.random() < 0.4 else [[step, 0, len(tokens)]]),
        "num_tokens": len(tokens), "staleness": rng.randint(0, 3) if status == "trained" else None, "status": status,
        "tokens": json.dumps(tokens),
    }  # fmt: skip
