"""Workers that join, leave and are given up, over actors that live in this process and answer at once or not at all.

tests/test_elastic_rl.py does the same with real engines.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rollout_records import drawn

from posttrain.actors.losses import MAX_CONSECUTIVE_LOSSES, ActorLostError
from posttrain.context import BusyLog, StageContext
from posttrain.errors import StageError
from posttrain.records import FinishReason, Message, Row, VersionSpan
from posttrain.sampling.joining import join, leave
from posttrain.sampling.manifests import FolderWeights
from posttrain.sampling.requests import Completion, Piece, SampleRequest, Updated
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.worker import Worker
from posttrain.sampling.worker_weights import UpdateCalls
from posttrain.sampling.workers import RolloutWorkers

MESSAGES = (Message("user", "a question"),)
REQUEST = SampleRequest((5, 6, 7), n=2, max_tokens=8)
COMPARED = [SampleRequest((1, 2), temperature=0.0, max_tokens=3)]
IDS = (4, 5, 6)


class Actor:
    """An engine. is_mute: answers no request. is_lost: every call raises. shift: of its log-probabilities. says: the
    version that its tokens are of; None: the one that it has loaded.
    """

    def __init__(self, is_mute: bool = False, shift: float = 0.0, says: int | None = None):
        self.is_mute, self.is_lost, self.shift, self.says = is_mute, False, shift, says
        self.version = 0
        self.num_done = 0
        self._waiting: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self), f"on_{name}")

        async def call(*args: Any, **named: Any) -> Any:
            await asyncio.sleep(0)
            if self.is_lost:
                raise ActorLostError("its process is gone")
            return await method(self, *args, **named)

        return SimpleNamespace(remote=lambda *args, **named: asyncio.ensure_future(call(*args, **named)))

    @property
    def spans(self) -> tuple[VersionSpan, ...]:
        return (VersionSpan(self.version if self.says is None else self.says, 0, len(IDS)),)

    async def on_submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        self._waiting += [(key, index) for key, request in requests for index in range(request.n)]

    async def on_collect(self, wait_s: float) -> tuple[list[Piece], float]:
        await asyncio.sleep(0.005)
        if self.is_lost:
            raise ActorLostError("its process is gone")
        now, self._waiting = ([], self._waiting) if self.is_mute else (self._waiting, [])
        self.num_done += len(now)
        logprobs = (-1.0,) * len(IDS)
        return [Piece(k, i, 0, IDS, logprobs, self.spans, FinishReason.STOP, "12") for k, i in now], time.time()

    async def on_update_weights(self, source: Any, policy_version: int) -> Updated:
        await asyncio.sleep(0.01)
        self.version = policy_version
        return Updated(time.time(), time.time(), [])

    async def on_sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        logprobs = tuple(-1.0 + self.shift for _ in IDS)
        return [[Completion(IDS, "12", logprobs, FinishReason.STOP, self.spans)] for _ in requests]

    async def on_pids(self) -> dict[str, int]:
        return {}

    async def on_cancel(self, keys: Sequence[int]) -> None:
        self._waiting = [item for item in self._waiting if item[0] not in keys]

    async def on_forget(self) -> None:
        self._waiting.clear()


class Leased:
    """In the place of `Engines`: makes actors of this process. coming: those that join or replace others, in order."""

    def __init__(self, context: StageContext, actors: Sequence[Actor], coming: Sequence[Actor] = ()):
        self._context = context
        self.actors: list[Any] = list(actors)
        self.names = [f"engine-{seat}" for seat in range(len(actors))]
        self.places = [None] * len(actors)
        self.logs = {name: BusyLog(context, name, "generate") for name in self.names}
        self.coming = list(coming)
        self.left: list[int] = []

    @property
    def seats(self) -> list[int]:
        return [seat for seat in range(len(self.names)) if seat not in self.left]

    def is_ready(self, seat: int) -> bool:
        return True

    async def join(self) -> int:
        await asyncio.sleep(0.01)
        self.actors.append(self.coming.pop(0))
        self.names.append(name := f"engine-{len(self.names)}")
        self.places.append(None)
        self.logs[name] = BusyLog(self._context, name, "generate")
        return len(self.names) - 1

    async def leave(self, seat: int) -> None:
        self.left.append(seat)
        self.actors[seat].is_lost = True

    async def replace(self, seat: int, cause: BaseException) -> tuple[str, Any]:
        if not self.coming:
            raise StageError("no other engine can be started")
        self.actors[seat] = self.coming.pop(0)
        return self.names[seat], self.actors[seat]


class Run:
    """Workers over such engines, with the groups that are finished and the workers that are given up."""

    def __init__(self, folder: Path, actors: Sequence[Actor], coming: Sequence[Actor] = (), is_elastic: bool = True):
        context = StageContext("rl", folder, folder / "events.jsonl")
        self.engines: Any = Leased(context, actors, coming)
        self.finished: list[int] = []
        self.given_up: list[tuple[str, str]] = []

        def calls(manifest: Any, version: int, *, seats: Sequence[int]) -> UpdateCalls:
            return [[(seat, {"source": manifest, "policy_version": version}) for seat in seats]]

        def give_up(worker: Worker, reason: str) -> None:
            self.given_up.append((worker.name, reason))

        self.workers = RolloutWorkers(
            context, self.engines, deadline_s=2.0, finished=lambda flight: self.finished.append(flight.order),
            calls=calls, manifest=FolderWeights("version 0"), given_up=give_up if is_elastic else None,
        )  # fmt: skip

    def send(self, orders: Sequence[int]) -> None:
        for order in orders:
            prompt = drawn(Row(f"r{order}", "math", MESSAGES), MESSAGES, REQUEST.prompt_ids)
            self.workers.send(Flight(order, 0, prompt, REQUEST))

    async def until(self, is_true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not is_true():
                await asyncio.sleep(0.005)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self.workers.run())
        await asyncio.sleep(0)
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def join(self) -> tuple[Worker, float]:
        return await join(self.workers, self.engines, COMPARED, tolerance=1e-3)


def test_a_worker_that_joins_has_the_newest_weights_before_it_is_sent_anything(tmp_path):
    async def run() -> None:
        new = Actor()
        case = Run(tmp_path, [Actor()], [new])
        async with case.serving():
            await case.workers.weights.update(FolderWeights("version 3"), 3)
            worker, gap = await case.join()
            assert (worker.policy_version, new.version, gap) == (3, 3, 0.0)
            assert [one.name for one in case.workers.counted] == ["engine-0", "engine-1"]
            assert not any(one.is_kept for one in case.workers.workers)
            case.send(range(40))
            await case.until(lambda: len(case.finished) == 40)
            assert new.num_done > 0
            await case.workers.weights.update(FolderWeights("version 4"), 4)
            assert [one.policy_version for one in case.workers.workers] == [4, 4]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (Actor(shift=0.02), "engine-1 and engine-0 disagree on 3 tokens of policy version 2: mean gap 0.02"),
        (Actor(says=1), "engine-1 sampled with version 1 in the place of 2"),
    ],
)
def test_an_engine_that_does_not_sample_from_the_weights_it_was_given_is_refused(new, message, tmp_path):
    async def run() -> None:
        case = Run(tmp_path, [Actor()], [new])
        async with case.serving():
            await case.workers.weights.update(FolderWeights("version 2"), 2)
            with pytest.raises(StageError, match=message):
                await case.join()
            assert [one.name for one in case.workers.workers] == ["engine-0"]
            assert case.engines.left == [1]
            case.send(range(5))  # the others go on
            await case.until(lambda: len(case.finished) == 5)
            await case.workers.weights.update(FolderWeights("version 3"), 3)
            assert case.workers.oldest_version == 3  # the peer is not kept any more

    asyncio.run(run())


def test_an_engine_that_is_lost_while_it_joins_leaves_no_trace(tmp_path):
    async def run() -> None:
        lost = Actor()
        lost.is_lost = True
        case = Run(tmp_path, [Actor()], [lost])
        async with case.serving():
            with pytest.raises(ActorLostError):
                await case.join()
            assert [one.name for one in case.workers.workers] == ["engine-0"]
            case.send([0])
            await case.until(lambda: case.finished == [0])

    asyncio.run(run())


def test_a_worker_that_leaves_finishes_what_it_has_and_is_sent_nothing_more(tmp_path):
    async def run() -> None:
        actors = [Actor(), Actor()]
        case = Run(tmp_path, actors)
        async with case.serving():
            case.send(range(20))
            leaving = case.workers.workers[0]
            assert await leave(case.workers, case.engines, leaving, within_s=30.0) == 0
            done = actors[0].num_done
            case.send(range(20, 40))
            await case.until(lambda: len(case.finished) == 40)
            assert actors[0].num_done == done
            assert case.engines.left == [0]
            assert [one.name for one in case.workers.counted] == ["engine-1"]
            await case.workers.weights.update(FolderWeights("version 1"), 1)  # seats and places differ now
            assert actors[1].version == 1

    asyncio.run(run())


def test_what_a_worker_cannot_finish_in_time_is_finished_by_others(tmp_path):
    async def run() -> None:
        case = Run(tmp_path, [Actor(is_mute=True), Actor()])
        async with case.serving():
            case.send(range(20))
            await case.until(lambda: bool(case.workers.workers[0].asks))
            assert await leave(case.workers, case.engines, case.workers.workers[0], within_s=0.1) > 0
            await case.until(lambda: sorted(case.finished) == list(range(20)))

    asyncio.run(run())


def test_a_worker_that_is_lost_while_it_leaves_is_not_replaced(tmp_path):
    async def run() -> None:
        mute = Actor(is_mute=True)
        case = Run(tmp_path, [mute, Actor()])
        async with case.serving():
            case.send(range(10))
            leaving = asyncio.ensure_future(leave(case.workers, case.engines, case.workers.workers[0], within_s=60.0))
            await asyncio.sleep(0.05)
            mute.is_lost = True
            assert await leaving == 0
            await case.until(lambda: len(case.finished) == 10)
            assert not case.given_up

    asyncio.run(run())


def lost_actor() -> Actor:
    """Takes weights, and is lost as soon as it is sent something."""

    class Lost(Actor):
        async def on_submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
            raise ActorLostError("killed again")

        async def on_collect(self, wait_s: float) -> tuple[list[Piece], float]:
            await asyncio.sleep(0.005)
            return [], time.time()

    return Lost()


def test_an_engine_that_is_lost_three_times_in_a_row_is_given_up_and_the_run_goes_on(tmp_path):
    async def run() -> None:
        coming = [lost_actor() for _ in range(MAX_CONSECUTIVE_LOSSES - 1)]
        case = Run(tmp_path, [lost_actor(), Actor(is_mute=True)], coming)
        async with case.serving():
            for order in range(12):
                case.send([order])
                await asyncio.sleep(0.05)
            await case.until(lambda: bool(case.given_up))
            assert case.given_up == [("engine-0", "killed again")]
            assert [one.name for one in case.workers.counted] == ["engine-1"]
            case.workers.take_out(case.workers.workers[0])
            case.engines.actors[1].is_mute = False
            await case.until(lambda: sorted(case.finished) == list(range(12)))

    asyncio.run(run())


@pytest.mark.parametrize("is_elastic", [True, False])
def test_without_another_engine_or_with_a_fixed_number_three_losses_end_the_run(is_elastic, tmp_path):
    others = [] if is_elastic else [Actor(is_mute=True)]

    async def run() -> None:
        coming = [lost_actor() for _ in range(MAX_CONSECUTIVE_LOSSES - 1)]
        case = Run(tmp_path, [lost_actor(), *others], coming, is_elastic=is_elastic)
        running = asyncio.ensure_future(case.workers.run())
        for order in range(200):
            case.send([order])
            await asyncio.sleep(0.02)
            if running.done():
                break
        await asyncio.wait_for(running, 60)

    with pytest.raises(StageError, match="engine-0 was lost 3 times in a row; the last time: killed again"):
        asyncio.run(run())


def test_an_engine_for_which_no_other_can_be_started_is_given_up(tmp_path):
    async def run() -> None:
        case = Run(tmp_path, [lost_actor(), Actor()])
        async with case.serving():
            case.send(range(6))
            await case.until(lambda: bool(case.given_up))
            assert case.given_up == [("engine-0", "no other engine can be started")]
            await case.until(lambda: len(case.finished) == 6)

    asyncio.run(run())
