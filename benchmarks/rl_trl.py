"""Figure of rl.py for RL as a whole: this package's stage compared with TRL's GRPOTrainer.

  trl_speedup   wall time of TRL's training until its policy has the target accuracy / the same time of ours; the median
                over the seeds

Both train the same LlamaForCausalLM of a million parameters in fp32. It was trained once from random weights on the
quick start's text, is the same for every seed, and is kept in $POSTTRAIN_CACHE. Both use the quick start's puzzles and
its scorer, 256 replies a step, 8 for each prompt, of at most 64 tokens, and the same learning rates of AdamW. A seed
decides sampling and the order of prompts.

Ours is configs/quickstart/rl.yaml without its system instructions, and with a profile of 600 prompts. Our clock starts
before it. TRL is given the result: it trains on the prompts that the profile selected. (The tokens of the profile are
not in `ours_tokens`.) TRL's clock starts with its training, and stops while it saves policies. `ratio_with_startup`
includes the start of processes and engines and imports, on both sides. Our run saves no policies. They are made
afterwards, by a replay of its recorded steps, which on a CPU gives the same weights; this is checked.

Then one evaluation measures the policies of both, greedy, on the 400 held-out puzzles. The target is the accuracy of
the base plus GAIN_SHARE of the largest gain of ours. The time at which it was reached is interpolated between two
policies. If TRL has not reached it in $TRL_SECONDS (240) of training, the ratio is a lower bound, and is counted in
`lower_bounds`.

TRL's settings: each of `PEER_SETTINGS` is tried for TRIAL_S seconds on the machine of the benchmark, and the one that
trains on the most replies a second is used for all seeds. Results of earlier trials, on two cores that other programs
used too (load 4 to 15, so the figures are rough):

  one process of one thread               4.2 to 13 s a step of 256 replies
  one process of two threads              3.5 s; far slower if other programs use the cores
  two processes of one thread, gloo       2.3 s at load 3.5, 5.3 s at load 13
  static cache                            19 s for the first step at load 15; tried on each machine
  four steps on one generation            first generation of 1,024 replies in 52 s at load 10; tried on each machine
  continuous batching (transformers)      82 s for the first step: never the fastest
  use_vllm, colocate (vLLM 0.32 for CPUs) starts, then fails at its first weight update: "AttributeError: 'Parameter'
                                          object has no attribute 'weight_loader'"; vLLM packs its CPU layers once
                                          they are loaded, and load_weights alone cannot fill them again

Gradient checkpointing, bf16 and the KL penalty are off; the loss is TRL's default (dapo). Another learning rate was
not tried for TRL.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from posttrain.base.cache import cache_key, fetch, store
from posttrain.base.config import StageConfig
from posttrain.base.sets import draw_sets, write_sets
from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.eval.config import EvalConfig
from posttrain.files import read_jsonl
from posttrain.pipeline.ray_session import ray_session
from posttrain.rl.config import RlConfig
from posttrain.rl.history.replay import recorded_steps, weight_gaps
from posttrain.rl.training.client import TrainerClient

HERE = Path(__file__).parent
SEEDS = tuple(int(seed) for seed in os.environ.get("TRL_SEEDS", "0,1,2").split(","))
GAIN_SHARE = 0.8  # the target is the base plus this share of the largest gain of ours
PEER_S = float(os.environ.get("TRL_SECONDS", "240"))  # seconds of training for each seed
TRIAL_S = 25.0
REPLIES = 256  # replies of a step, of both
MAX_POINTS = 10  # policies that are evaluated for each side and seed
BASE_LIMIT_S, PEER_START_S = 600.0, 120.0

BASE = StageConfig(steps=1300)
RATE = 4e-4
ENGINE = {"max_model_len": 192, "max_num_seqs": 512, "kv_cache_gib": 0.1}
ROLLOUT = {"workers": 1, "cpus": 1.0}
SAMPLING = {"temperature": 1.0, "max_tokens": 64}
# configs/quickstart/rl.yaml without its system instructions, and with a profile, whose prompts both sides train on.
OURS: dict[str, Any] = {
    "profile": {"samples": 8, "prompts": 600, "band": [0.1, 0.7]}, "selection": {"draw": "in_turn"},
    "steps": 36, "groups_per_step": 32, "group_size": 8, "max_staleness": 3,
    "sampling": SAMPLING, "micro_batch_tokens": 2048, "engine": ENGINE,
    "optimizer": {"learning_rate": RATE, "schedule": "constant", "warmup_steps": 4},
    "checkpoint_every": 1000, "resources": {"rollout": ROLLOUT, "trainer": {"cpus": 1.0}},
}  # fmt: skip
# Settings of GRPOConfig. The optimizer is set as ours; its warm-up is one step shorter, because TRL's begins with a
# rate of 0. Everything that costs time and is not needed is off.
PEER: dict[str, Any] = {
    "learning_rate": RATE, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "adam_beta2": 0.95,
    "num_generations": 8, "max_completion_length": 64, "temperature": 1.0, "beta": 0.0,
    "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip


@dataclass(frozen=True)
class PeerSetting:
    """How TRL runs: `processes` with `threads` threads each. settings: of GRPOConfig, in addition to `PEER`."""

    processes: int
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)


# Settings on which TRL's speed may depend, each with 256 replies a step, as ours. The fastest in a short trial is used.
PEER_SETTINGS = {
    "one_process": PeerSetting(1, 2, {"per_device_train_batch_size": 256}),
    "two_processes": PeerSetting(2, 1, {"per_device_train_batch_size": 128}),
    "static_cache": PeerSetting(1, 2, {"per_device_train_batch_size": 256, "cache_implementation": "static"}),
    # At most as stale as ours: four steps on 1,024 replies of one policy.
    "four_steps": PeerSetting(1, 2, {"per_device_train_batch_size": 256, "steps_per_generation": 4}),
}


@dataclass
class Training:
    """One training: its saved policies, as {step, seconds, tokens, model, accuracy}, and the time before it."""

    startup_s: float
    points: list[dict[str, Any]]
    steps: int
    tokens: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def best(self) -> float:
        return max(point["accuracy"] for point in self.points)

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds until the accuracy was first reached, interpolated linearly between two policies; None: never."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if after["accuracy"] >= accuracy:
                share = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
                return before["seconds"] + share * (after["seconds"] - before["seconds"])
        return None


def trl_speedup() -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, data = dense_base(folder)
        pairs = []
        chosen = ""
        trials: dict[str, float] = {}
        for seed in SEEDS:
            ours = train_ours(folder / f"ours_{seed}", model, data["prompts"], seed=seed)
            ids = selected(folder / f"ours_{seed}")
            if not chosen:
                trials = {
                    name: _trial(folder / f"trial_{name}", model, data["prompts"], ids=ids, setting=setting)
                    for name, setting in PEER_SETTINGS.items()
                }
                chosen = max(trials, key=lambda name: trials[name])
                if not trials[chosen]:
                    raise StageError("TRL ran with none of its settings")
                print(f"TRL, replies/s in {TRIAL_S:.0f} s: {_rounded(trials)}; trains as {chosen}", flush=True)
            setting = PEER_SETTINGS[chosen]
            peer = train_peer(
                folder / f"trl_{seed}", model, data["prompts"], ids=ids, seed=seed, seconds=PEER_S, setting=setting
            )
            pairs.append((ours, peer))
        evaluate(folder, model, pairs, heldout=data["heldout"])
        found = [_compared(seed, ours, peer) for seed, (ours, peer) in zip(SEEDS, pairs, strict=True)]
    for line in found:
        print("  ".join(f"{name} {value}" for name, value in line.items() if not name.endswith("_curve")), flush=True)
    ratios = [line["ratio"] for line in found]
    settings = {**PEER, **setting.settings, "processes": setting.processes, "threads": setting.threads}
    print(f"TRL's settings: {settings}\nours: {OURS}", flush=True)
    return median(ratios), {
        "min": min(ratios),
        "max": max(ratios),
        "median_with_startup": median(line["ratio_with_startup"] for line in found),
        "lower_bounds": sum(line["is_lower_bound"] for line in found),
        "seeds": found,
        "trl_trials_replies_per_s": _rounded(trials),
        "trl_settings": settings,
        "our_settings": OURS,
    }


def _compared(seed: int, ours: Training, peer: Training) -> dict[str, Any]:
    """The figures of a seed. A peer that never reached the target counts as if its last policy had: a lower bound."""
    base = ours.points[0]["accuracy"]
    target = base + GAIN_SHARE * (ours.best - base)
    if ours.best - base < 0.05:
        raise StageError(f"seed {seed}: our policy went from {base:.1%} to {ours.best:.1%}; nothing to be compared")
    ours_s, peer_s = ours.seconds_to(target), peer.seconds_to(target)
    assert ours_s is not None
    reached_s = peer.points[-1]["seconds"] if peer_s is None else peer_s
    figures = {
        "seed": seed,
        "ratio": reached_s / ours_s,
        "is_lower_bound": peer_s is None,
        "ratio_with_startup": (reached_s + peer.startup_s) / (ours_s + ours.startup_s),
        "base": base,
        "target": target,
        **{
            f"{name}_{key}": value
            for name, side, seconds in (("ours", ours, ours_s), ("trl", peer, peer_s))
            for key, value in {
                "s": seconds, "startup_s": side.startup_s, "trained_s": side.seconds, "steps": side.steps,
                "tokens": side.tokens, "tokens_per_s": side.tokens_per_s, "best": side.best,
                "last": side.points[-1]["accuracy"],
                "curve": [(p["step"], round(p["seconds"], 1), p["accuracy"]) for p in side.points],
            }.items()
        },
    }  # fmt: skip
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


# ---------------------------------------------------------------------- the two sides


def dense_base(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The model from which both start, trained once, and the quick start's datasets of seed 0, for every seed here."""
    data = write_sets(draw_sets(0, BASE.sets), folder / "data", 0)
    script, model = HERE / "rl_trl_base.py", folder / "base"
    key = f"{cache_key(BASE, 0)}-{sha256(script.read_bytes()).hexdigest()[:8]}"
    if not fetch(key, model):
        spec = {"config": BASE.model_dump(mode="json"), "seed": 0, "out": str(model), "parent": os.getpid()}
        _run_script(script, spec, folder / "base_training", limit_s=BASE_LIMIT_S)
        store(key, model)
    return model, data


