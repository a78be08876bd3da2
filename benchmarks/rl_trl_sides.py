"""The two sides of rl_trl.py: a training of ours or of TRL, each launched as a process, and what its policies reach."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from rl_trl_races import OUR_ARMS, PeerSetting, Race

from posttrain.base.cache import cache_key, fetch, store
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
MAX_POINTS = 10  # policies that are evaluated of each training
BASE_LIMIT_S, OURS_LIMIT_S, PEER_START_S = 600.0, 800.0, 120.0


def make_base(folder: Path, race: Race) -> tuple[Path, dict[str, Path]]:
    """The model from which both start, trained once, and the datasets, the same for every seed."""
    data = write_sets(
        draw_sets(0, race.base.sets, race.puzzles), folder / "data", 0, puzzles=race.puzzles, with_systems=False
    )
    model = folder / "base"
    if model.exists():
        return model, data
    scripts = b"".join((HERE / name).read_bytes() for name in ("rl_trl_base.py", "rl_trl_puzzles.py"))
    key = f"{cache_key(race.base, 0)}-{race.course}-{sha256(scripts).hexdigest()[:8]}"
    if not fetch(key, model):
        spec = {"config": race.base.model_dump(mode="json"), "seed": 0, "out": str(model), "parent": os.getpid()}
        place = folder / "base_training"
        place.mkdir(parents=True, exist_ok=True)
        (place / "spec.json").write_text(json.dumps({**spec, "course": race.course}))
        run_process([str(HERE / "rl_trl_base.py"), str(place / "spec.json")], place, limit_s=BASE_LIMIT_S)
        store(key, model)
    return model, data


def train_ours(folder: Path, race: Race, arm: str, *, base: tuple[Path, dict[str, Path]], seed: int) -> dict[str, Any]:
    """Run `posttrain rl` as it is. Its policies are made afterwards, by a replay of its recorded steps."""
    model, data = base
    given = {"model": _served(model), "prompts": {"path": str(data["prompts"])}}
    settings = {**race.ours, **OUR_ARMS[arm], **given}
    config = validate_config(RlConfig, settings, "benchmark")
    folder.mkdir(parents=True)
    (folder / "rl.yaml").write_text(yaml.safe_dump(settings))
    run = folder / "run"
    command = ["-m", "posttrain.cli.main", "rl", str(folder / "rl.yaml"), "--run-dir", str(run), "--seed", str(seed)]
    launched = run_process(command, folder, limit_s=OURS_LIMIT_S)
    events = [event for event in read_jsonl(run / "events.jsonl") if event.get("stage") == "rl"]
    began = next(event["t"] for event in events if event["event"] == "engines")
    ended = [event["end"] for event in events if event["event"] == "busy" and event["what"] == "train"]
    steps = list(read_jsonl(run / "rl" / "metrics.jsonl"))
    points, every = [], -(-config.steps // MAX_POINTS)
    with ray_session():
        trainer = TrainerClient(config, seed)
        try:
            for recorded in recorded_steps(run / "rl"):
                trainer.step(recorded.samples, recorded.step)
                done = recorded.step + 1
                if done % every == 0 or done == config.steps:
                    path = folder / f"step_{done}"
                    trainer.save(path)
                    points.append({"step": done, "seconds": ended[done - 1] - launched, "model": path})
        finally:
            trainer.close()
    if weight_gaps(run / "rl" / "model", points[-1]["model"]):
        raise StageError("our steps, done again, gave other weights than the run")
    return {
        "startup_s": began - launched,
        "first_step_s": ended[0] - launched,
        "trained_s": ended[-1] - launched,
        "steps": config.steps,
        "tokens": steps[-1]["tokens_sampled_total"],
        "replies_per_s": race.replies * (len(ended) - 1) / (ended[-1] - ended[0]),
        "points": points,
    }


def train_peer(
    folder: Path, race: Race, setting: PeerSetting, *, base: tuple[Path, dict[str, Path]], seed: int, seconds: float
) -> dict[str, Any]:
    """Train with TRL on the same prompts for a number of seconds. Its clock stands while it saves policies."""
    model, data = base
    folder.mkdir(parents=True)
    spec = {
        "model": str(model), "prompts": str(data["prompts"]), "out": str(folder), "seed": seed, "seconds": seconds,
        "every": race.every, "threads": setting.threads, "settings": {**race.peer, **setting.settings},
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    launch = []
    if setting.processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setting.processes)]
    command = [*launch, str(HERE / "rl_trl_peer.py"), str(folder / "spec.json")]
    launched = run_process(command, folder, limit_s=seconds + PEER_START_S, threads=setting.threads)
    lines = list(read_jsonl(folder / "steps.jsonl"))
    if len(lines) < 2:
        raise StageError(f"TRL did {len(lines)} steps in {seconds:.0f} s; its log is\n{_tail(folder / 'log.txt')}")
    startup = json.loads((folder / "began.json").read_text())["time"] - launched
    saved = [{**line, "seconds": startup + line["seconds"], "model": folder / f"step_{line['step']}"} for line in lines]
    saved = [line for line in saved if line["model"].is_dir()]
    # As many policies as of ours, evenly spread over the time, and always the last one.
    picked = {round((index + 1) * len(saved) / MAX_POINTS) - 1 for index in range(MAX_POINTS)} - {-1}
    generations = lines[:: setting.settings.get("steps_per_generation", 1)]
    timed = generations if len(generations) > 1 else lines
    return {
        "startup_s": startup,
        "first_step_s": startup + lines[0]["seconds"],
        "trained_s": startup + lines[-1]["seconds"],
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "replies_per_s": race.replies * (timed[-1]["step"] - timed[0]["step"])
        / (timed[-1]["seconds"] - timed[0]["seconds"]),
        "points": [saved[index] for index in sorted(picked)],
    }  # fmt: skip


def curve(
    folder: Path, race: Race, points: Sequence[dict[str, Any]], *, base: tuple[Path, dict[str, Path]]
) -> list[list[float]]:
    """[step, seconds since the launch, greedy accuracy on the held-out puzzles] of the base and of each policy."""
    from posttrain.eval.stage import run

    model, data = base
    given = {
        "data": {"path": str(data["heldout"])}, "samples": 0,
        **{key: race.ours[key] for key in ("reward", "sampling", "engine")},
        "resources": {"rollout": race.ours["resources"]["rollout"]},
    }  # fmt: skip
    found = []
    folder.mkdir()
    with ray_session():
        for point in [{"step": 0, "seconds": 0.0, "model": model}, *points]:
            config = validate_config(EvalConfig, {**given, "model": _served(point["model"])}, "benchmark")
            context = StageContext("eval", folder, folder / "eval.jsonl", warm_engines=True)
            accuracy = run(config, context)["stats"]["greedy"]
            found.append([point["step"], round(point["seconds"], 2), accuracy])
    return found


def run_process(command: Sequence[str], folder: Path, *, limit_s: float, threads: int = 1) -> float:
    """Run a Python process to its end; returns the Unix time of its launch. Its output goes to log.txt in the folder.

    Raises StageError, with the end of its log, if it fails or takes longer than the limit.
    """
    log = folder / "log.txt"
    left_out = ("ACCELERATE_", "RAY_", "POSTTRAIN_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), environment.get("PYTHONPATH")]))
    with log.open("w") as output:
        launched = time.time()
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise StageError(f"{command} was not done in {limit_s:.0f} s; its log ends\n{_tail(log)}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise StageError(f"{command} ended with {code}; its log ends\n{_tail(log)}")
    return launched


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _served(path: Path) -> dict[str, str]:
    return {"path": str(path), "dtype": "float32"}
