"""Figures of rl.py for the controller alone: engines and trainer answer at once, and everything between them is real.

Engines are Ray actors with the engine's interface that return prepared replies. The trainer is an object that returns
at once. Real are the controller, Ray's calls, the ledger on the disk, the queue, the archive, and the reward actor with
one process. The controller runs in a process of Ray, as in a stage. The reward itself computes almost nothing. Groups
have 2 replies of 8 tokens, so that the cost of groups is measured and not that of tokens.

Left out is the making of prompts: they are drawn in turn, and their token ids are known. A stage draws by beliefs
(`selection_draws_per_s`) and renders each prompt with its chat template, in the same thread.

  controller_groups_per_s   groups a second that are trained on, from admission to the archive. Beside it: the processor
                            time of the controller for each group in microseconds, and the groups a second that the
                            reward actor scores by itself, in calls of 128 groups
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.rewards import SystemsConfig
from posttrain.context import BusyLog, StageContext
from posttrain.pipeline.ray_session import ray_session
from posttrain.records import DrawnPrompt, FinishReason, Message, Row, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.verifiers import reward_config
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.loop.controller import Controller
from posttrain.rl.loop.parts import Parts
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import make_group
from posttrain.rl.training.protocol import StepResult
from posttrain.rl.training.samples import TrainSample
from posttrain.sampling.manifests import WeightManifest
from posttrain.sampling.requests import Completion, Piece, SampleRequest
from posttrain.sampling.rollouts import whole_reply
from posttrain.scoring.remote.client import RewardClient

GROUP, TOKENS, PROMPT_TOKENS, ROWS = 2, 8, 64, 10_000
BATCH, STALENESS, WARM, STEPS = 512, 7, 8, 24
IN_FLIGHT = 100_000
ENGINES = 1
PIECES_AT_ONCE = 1024


class PreparedEngine:
    """Has the methods of `EngineActor` for rollouts. `collect` answers every request; mute: it answers none."""

    def __init__(self, mute: bool):
        self._mute = mute
        self._version = 0
        self._waiting: list[tuple[int, int]] = []
        self._event = asyncio.Event()

    async def submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        if not self._mute:
            self._waiting += [(key, index) for key, request in requests for index in range(request.n)]
            self._event.set()

    async def collect(self, wait_s: float) -> tuple[list[Piece], float]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._event.wait()
        now, self._waiting = self._waiting[:PIECES_AT_ONCE], self._waiting[PIECES_AT_ONCE:]
        if not self._waiting:
            self._event.clear()
        ids, logprobs = tuple(range(TOKENS)), (-1.0,) * TOKENS
        spans = (VersionSpan(self._version, 0, TOKENS),)
        pieces = [Piece(key, index, 0, ids, logprobs, spans, FinishReason.STOP, "12") for key, index in now]
        return pieces, time.time()

    async def update_weights(self, source: dict[str, Any], policy_version: int, kv: str) -> tuple[float, float]:
        self._version = policy_version
        return time.time(), time.time()

    async def cancel(self, keys: Sequence[int]) -> None:
        """Do nothing, as no request runs."""

    async def forget(self) -> None:
        """Do nothing, as no request runs."""

    async def pids(self) -> dict[str, int]:
        return {}


class ReadyTrainer:
    """Takes the place of a `TrainerClient`. A step takes no time, or as long as `held` says."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []  # wall and processor time of this process, at each step
        self.held: asyncio.Event | None = None

    async def async_publish(self) -> WeightManifest:
        return no_weights(0)

    async def async_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        return [list(sample.sampler_logprobs) for sample in samples]

    async def async_step(self, samples: Sequence[TrainSample], step: int) -> StepResult:
        if self.held is not None:
            await self.held.wait()
        await asyncio.sleep(0)
        self.times.append((time.perf_counter(), time.process_time()))
        now = time.time()
        return StepResult({}, no_weights(step + 1), now, now)

    async def async_save_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        folder.mkdir()


def no_weights(version: int) -> WeightManifest:
    """A manifest for engines that load nothing."""
    return WeightManifest("none", version, 0, "none", ())


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
def parts(folder: Path, seed: int, mute: bool):
    """The parts between which a controller moves records."""
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
    source = PromptSource(rows, SystemsConfig(), render, seed=seed)
    ledger = Ledger(folder / "ledger.sqlite")
    archive = RolloutArchive(folder / "rollouts", build_tokenizer())
    try:
        yield Parts(engines, trainer, None, source, {"sums": 1.0}, archive, ledger, ())
    finally:
        ledger.close()
        for one in actors:
            ray.kill(cast(Any, one))


def groups_per_s(seed: int = 0, profile: Path | None = None) -> tuple[float, dict[str, float]]:
    """profile: a file into which the functions of the controller's process are written, for `pstats`."""
    import ray

    with ray_session():
        # As a stage runs: in a process of Ray, whose event loops are those of uvloop.
        measured = ray.remote(num_cpus=0.5, max_calls=1)(_groups_per_s)
        return ray.get(measured.remote(seed, profile))


def _groups_per_s(seed: int, profile: Path | None) -> tuple[float, dict[str, float]]:
    with tempfile.TemporaryDirectory() as scratch, parts(Path(scratch), seed, mute=False) as made:
        config = settings(BATCH, STALENESS, WARM + STEPS)
        context = StageContext("rl", Path(scratch), Path(scratch) / "events.jsonl", seed)
        floor = asyncio.run(reward_groups_per_s(config, made.source.draw("sums", 0)))
        controller = Controller(config, context, made, is_early=True)
        watch = cProfile.Profile() if profile else contextlib.nullcontext()
        with watch:
            asyncio.run(controller.run())
        if isinstance(watch, cProfile.Profile):
            watch.dump_stats(cast(Path, profile))
        trainer: Any = made.trainer  # a ReadyTrainer
        began, ended = trainer.times[WARM - 1], trainer.times[-1]
        groups = BATCH * STEPS
        return groups / (ended[0] - began[0]), {
            "own_cpu_us_per_group": 1e6 * (ended[1] - began[1]) / groups,
            "own_cpu_share": (ended[1] - began[1]) / (ended[0] - began[0]),
            "reward_floor_groups_per_s": floor,
            "group_size": GROUP,
            "tokens_per_reply": TOKENS,
        }


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