def train_ours(folder: Path, model: Path, prompts: Path, *, seed: int) -> Training:
    """Run our stage as it is. Its policies are made afterwards, by a replay of its recorded steps."""
    from posttrain.rl.stage import run

    given = {"model": _served(model), "prompts": {"path": str(prompts)}, "reward": {"name": "puzzles"}}
    config = validate_config(RlConfig, {**OURS, **given}, "benchmark")
    folder.mkdir()
    context = StageContext("rl", folder, folder / "events.jsonl", seed)
    with ray_session():
        started = time.time()
        run(config, context)
        events = list(read_jsonl(context.events))
        began = next(event["t"] for event in events if event["event"] == "profile")
        ended = [event["end"] for event in events if event["event"] == "busy" and event["what"] == "train"]
        trainer = TrainerClient(config, seed)
        points = []
        every = -(-config.steps // MAX_POINTS)
        try:
            for recorded in recorded_steps(folder):
                trainer.step(recorded.samples, recorded.step)
                step = recorded.step + 1
                if step % every == 0 or step == config.steps:
                    path = folder / f"step_{step}"
                    trainer.save(path)
                    points.append({"step": step, "seconds": ended[step - 1] - began, "model": path})
        finally:
            trainer.close()
    if weight_gaps(folder / "model", points[-1]["model"]):
        raise StageError("our steps, done again, gave other weights than the run")
    generated = [line["tokens_generated"] for line in read_jsonl(folder / "metrics.jsonl")]
    return Training(began - started, points, config.steps, float(sum(generated)), ended[-1] - began)


def selected(folder: Path) -> list[str]:
    """The prompts that our profile selected."""
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "difficulty.parquet", columns=["prompt_id", "selected"]).to_pylist()
    return [row["prompt_id"] for row in rows if row["selected"]]


