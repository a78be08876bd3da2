"""Run an RL stage in a process of its own, send faults to it, and start it again when it ends.

    python benchmarks/chaos_run.py FOLDER             run the stage of FOLDER
    python benchmarks/chaos_run.py FOLDER SOURCE      replay the steps of SOURCE into FOLDER

    ChaosRun ── starts ──► driver (the controller) ──► Ray ──► engines, reward actor, trainer's rank
       │  ▲                      │ ledger.sqlite, read only: the states of the groups
       │  └──────────────────────┘
       └── SIGKILL, SIGSTOP ──► one of them

The policy is tiny and random. The reward depends on token ids alone, and sleeps, so that a fault can hit a group while
it is scored. Left out: faults of another host, of the disk and of the network.
"""

import contextlib
import json
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
STATES = ("reserved", "generated", "scored", "dropped", "trained", "commit")
# Words in the command line of a victim.
VICTIMS = {
    "engine_core": ("EngineCore",),
    "rollout_actor": ("ray::EngineActor",),
    "reward_process": ("posttrain.scoring.pool.reward_process",),
    "reward_actor": ("ray::RewardActor",),
    "trainer_rank": ("ray::Rank",),
    "controller": (),
    "ray": ("/raylet/raylet", "gcs_server"),
}
REWARD = '''
import time

def even_share(rollout, row):
    """Share of even token ids; a row may ask for a reward that never differs."""
    time.sleep(0.02 * (rollout.token_ids[0] % 5))
    if row.fields.get("flat"):
        return 0.0
    return sum(token % 2 == 0 for token in rollout.token_ids) / len(rollout.token_ids)
'''
LOOK_S = 0.05
QUICK_LOOK_S = 0.005  # a commit does not last long
COUNT_S = 0.3
START_S = 150.0
STRIKE_S = 60.0
END_S = 40.0
SPARE_S = 5.0


@dataclass
class Strike:
    """One fault and its outcome. counts: groups in each state right before it, according to the ledger.

    seconds: time until a group was trained on that was admitted after the fault, or until the run ended. resumed_s:
    time from the next start of the run until such a group was trained on. left: processes of the victim that still
    existed seconds later.
    """

    victim: str
    signal: str
    state: str
    step: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    committing: bool = False
    outcome: str = ""  # survived, resumed, hung, failed
    exit_code: int | None = None
    seconds: float = 0.0
    resumed_s: float | None = None
    orphans: list[str] = field(default_factory=list)


class Ended(Exception):
    """The run has ended."""


class Late(Exception):
    """An expected event did not happen in time."""


