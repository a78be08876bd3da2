"""Runs that die before one write to the disk: `python tests/ledger_lives.py FOLDER` prints what audits find, as JSON.

Everything that writes is real: the loop of steps, book, ledger, archive, checkpoints, resume. Engines and trainer
answer at once. A life of a run is a process. It sends itself SIGKILL when it is about to commit to a ledger, or to
rename, remove or make a file or folder: before the first such write, before the second, and so on, until one reaches
the end.

  first    a new run dies at each of its writes; it is audited as it was left, and again when a second life has ended it
  second   a run that made steps without a commit dies; its second life dies at each of its writes, and a third ends it
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.dataset  # noqa: F401  # here, because each life would import it otherwise

from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.base import dump_yaml, validate_config
from posttrain.config.rewards import SystemsConfig
from posttrain.context import StageContext
from posttrain.files import write_text
from posttrain.records import FinishReason, Message, Outcome, Row, Segment, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.groups import drop_reason
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.history.recovery import open_ledger
from posttrain.rl.loop.controller import Controller
from posttrain.rl.loop.parts import Parts
from posttrain.rl.loop.resume import resume
from posttrain.rl.loop.steps import wake_all
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Admission, Group, ScoredGroup, make_group
from posttrain.rl.training.protocol import StepResult
from posttrain.sampling.manifests import WeightManifest
from posttrain.sampling.rollouts import Reply

STEPS, BATCH, CHECKPOINT_EVERY = 3, 2, 2
ROWS = [Row(f"p{index}", "sums", (Message("user", f"{index} + 1 ="),), str(index + 1)) for index in range(40)]
TOKENIZER = build_tokenizer()
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")  # audit events of the interpreter


class ReadyTrainer:
    """Takes the place of a `TrainerClient`; a step takes no time."""

    async def async_step(self, samples: Sequence[Any], step: int) -> StepResult:
        await asyncio.sleep(0)
        return StepResult({}, WeightManifest("none", step + 1, 0, "none", ()), 0.0, 0.0)

    async def async_save_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        aside = folder.with_name(f".{folder.name}")
        aside.mkdir(exist_ok=True)
        (aside / "state.json").write_text(json.dumps(state))
        aside.rename(folder)

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        return json.loads((folder / "state.json").read_text())


def config_of(deterministic: bool) -> RlConfig:
    data = {
        "model": {"path": "model"}, "prompts": {"path": "prompts.jsonl"}, "reward": {"name": "math"}, "group_size": 2,
        "groups_per_step": BATCH, "steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "deterministic": deterministic,
        "max_staleness": 0 if deterministic else 1, "selection": {"draw": "in_turn"},
    }  # fmt: skip
    return validate_config(RlConfig, data, "test")


def scored(group: Group, config: RlConfig) -> ScoredGroup:
    """The group with its rewards. Those of every third prompt are equal, so it is dropped."""
    second = float(int(group.prompt.row.id[1:]) % 3 == 0)
    advantages = (0.5 - second / 2, second / 2 - 0.5)
    return ScoredGroup(group, (1.0, second), ("", ""), advantages, (Outcome.SCORED, Outcome.SCORED))


class Life:
    """One life of the run in `folder`: from the last commit to the last step."""

    def __init__(self, folder: Path, deterministic: bool):
        self.config = config_of(deterministic)
        write_text(folder / "config.yaml", dump_yaml(self.config))
        context = StageContext("rl", folder, folder / "events.jsonl", 0)
        source = PromptSource(ROWS, SystemsConfig(), lambda row, messages: [1, 2, 3], seed=0)
        self.archive = RolloutArchive(folder / "rollouts", TOKENIZER)
        self.ledger = open_ledger(folder)
        engines: Any = SimpleNamespace(names=[], seats=(), actors=[], logs={}, places=[])
        trainer: Any = ReadyTrainer()
        parts = Parts(engines, trainer, None, source, {"sums": 1.0}, self.archive, self.ledger, ())
        first, self.left = resume(self.config, context, parts)
        self.controller = Controller(self.config, context, parts, first_step=first, survivors=self.left)

    async def run(self) -> None:
        """The loops of the controller, without those that talk to engines and rewards."""
        controller = self.controller
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(controller._keep_ledger()), tasks.create_task(self._sample())]
                await controller._steps.run(tasks)
                for task in others:
                    task.cancel()
        await self.ledger.flush()
        controller.finish()
        self.archive.close()
        self.ledger.close()

    async def _sample(self) -> None:
        book, steps = self.controller._book, self.controller._steps
        for survivor in self.left:
            if (rest := book.adopt(survivor)) is not None:
                self._score(rest)
        while True:
            for _ in range(book.room(steps.next_version)):
                self._score(book.admit(steps.next_version))
            wake_all(self.controller._changed)
            await asyncio.sleep(0.001)

    def _score(self, rest: Admission | Group) -> None:
        book = self.controller._book
        if isinstance(rest, Admission):
            segment = Segment((5, 6, 7), True, (-0.5,) * 3, (VersionSpan(rest.stamp, 0, 3),))
            replies = [Reply((segment,), "12", FinishReason.STOP)] * 2
            flight: Any = SimpleNamespace(order=rest.order, prompt=rest.prompt, replies=replies)
            flight.rollouts = make_group(rest.order, rest.prompt, replies).rollouts
            rest = book.generated(flight)
        group = scored(rest, self.config)
        book.scored(group, drop_reason(group, self.config))


def die_before(number: int) -> None:
    """Have SIGKILL end this process before its write number `number`, from 1."""
    count = itertools.count(1)

    def write() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, _: Any) -> None:
        if event in WRITES:
            write()

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = really_connect(*args, **options)
        connection.set_trace_callback(lambda statement: write() if statement.startswith("COMMIT") else None)
        return connection

    sys.addaudithook(hook)
    really_connect, sqlite3.connect = sqlite3.connect, connect  # type: ignore[assignment]


def live(folder: Path, deterministic: bool, number: int) -> None:
    """A life that dies before its write `number`; 0: that reaches the end."""
    if number:
        die_before(number)
    asyncio.run(Life(folder, deterministic).run())


def audit(folder: Path) -> None:
    """Write what an audit finds beside the run."""
    found = audit_stage(folder)
    folder.with_suffix(".json").write_text(json.dumps({"problems": found.problems, "totals": found.totals}))


def in_a_child(function: Callable[..., None], *arguments: Any) -> int:
    """Call a function in a fork of this process, which has imported everything. Returns its exit code."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def lives(folder: Path, deterministic: bool, *numbers: int) -> dict[str, Any]:
    """The exit code of each life of one run, and the audit after it."""
    codes, audits = [], []
    folder.mkdir(parents=True)
    for number in numbers:
        codes.append(in_a_child(live, folder, deterministic, number))
        if in_a_child(audit, folder):
            raise RuntimeError(f"the audit of {folder} failed")
        audits.append(json.loads(folder.with_suffix(".json").read_text()))
    return {"numbers": numbers, "codes": codes, "audits": audits}


def sweep(folder: Path, deterministic: bool) -> dict[str, list[dict[str, Any]]]:
    """See the top of this file."""
    first: list[dict[str, Any]] = []
    while not first or first[-1]["codes"][0]:
        number = len(first) + 1
        first.append(lives(folder / f"first{number}", deterministic, number, 0))
    # The second life has most to undo where most steps were made without a commit.
    died = max(first, key=lambda run: (not run["audits"][0]["totals"]["commits"], run["audits"][0]["totals"]["steps"]))
    second: list[dict[str, Any]] = []
    while not second or second[-1]["codes"][1]:
        number = len(second) + 1
        second.append(lives(folder / f"second{number}", deterministic, died["numbers"][0], number, 0))
    return {"first": first, "second": second}


if __name__ == "__main__":
    print(
        json.dumps({str(kind): sweep(Path(sys.argv[1]) / str(kind), kind == "deterministic") for kind in sys.argv[2:]})
    )