def train_peer(
    folder: Path, model: Path, prompts: Path, *, ids: Sequence[str], seed: int, seconds: float, setting: PeerSetting
) -> Training:
    """Train with TRL on the prompts of these ids for a number of seconds."""
    spec = {
        "model": str(model), "prompts": str(prompts), "ids": list(ids), "out": str(folder), "seed": seed,
        "seconds": seconds, "every": 2, "threads": setting.threads, "settings": {**PEER, **setting.settings},
    }  # fmt: skip
    launch = []
    if setting.processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setting.processes)]
    started = time.time()
    _run_script(
        HERE / "rl_trl_peer.py", spec, folder, limit_s=seconds + PEER_START_S, threads=setting.threads, launch=launch
    )
    lines = list(read_jsonl(folder / "steps.jsonl"))
    if len(lines) < 2:
        raise StageError(f"TRL did {len(lines)} steps in {seconds:.0f} s; its log is\n{_tail(folder / 'log.txt')}")
    began = json.loads((folder / "began.json").read_text())["time"]
    saved = [{**line, "model": folder / f"step_{line['step']}"} for line in lines]
    saved = [line for line in saved if line["model"].is_dir()]
    # As many policies as of ours, evenly spread over the time, and always the last one.
    picked = {round((index + 1) * len(saved) / MAX_POINTS) - 1 for index in range(MAX_POINTS)} - {-1}
    points = [saved[index] for index in sorted(picked)]
    return Training(began - started, points, lines[-1]["step"], lines[-1]["tokens"], lines[-1]["seconds"])


