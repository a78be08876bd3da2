"""A lane to an actor that serves one caller after another: the next caller gets all of its results and no others."""

import asyncio
import sys
from typing import Any

import pytest
import ray.cloudpickle

from posttrain.actors.lane import Lane

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors do not find the tests' folder
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
CALLERS = 8


class Desk:
    """Work that is handed in and handed out again, as an engine does with requests; `log` has the calls as they begin.

    The work of a caller is a list of names, and its results are the same names.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._event = asyncio.Event()
        self._num_collecting = 0
        self.log: list[str] = []

    async def submit(self, batch: list[tuple[str, bytes]]) -> None:
        self.log += [f"submit {name}" for name, _ in batch]
        self._open += [name for name, _ in batch]
        self._event.set()

    async def collect(self, seconds: float) -> list[str]:
        self._num_collecting += 1
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            pass
        finally:
            self._num_collecting -= 1
        done, self._open = self._open, []
        self._event.clear()
        return done

    async def forget(self) -> None:
        self.log.append("forget")
        self._open = []
        while self._num_collecting:
            self._event.set()
            await asyncio.sleep(0.01)

    async def read(self) -> list[str]:
        return self.log


def lane_to(desk: Any, results: list[str]) -> Lane[tuple[str, bytes], list[str]]:
    return Lane(
        lambda batch: desk.submit.remote(batch),
        lambda: desk.collect.remote(1.0),
        results.extend,
        deadline_s=60,
        name=lambda: "the desk",
    )


async def serve_one(desk: Any, name: str, *, size: int) -> None:
    """A caller that leaves while its work is on its way, and while it has just asked for results."""
    lane = lane_to(desk, [])
    lane.send((name, b"x" * size))
    serving = asyncio.ensure_future(lane.serve())
    for _ in range(3):  # rounds of the event loop: both calls are made, and neither is answered
        await asyncio.sleep(0)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await lane.leave(desk.forget.remote)


async def next_caller(desk: Any, names: list[str]) -> list[str]:
    results: list[str] = []
    lane = lane_to(desk, results)
    for name in names:
        lane.send((name, b""))
    serving = asyncio.ensure_future(lane.serve())
    while len(results) < len(names):  # else the suite's own limit ends it: results were taken by somebody else
        await asyncio.sleep(0.01)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await lane.leave(desk.forget.remote)
    return results


@pytest.mark.parametrize("size", [0, 2_000_000])
def test_what_is_on_its_way_arrives_before_it_is_forgotten_and_the_next_caller_gets_all_of_its_own(size):
    """Ray began `forget` before the `submit` that was made earlier in nearly every try, whatever its size."""
    desk = ray.remote(Desk).options(num_cpus=0, max_concurrency=100).remote()

    async def callers() -> list[list[str]]:
        found = []
        for number in range(CALLERS):
            await serve_one(desk, f"left {number}", size=size)
            found.append(await next_caller(desk, [f"{number}.{index}" for index in range(20)]))
        return found

    try:
        found = asyncio.run(callers())
        assert [sorted(names) for names in found] == [
            sorted(f"{number}.{index}" for index in range(20)) for number in range(CALLERS)
        ]
        log = ray.get(desk.read.remote())
        for number in range(CALLERS):
            place = log.index(f"submit left {number}")
            assert log[place + 1] == "forget"
    finally:
        ray.kill(desk)


def test_a_caller_can_leave_an_actor_that_has_refused_its_last_batch():
    class Refusing(Desk):
        async def submit(self, batch: list[tuple[str, bytes]]) -> None:
            raise ValueError("not this")

    desk = ray.remote(Refusing).options(num_cpus=0, max_concurrency=100).remote()
    try:
        asyncio.run(serve_one(desk, "refused", size=0))
        assert ray.get(desk.read.remote()) == ["forget"]
    finally:
        ray.kill(desk)
