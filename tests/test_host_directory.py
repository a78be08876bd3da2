"""Who does not answer: the directory of hosts by itself, with probes that the tests answer, and what follows of it."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from posttrain.errors import TrainerLostError
from posttrain.hosts import directory
from posttrain.hosts.directory import MAX_FAILURES, HostDirectory
from posttrain.parallel import ranks
from posttrain.parallel.ranks import RankGroup


class Network:
    """The hosts that Ray knows, and which of them answer: as `script` says, and then all but the `silent`.

    probes: (host, whether it answered, the hosts that were suspected then); killed: (node, process id).
    """

    def __init__(self) -> None:
        self.nodes = {"home": True, "a": True, "b": True}  # whether Ray counts it as alive
        self.silent: set[str] = set()
        self.script: dict[str, list[bool]] = {}
        self.hosts: Any = None
        self.probes: list[tuple[str, bool, frozenset[str]]] = []
        self.killed: list[tuple[str, int]] = []

    def known(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": name, "Alive": alive, "NodeManagerAddress": name, "NodeManagerPort": 1}
            for name, alive in self.nodes.items()
        ]

    async def answers(self, address: str, port: int) -> bool:
        await asyncio.sleep(0)
        script = self.script.get(address)
        answers = script.pop(0) if script else address not in self.silent
        self.probes.append((address, answers, self.hosts._suspected))
        return answers

    def kill(self, node: str, pid: int) -> None:
        self.killed.append((node, pid))

    def of(self, name: str) -> list[tuple[bool, frozenset[str]]]:
        """The probes of one host."""
        return [(answered, suspected) for address, answered, suspected in self.probes if address == name]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network()
    monkeypatch.setattr(ray, "nodes", made.known)
    monkeypatch.setattr(directory, "this_node", lambda: "home")
    monkeypatch.setattr(directory, "_answers", made.answers)
    monkeypatch.setattr(directory, "kill_process", made.kill)
    for name in ("PROBE_S", "ANSWER_S"):
        monkeypatch.setattr(directory, name, 0.001)
    return made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def with_directory(network: Network, steps: Callable[[HostDirectory], Any]) -> None:
    async def run() -> None:
        hosts = network.hosts = HostDirectory()
        await hosts.start()
        try:
            await steps(hosts)
        finally:
            for task in (hosts._watching, *hosts._probing.values()):
                assert task is not None
                task.cancel()

    asyncio.run(run())


def test_a_host_is_suspected_after_three_probes_in_a_row_and_no_more_when_it_answers(network: Network):
    network.script["a"] = [True, False, False, True, *[False] * MAX_FAILURES]
    network.silent.add("a")

    async def steps(hosts: HostDirectory) -> None:
        assert await hosts.suspected(frozenset()) == {"a"}
        # Five in all had failed before, but never three in a row.
        assert [suspected for _, suspected in network.of("a")[: 4 + MAX_FAILURES]] == [frozenset()] * (4 + MAX_FAILURES)
        assert await hosts.avoided() == {"a"}
        network.silent.clear()
        assert await hosts.suspected(frozenset({"a"})) == frozenset()

    with_directory(network, steps)
    assert not network.of("home")  # it does not probe itself


def test_what_was_replaced_is_ended_when_its_host_answers_again_and_not_before(network: Network):
    async def steps(hosts: HostDirectory) -> None:
        await hosts.fence("b", 7)
        assert network.killed == [("b", 7)]  # its host answers
        network.silent.add("a")
        await hosts.suspected(frozenset())
        await hosts.fence("a", 8)
        await hosts.fence("a", 9)
        await asyncio.sleep(0.02)
        assert network.killed == [("b", 7)]
        network.silent.clear()
        await hosts.suspected(frozenset({"a"}))
        # Nothing is placed on it before the old processes are gone.
        assert sorted(network.killed) == [("a", 8), ("a", 9), ("b", 7)]

    with_directory(network, steps)


def test_hosts_that_join_are_probed_and_those_that_ray_finds_dead_stay_suspected(network: Network):
    async def steps(hosts: HostDirectory) -> None:
        network.nodes["late"] = True
        await until(lambda: bool(network.of("late")))
        network.nodes["a"] = False
        assert await hosts.suspected(frozenset()) == {"a"}
        probed = len(network.of("a"))
        await asyncio.sleep(0.02)
        assert len(network.of("a")) <= probed + 1
        assert await hosts.avoided() == {"a"}

    with_directory(network, steps)


def test_a_lost_actor_waits_until_it_is_known_whether_its_host_is_lost(network: Network):
    async def steps(hosts: HostDirectory) -> None:
        await hosts.decided("a")  # it answers: only the actor was lost
        await hosts.decided("unknown")
        network.silent.add("b")
        await hosts.decided("b")
        assert await hosts.avoided() == {"b"}

    with_directory(network, steps)


# ---------------------------------------------------------------- ranks


class Remote:
    def __init__(self, value: Any):
        self._value = value

    async def remote(self) -> Any:
        return self._value()


@pytest.mark.parametrize("deadline_s", [None, 1e6])
def test_a_call_to_ranks_ends_when_the_host_of_one_does_not_answer(deadline_s, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "SUSPICION_S", 0.001)
    suspected: set[str] = set()
    group: Any = RankGroup.__new__(RankGroup)
    group._hosts = SimpleNamespace(avoided=Remote(lambda: frozenset(suspected)))
    group._nodes, group._name, group._lost = {"a", "b"}, "the trainer", TrainerLostError

    async def run() -> None:
        answers = [asyncio.get_running_loop().create_future() for _ in range(2)]
        waiting = asyncio.ensure_future(group._answered(answers, deadline_s))
        suspected.add("of no rank")
        await asyncio.sleep(0.02)
        assert not waiting.done()
        answers[0].set_result(None)
        suspected.add("b")
        with group._losses("step"):
            await waiting

    with pytest.raises(TrainerLostError, match="the trainer was lost in step: the host of a rank does not answer"):
        asyncio.run(run())


def test_answers_and_the_first_error_of_a_rank_come_before_suspicion():
    group: Any = RankGroup.__new__(RankGroup)
    group._hosts = None
    group._nodes = set()

    async def run(error: Exception | None, deadline_s: float | None) -> int:
        answers = [asyncio.get_running_loop().create_future() for _ in range(2)]
        if error is None:
            answers[0].set_result(None)
        else:
            answers[0].set_exception(error)
        return await group._answered(answers, deadline_s)

    assert asyncio.run(run(None, 0.01)) == 1
    with pytest.raises(ValueError, match="of the rank"):
        asyncio.run(run(ValueError("of the rank"), None))