def _trial(folder: Path, model: Path, prompts: Path, *, ids: Sequence[str], setting: PeerSetting) -> float:
    """Replies a second that are trained on, without the first generation, a warm-up; 0 if the setting does not run."""
    try:
        train_peer(folder, model, prompts, ids=ids, seed=0, seconds=TRIAL_S, setting=setting)
    except StageError as error:
        print(f"{folder.name}: {error}", flush=True)
        return 0.0
    lines = list(read_jsonl(folder / "steps.jsonl"))[:: setting.settings.get("steps_per_generation", 1)]
    if len(lines) < 2:
        print(f"{folder.name}: less than two generations in {TRIAL_S:.0f} s", flush=True)
        return 0.0
    return REPLIES * (lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["seconds"] - lines[0]["seconds"])


def evaluate(folder: Path, model: Path, pairs: Sequence[tuple[Training, Training]], *, heldout: Path) -> None:
    """Add greedy accuracy on the held-out set to every point. All have the same engines and scorer."""
    from posttrain.eval.stage import run

    with ray_session():

        def accuracy(policy: Path) -> float:
            data = {
                "model": _served(policy), "data": {"path": str(heldout)}, "reward": {"name": "puzzles"}, "samples": 0,
                "sampling": SAMPLING, "engine": ENGINE, "resources": {"rollout": ROLLOUT},
            }  # fmt: skip
            config = validate_config(EvalConfig, data, "benchmark")
            context = StageContext("eval", folder, folder / "eval.jsonl", warm_engines=True)
            return run(config, context)["stats"]["greedy"]

        base = {"step": 0, "seconds": 0.0, "accuracy": accuracy(model)}
        for training in (training for pair in pairs for training in pair):
            for point in training.points:
                point["accuracy"] = accuracy(point.pop("model"))
            training.points.insert(0, dict(base))


# ---------------------------------------------------------------------- processes


def _run_script(
    script: Path, spec: dict[str, Any], folder: Path, *, limit_s: float, threads: int = 1, launch: Sequence[str] = ()
) -> None:
    """Run a script of this folder with its spec. Raises StageError, with the end of its log, if the script fails."""
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    log = folder / "log.txt"
    left_out = ("ACCELERATE_", "RAY_", "POSTTRAIN_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), environment.get("PYTHONPATH")]))
    command = [sys.executable, *launch, str(script), str(folder / "spec.json")]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise StageError(f"{script.name} was not done in {limit_s:.0f} s; its log ends\n{_tail(log)}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise StageError(f"{script.name} ended with {code}; its log ends\n{_tail(log)}")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _served(path: Path) -> dict[str, str]:
    return {"path": str(path), "dtype": "float32"}


def _rounded(values: dict[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in values.items()}
