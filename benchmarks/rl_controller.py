"""Figures of rl.py for the controller alone: engines and trainer answer at once, and everything between them is real.

Engines are Ray actors with the engine's interface that return prepared replies. The trainer is an object that returns
at once. Real are the controller, Ray's calls, the ledger on the disk, the queue, the archive, and the reward actor with
one process. The controller runs in a process of Ray, as in a stage. The reward itself computes almost nothing. Groups
have 2 replies of 8 tokens, so that the cost of groups is measured and not that of tokens.

The first entry leaves out the making of prompts: they are drawn in turn, and their token ids are known. Chat templates
are left out in all: a stage renders each row once, before it starts, and those with a system instruction at each draw.

  controller_groups_per_s   groups a second that are trained on, from admission to the archive. Beside it: the processor
                            time of each process for each group in microseconds, and that of the controller's event
                            loop alone, without its threads; the share of the time in which the controller's process
                            worked; and the groups a second that the reward actor scores by itself, in calls of 128
  controller_draws_groups_per_s   the same with prompts as a stage makes them: rows and token ids are on disk, and rows
                            are drawn by beliefs about their pass rates
  controller_rss_gib        memory of the controller's process with 100,000 groups in flight, and the part of it that
                            was added by these groups. The trainer waits until all are admitted, and engines do not
                            answer
"""

import asyncio
import contextlib
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
from rl_ready import TOKENS, PreparedEngine, ReadyTrainer

from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.rewards import SystemsConfig
from posttrain.context import BusyLog, StageContext
from posttrain.data.chat import RenderRow
from posttrain.data.stored import store
from posttrain.pipeline.ray_session import ray_session
from posttrain.records import DrawnPrompt, FinishReason, Message, Row, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.verifiers import reward_config
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.loop.controller import Controller
from posttrain.rl.loop.parts import Parts
from posttrain.rl.prompts.beliefs import Beliefs
from posttrain.rl.prompts.config import SelectionConfig
from posttrain.rl.prompts.kept import KeptPrompts
from posttrain.rl.prompts.selection import Selection
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import make_group
from posttrain.sampling.requests import Completion
from posttrain.sampling.rollouts import whole_reply
from posttrain.scoring.remote.client import RewardClient

GROUP, PROMPT_TOKENS, ROWS = 2, 64, 10_000
BATCH, STALENESS, WARM, STEPS = 512, 7, 8, 24
IN_FLIGHT = 100_000
ENGINES = 1


def settings(batch: int, staleness: int, steps: int) -> RlConfig:
    reward = {"name": f"{Path(__file__).with_name('rl_reward.py')}:every_second"}
    return RlConfig.model_validate(
        {
            "model": {"path": "none"}, "prompts": {"path": "none"}, "reward": reward, "steps": steps,
            "groups_per_step": batch, "group_size": GROUP, "max_staleness": staleness, "checkpoint_every": steps,
            "sampling": {"max_tokens": TOKENS}, "resources": {"rollout": {"workers": ENGINES, "cpus": 0.1}},
        }
    )  # fmt: skip


@contextlib.contextmanager
def parts(folder: Path, seed: int, *, mute: bool, is_drawn: bool = False):
    """The parts between which a controller moves records. is_drawn: whether prompts are made as in a stage."""
    import ray

    rows = [Row(f"r{index}", "sums", (Message("user", f"{index} + 1 ="),), str(index + 1)) for index in range(ROWS)]

    tokens = [300 + place % 200 for place in range(200 + PROMPT_TOKENS)]

    def render(row: Row, messages: Sequence[Message]) -> list[int]:
        first = int(messages[-1].text.split()[0]) % 200
        return tokens[first : first + PROMPT_TOKENS]

    actor = ray.remote(PreparedEngine).options(num_cpus=0.1, max_concurrency=1000)
    actors = [actor.remote(mute) for _ in range(ENGINES)]
    names = [f"engine{index}" for index in range(ENGINES)]
    context = StageContext("rl", folder, folder / "events.jsonl", seed)
    logs = {name: BusyLog(context, name, "generate") for name in names}
    engines: Any = SimpleNamespace(
        names=names,
        seats=range(len(names)),
        actors=actors,
        logs=logs,
        places=[None] * len(names),
        is_ready=lambda seat: True,
    )
    trainer: Any = ReadyTrainer()
    source = (
        PromptSource(rows, SystemsConfig(), render, seed=seed) if not is_drawn else drawn_by_beliefs(rows, render, seed)
    )
    ledger = Ledger(folder / "ledger.sqlite")
    archive = RolloutArchive(folder / "rollouts", build_tokenizer())
    try:
        yield Parts(engines, trainer, None, source, {"sums": 1.0}, archive, ledger, ())
    finally:
        ledger.close()
        for one in actors:
            ray.kill(cast(Any, one))


def drawn_by_beliefs(rows: Sequence[Row], render: RenderRow, seed: int) -> PromptSource:
    """Draws as a stage does."""
    stored, ids = store(rows, Row), store((tuple(render(row, row.messages)) for row in rows), tuple[int, ...])
    beliefs = Beliefs(stored, SelectionConfig().half_life)
    beliefs.fit()
    selection = Selection(beliefs, group_size=GROUP, seed=seed)
    return PromptSource(stored, SystemsConfig(), KeptPrompts(stored, ids, render), seed=seed, selection=selection)