def save_policy(folder: Path) -> Path:
    """A random Llama 4 of about 200,000 parameters with the quick start's tokenizer."""
    import torch

    from posttrain.base.config import ModelSizes
    from posttrain.base.model import build_model
    from posttrain.base.tokenizer import build_tokenizer, save_tokenizer

    tokenizer = build_tokenizer()
    sizes = ModelSizes(hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=128, expert_ffn=96)
    model = build_model(sizes, tokenizer, 0.0, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # otherwise all tokens would be about equally likely
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def write_stage(folder: Path, model: Path, steps: int, *, seed: int = 3, **changes: Any) -> Path:
    """Write the files that the driver needs to run the stage in `folder`. changes: keys of the config to set."""
    from posttrain.config.base import dump_yaml, validate_config
    from posttrain.rl.config import RlConfig

    folder.mkdir(parents=True)
    inputs = folder.with_name(f"{folder.name}-inputs")
    inputs.mkdir()
    (inputs / "reward.py").write_text(REWARD)
    rows = [
        {"id": f"p{index}", "capability": "math", "messages": [{"role": "user", "content": f"sum {index}"}]}
        | ({"flat": True} if index % 6 == 5 else {})
        for index in range(24)
    ]
    (inputs / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {"path": str(inputs / "prompts.jsonl")},
        "reward": {"name": f"{inputs}/reward.py:even_share", "workers": 2, "timeout_s": 3},
        "steps": steps,
        "groups_per_step": 4,
        "group_size": 4,
        "max_staleness": 2,
        "sampling": {"max_tokens": 64},
        "optimizer": {"learning_rate": 1e-4},
        "engine": {"max_model_len": 256, "kv_cache_gib": 0.1, "deadline_s": 3, "stream_interval": 8},
        "trainer_deadline_s": 15,
        "checkpoint_every": 2,
        "resources": {"rollout": {"cpus": 0.5}},
        **changes,
    }
    config = validate_config(RlConfig, data, "chaos")
    (folder / "config.yaml").write_text(dump_yaml(config))
    (inputs / "run.json").write_text(json.dumps({"config": config.model_dump(), "seed": seed}))
    return folder


class ChaosRun:
    """A run of the stage in `folder`, which `write_stage` made. `close` ends all processes that are left of it."""

    def __init__(self, folder: Path, random: Random):
        self.folder = folder
        self.lives = 0
        self._random = random
        self._mark = secrets.token_hex(8)
        self._driver: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._seen: set[psutil.Process] = set()
        self._sessions: dict[str, str] = {}  # name of the session: its temporary folder
        self._counted = 0.0

    # ------------------------------------------------------------------ start and end

    def start(self) -> None:
        """Start the driver. It continues from the last commit of the one before."""
        self.lives += 1
        self._began = time.time()
        self._driver = self._spawn(str(self.folder))

    def _spawn(self, *arguments: str) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "POSTTRAIN_CHAOS": self._mark, "OMP_NUM_THREADS": "1"}
        with self.folder.with_name(f"{self.folder.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, __file__, *arguments],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def exit_code(self) -> int | None:
        """The exit code of the driver; None while it runs."""
        assert self._driver is not None
        return self._driver.poll()

    def finish(self, deadline_s: float) -> int | None:
        """Wait for the driver to end and return its exit code; None if that takes too long."""
        with contextlib.suppress(Late):
            self._until(lambda: self.exit_code is not None, deadline_s, may_end=True)
        return self.exit_code

    def replay(self, deadline_s: float) -> dict[str, Any]:
        """The result of `posttrain.rl.history.replay` for the finished run."""
        folder = self.folder.with_name(f"{self.folder.name}-replay")
        again = self._spawn(str(folder), str(self.folder))
        self._driver = again
        self.finish(deadline_s)
        result = folder / "result.json"
        return json.loads(result.read_text()) if again.returncode == 0 else {"weights_equal": None}

    # ------------------------------------------------------------------ a fault

    def strike(self, strike: Strike, deadline_s: float) -> Strike:
        """Wait for the state, send the signal, and wait until the run continues, by itself or started again.

        Raises Ended or Late if the state did not occur; then no signal was sent.
        """
        self._until(lambda: self._trained_since(self._began), START_S)
        dropped, trained = self._counts()["dropped"], self._last_step()
        victims = [psutil.Process(self._driver.pid)] if self._driver and strike.victim == "controller" else []

        def is_time() -> bool:
            nonlocal victims
            counts = self._counts()
            if strike.state == "commit":
                there = self._is_committing()
            elif strike.state == "dropped":
                there = counts["dropped"] > dropped
            else:
                there = counts[strike.state] > 0
            if there and not victims:
                victims = self._victims(strike.victim)
            return there and bool(victims)

        self._until(is_time, STRIKE_S, look_s=QUICK_LOOK_S)
        below = {child for victim in victims for child in victim.children(recursive=True)}
        strike.counts, strike.committing = dict(self._counts()), self._is_committing()
        strike.step = trained
        sent = time.time()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(SIGNALS[strike.signal])
        is_whole = strike.victim in ("controller", "ray")
        try:
            self._until(partial(self._trained_since, sent), deadline_s)
            strike.outcome = "survived"
        except Ended:
            strike.exit_code = self.exit_code
            strike.outcome = "survived" if strike.exit_code == 0 else "failed"
        except Late:
            strike.outcome = "hung"
        strike.seconds = round(time.time() - sent, 2)
        if strike.outcome == "survived" and strike.exit_code is None and not is_whole:
            strike.orphans = self._alive_after({*victims, *below}, SPARE_S)
        if strike.outcome != "survived":
            if strike.outcome == "hung":
                self.close()
            else:
                strike.orphans = self.orphans()
            self.start()
            again = self._began
            with contextlib.suppress(Ended, Late):
                self._until(lambda: self.exit_code == 0 or self._trained_since(again), START_S)
                if strike.outcome == "failed":
                    strike.outcome = "resumed"
                strike.resumed_s = round(time.time() - again, 2)
        return strike

    def _victims(self, name: str) -> list[psutil.Process]:
        words = VICTIMS[name]
        found = []
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline()) or process.name()
                if any(word in command or word in process.name() for word in words):
                    found.append(process)
        if name == "ray":
            return found
        return [self._random.choice(sorted(found, key=lambda process: process.pid))] if found else []

    # ------------------------------------------------------------------ what can be seen from outside

    def _until(self, holds: Any, deadline_s: float, may_end: bool = False, *, look_s: float = LOOK_S) -> None:
        end = time.monotonic() + deadline_s
        while not holds():
            if not may_end and self.exit_code is not None:
                raise Ended
            if time.monotonic() > end:
                raise Late
            if time.monotonic() - self._counted > COUNT_S:
                self._note_processes()
            time.sleep(look_s)

    def _read(self, sql: str, *values: Any) -> list[Any]:
        path = self.folder / "ledger.sqlite"
        if not path.exists():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1)) as connection:
                return connection.execute(sql, values).fetchall()
        except sqlite3.OperationalError:  # the database is being made or recovered
            return []

    def _counts(self) -> Counter[str]:
        return Counter(dict(self._read("SELECT state, count(*) FROM groups GROUP BY state")))

    def _last_step(self) -> int:
        rows = self._read("SELECT coalesce(max(step), 0) FROM groups WHERE state IN ('trained', 'committed')")
        return rows[0][0] if rows else 0

    def _trained_since(self, moment: float) -> bool:
        """True if a group is trained that was admitted after a moment: since then every part of the run has worked."""
        return bool(
            self._read(
                "SELECT 1 FROM groups JOIN log ON log.id = groups.id WHERE state IN ('trained', 'committed') AND "
                "event IN ('reserved', 'restarted') AND time > ? LIMIT 1",
                moment,
            )
        )

    def _is_committing(self) -> bool:
        return any((self.folder / "checkpoints").glob(".*"))

    def _family(self) -> list[psutil.Process]:
        assert self._driver is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._driver.pid).children(recursive=True)
        return []

    def _note_processes(self) -> None:
        self._counted = time.monotonic()
        for process in self._family():
            if process in self._seen:
                continue
            self._seen.add(process)
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if any(part.endswith("watchdog.py") for part in command):
                    self._sessions[command[-2]] = command[-1]

    def _marked(self) -> set[psutil.Process]:
        """Processes with the run's mark in their environment, or in the session of one of its drivers."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("POSTTRAIN_CHAOS") == self._mark:
                    found.add(process)
        return found

    def _alive_after(self, processes: set[psutil.Process], wait_s: float) -> list[str]:
        end = time.monotonic() + wait_s
        while (alive := [process for process in processes if _is_alive(process)]) and time.monotonic() < end:
            time.sleep(0.1)
        return [_described(process) for process in alive]

    def orphans(self) -> list[str]:
        """List and remove what a driver that has ended left: processes, shared memory, temporary folders."""
        end = time.monotonic() + END_S
        while left := [process for process in self._seen | self._marked() if _is_alive(process)]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        found = [_described(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        keys = {*self._sessions, *(str(process.pid) for process in self._seen)}
        segments = [path for path in Path("/dev/shm").iterdir() if keys & set(path.name.split("-"))]
        folders = [path for path in map(Path, self._sessions.values()) if path.exists()]
        time_left = time.monotonic() + SPARE_S  # the watchdog removes files after the last process
        while (segments or folders) and time.monotonic() < time_left:
            time.sleep(0.1)
            segments = [path for path in segments if path.exists()]
            folders = [path for path in folders if path.exists()]
        for path in segments:
            path.unlink(missing_ok=True)
        self._seen.clear()
        self._sessions.clear()
        return found + [str(path) for path in (*segments, *folders)]

    def close(self) -> None:
        """End all processes that are left."""
        if self._driver is not None and self._driver.poll() is None:
            self._note_processes()
            self._driver.kill()
            self._driver.wait()
        self.orphans()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())[:80] or process.name()}"
    except psutil.NoSuchProcess:
        return f"{process.pid}"


# ---------------------------------------------------------------------- in the driver


def drive(folder: Path, source: Path | None) -> None:
    """Run the stage, or replay the steps of `source`."""
    from posttrain.config.base import validate_config
    from posttrain.context import StageContext
    from posttrain.errors import PosttrainError
    from posttrain.pipeline.ray_session import ray_session
    from posttrain.rl.config import RlConfig
    from posttrain.rl.history.replay import replay
    from posttrain.rl.stage import run

    wanted = source or folder
    made = json.loads((wanted.with_name(f"{wanted.name}-inputs") / "run.json").read_text())
    config = validate_config(RlConfig, made["config"], "chaos")
    folder.mkdir(exist_ok=True)
    context = StageContext("rl", folder, folder / "events.jsonl", seed=made["seed"])
    try:
        with ray_session():
            if source is None:
                run(config, context)
            else:
                (folder / "result.json").write_text(json.dumps(replay(config, context, source)))
    except PosttrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def as_json(strike: Strike) -> dict[str, Any]:
    """A fault as plain data, for JSON."""
    return asdict(strike)


if __name__ == "__main__":
    drive(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