def groups_per_s(
    seed: int = 0, profile: Path | None = None, *, is_drawn: bool = False
) -> tuple[float, dict[str, float]]:
    """profile: a file into which the functions of the controller's process are written, for `pstats`. is_drawn: see
    `parts`.
    """
    import ray

    with ray_session():
        # As a stage runs: in a process of Ray, whose event loops are those of uvloop.
        measured = ray.remote(num_cpus=0.5, max_calls=1)(_groups_per_s)
        return ray.get(measured.remote(seed, profile, is_drawn))


def _groups_per_s(seed: int, profile: Path | None, is_drawn: bool) -> tuple[float, dict[str, float]]:
    import ray

    with (
        tempfile.TemporaryDirectory() as scratch,
        parts(Path(scratch), seed, mute=False, is_drawn=is_drawn) as made,
    ):
        config = settings(BATCH, STALENESS, WARM + STEPS)
        context = StageContext("rl", Path(scratch), Path(scratch) / "events.jsonl", seed)
        floor = asyncio.run(reward_groups_per_s(config, made.source.draw("sums", 0)))
        controller = Controller(config, context, made, is_early=True)
        trainer: Any = made.trainer  # a ReadyTrainer
        pids: Any = ray.get(made.engines.actors[0].pids.remote())
        trainer.look = partial(cpu_seconds, controller, pids["actor"])
        watch = cProfile.Profile() if profile else contextlib.nullcontext()
        with watch:
            asyncio.run(controller.run())
        if isinstance(watch, cProfile.Profile):
            watch.dump_stats(cast(Path, profile))
        (began, before), (ended, after) = trainer.times[WARM - 1], trainer.times[-1]
        groups = BATCH * STEPS
        return groups / (ended - began), {
            **{f"{name}_cpu_us_per_group": 1e6 * (after[name] - before[name]) / groups for name in after},
            "own_cpu_share": (after["own"] - before["own"]) / (ended - began),
            "reward_floor_groups_per_s": floor,
            "group_size": GROUP,
            "tokens_per_reply": TOKENS,
        }


def cpu_seconds(controller: Controller, engine: int) -> dict[str, float]:
    """Processor time so far: of this process, of its event loop alone, and of the other processes. engine: its id."""

    def of(*pids: int) -> float:
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)

    actor, *reward_processes = controller._scorer.pids()
    return {
        "own": time.process_time(), "event_loop": time.thread_time(), "reward_actor": of(actor),
        "reward_process": of(*reward_processes), "engine": of(engine),
    }  # fmt: skip


async def reward_groups_per_s(config: RlConfig, prompt: DrawnPrompt) -> float:
    """Groups a second that a reward actor with one process scores, in calls of 128 groups, two calls at a time."""
    reply = Completion(tuple(range(TOKENS)), "12", (-1.0,) * TOKENS, FinishReason.STOP, (VersionSpan(0, 0, TOKENS),))
    group = make_group(0, prompt, [whole_reply(reply)] * GROUP, worker="engine0")
    pairs = [(rollout, prompt.row) for rollout in group.rollouts] * 128
    client = RewardClient(reward_config(config.reward, config.systems), config.resources.reward)
    await client.start()
    try:
        await client.score(pairs)
        began, rounds = time.perf_counter(), 8
        for _ in range(rounds):
            await asyncio.gather(client.score(pairs), client.score(pairs))
        return 2 * 128 * rounds / (time.perf_counter() - began)
    finally:
        await client.close()


def rss_gib(seed: int = 0) -> tuple[float, dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch, ray_session(), parts(Path(scratch), seed, mute=True) as made:
        batch = IN_FLIGHT // 10
        config = settings(batch, 9, 1)
        context = StageContext("rl", Path(scratch), Path(scratch) / "events.jsonl", seed)
        controller = Controller(config, context, made, is_early=True)
        before = _rss_gib()
        began = time.perf_counter()
        admitted = asyncio.run(_fill(controller, made.ledger))
        return _rss_gib(), {
            "came_with_them_mib": 1024 * (_rss_gib() - before),
            "in_flight": admitted,
            "admitted_in_s": time.perf_counter() - began,
            "prompt_tokens": PROMPT_TOKENS,
        }


async def _fill(controller: Controller, ledger: Ledger) -> int:
    """Run until all groups are admitted, sent to the engines and on the disk. Returns how many there are."""
    running = asyncio.ensure_future(controller.run())
    try:
        while not running.done():
            await asyncio.sleep(0.5)
            await ledger.flush()
            workers = controller._workers.workers
            if sum(len(worker.asks) for worker in workers) >= IN_FLIGHT:
                break
        else:
            running.result()
        return sum(len(worker.asks) for worker in controller._workers.workers)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _rss_gib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":  # profile the controller
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.NamedTemporaryFile() as file:
        print(*groups_per_s(profile=Path(file.name)))
        for order in ("tottime", "cumtime"):
            pstats.Stats(file.name).sort_stats(order).print_stats(45)
