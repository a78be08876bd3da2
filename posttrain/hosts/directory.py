"""The directory of the hosts: a Ray actor on the home host that probes all others, and makes their agents.

    probe: a TCP connection to each host's raylet, each second ──► three in a row fail ──► the host is suspected
                                                                   one succeeds       ──► it is not any more

Ray itself takes a minute to find a host dead that has become silent, and calls to its actors hang so long. A suspected
host is treated as lost at once: its engines are replaced elsewhere, and nothing new is placed on it. The kernel of a
host accepts a probe, so a busy host is not suspected. If the host comes back, what was left on it is ended (`fence`).
If it does not, that ends itself (lease.py).
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from posttrain.actors.processes import kill_process
from posttrain.errors import StageError
from posttrain.hosts.agent import HostAgent
from posttrain.hosts.checks import HostReport, received
from posttrain.hosts.placement import in_cluster, name_in_run, pinned, pinned_here, this_node

NAME = "host-directory"
NAMESPACE = "posttrain"
PROBE_S = 1.0  # between two probes
ANSWER_S = 2.0  # that a host has to accept a connection
MAX_FAILURES = 3  # probes in a row after which a host is suspected: 6 to 7 s
NEWS_S = 10.0  # that `suspected` waits for a change
REPORT_S = 120.0  # for the agent of a host to start

_directory: Any = None  # Ray ends an actor when the last handle of its owner is gone; others keep it to ask once


@dataclass
class _Probed:
    """One host. failures: probes in a row that failed."""

    address: str
    port: int
    failures: int = 0


class HostDirectory:
    """Runs as a Ray actor on the home host; every method is a coroutine of one event loop."""

    def __init__(self) -> None:
        self._home = this_node()
        self._agents: dict[str, Any] = {}
        self._probed: dict[str, _Probed] = {}
        self._probing: dict[str, asyncio.Task[None]] = {}
        self._renewing: dict[str, asyncio.Future[None]] = {}
        self._suspected: frozenset[str] = frozenset()
        self._changed = asyncio.Condition()
        self._fenced: defaultdict[str, set[int]] = defaultdict(set)
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to probe the hosts that Ray knows, and those that join later."""
        await self._look()
        self._watching = asyncio.create_task(self._watch())

    async def home(self) -> str:
        """The id of the home host's node."""
        return self._home

    async def agent(self, node: str) -> Any:
        """The agent of the host of a node. It is made when it is first asked for."""
        import ray

        if node not in self._agents:
            options = {"num_cpus": 0, "max_concurrency": 1000, "max_restarts": -1, "max_task_retries": 2}
            self._agents[node] = ray.remote(HostAgent).options(**options, **pinned(node)).remote()
        return self._agents[node]

    async def reports(self) -> tuple[HostReport, list[HostReport]]:
        """The reports of the home host and of all others but those that are suspected."""
        home, *others = await asyncio.gather(*(self._report(node) for node in (self._home, *self._probed)))
        assert home is not None
        return home, [report for report in others if report is not None]

    async def _report(self, node: str) -> HostReport | None:
        """The report of a host, which starts its agent; None if the host is suspected."""
        asking = asyncio.ensure_future((await self.agent(node)).report.remote())
        end = time.monotonic() + REPORT_S
        try:
            while not (await asyncio.wait({asking}, timeout=PROBE_S))[0]:
                if node in self._suspected:
                    return None
                if time.monotonic() > end:
                    address = self._probed[node].address if node in self._probed else "the home host"
                    raise StageError(f"the agent of {address} did not start within {REPORT_S:g} s")
            return received(asking.result())
        finally:
            asking.cancel()

    # ------------------------------------------------------------------ suspicion

    async def suspected(self, known: frozenset[str]) -> frozenset[str]:
        """The ids of the nodes whose hosts are suspected. Waits until they are others than `known`, for NEWS_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NEWS_S), self._changed:
                await self._changed.wait_for(lambda: self._suspected != known)
        return self._suspected

    async def decided(self, node: str) -> None:
        """Wait until the host of a node answers a probe or is suspected.

        An actor that is lost may be the first sign that its host is. Ray would place its successor there again.
        """
        probed = self._probed.get(node)
        while probed is not None and node not in self._suspected and not await _answers(probed.address, probed.port):
            await asyncio.sleep(PROBE_S)

    async def avoided(self) -> frozenset[str]:
        """The ids of the nodes on which nothing must be placed now."""
        return self._suspected

    async def fence(self, node: str, pid: int) -> None:
        """End a process that was replaced: at once, or as soon as its host is there again."""
        if node in self._suspected:
            self._fenced[node].add(pid)
        else:
            await asyncio.to_thread(kill_process, node, pid)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            await self._look()

    async def _look(self) -> None:
        """Begin to probe hosts that have joined. Those that Ray has found dead stay suspected."""
        import ray

        for node in await asyncio.to_thread(ray.nodes):
            name = node["NodeID"]
            if not node["Alive"] and name in self._probed:
                self._probing.pop(name).cancel()
                del self._probed[name]
                await self._suspect(name)
            elif node["Alive"] and name not in self._probed and name != self._home:
                self._probed[name] = _Probed(node["NodeManagerAddress"], node["NodeManagerPort"])
                self._probing[name] = asyncio.create_task(self._probe(name, self._probed[name]))

    async def _probe(self, node: str, probed: _Probed) -> None:
        while True:
            rest = asyncio.create_task(asyncio.sleep(ANSWER_S))
            if await _answers(probed.address, probed.port):
                probed.failures = 0
                rest.cancel()
                await self._clear(node)
                self._renew(node)
                await asyncio.sleep(PROBE_S)
            else:
                probed.failures += 1
                if probed.failures >= MAX_FAILURES:
                    await self._suspect(node)
                await rest

    def _renew(self, node: str) -> None:
        """Tell the agent of a host, if there is one, that its engines may go on. One call at a time is enough."""
        last = self._renewing.get(node)
        if node in self._agents and (last is None or last.done()):
            self._renewing[node] = asyncio.ensure_future(_heard(self._agents[node]))

    async def _suspect(self, node: str) -> None:
        if node not in self._suspected:
            async with self._changed:
                self._suspected |= {node}
                self._changed.notify_all()

    async def _clear(self, node: str) -> None:
        if node in self._suspected:
            left = self._fenced.pop(node, set())
            await asyncio.gather(*(asyncio.to_thread(kill_process, node, pid) for pid in left))
            async with self._changed:
                self._suspected -= {node}
                self._changed.notify_all()


async def _heard(agent: Any) -> None:
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):  # its host is lost; the probes find that out
        await agent.renew.remote()


async def _answers(address: str, port: int) -> bool:
    """Whether a connection is accepted in time.

    If this process itself was stopped for a while, the connection stands by the time this is checked, and counts.
    """
    opening = asyncio.ensure_future(asyncio.open_connection(address, port))
    done, _ = await asyncio.wait({opening}, timeout=ANSWER_S)
    if not done or opening.exception() is not None:
        opening.cancel()
        return False
    opening.result()[1].close()
    return True


def start_directory() -> Any:
    """Start the directory of a run that has joined a cluster. The caller's host becomes the home host."""
    import ray

    global _directory
    options = {"name": name_in_run(NAME), "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 1000}
    _directory = ray.remote(HostDirectory).options(**options, **pinned_here()).remote()
    ray.get(_directory.start.remote())
    return _directory


def forget_directory() -> None:
    """Note in the driver that the session of its directory has ended."""
    global _directory
    _directory = None


def directory() -> Any:
    """The directory of this run; None in a local session."""
    import ray

    global _directory
    if _directory is None and in_cluster():
        _directory = ray.get_actor(name_in_run(NAME), namespace=NAMESPACE)
    return _directory


async def enroll_here(pid: int) -> None:
    """Have a process of this host ended if the home host is not heard for long; nothing on the home host itself."""
    hosts = directory()
    if hosts is not None and await hosts.home.remote() != this_node():
        await (await hosts.agent.remote(this_node())).enroll.remote(pid)


async def folder_here(folder: str, deadline_s: float) -> str:
    """Where this process finds a model folder of the home host: there itself, or in the cache of its own host.

    Raises UserError if the disk of its host has no room for it.
    """
    from ray.exceptions import RayTaskError

    hosts = directory()
    if hosts is None or (home := await hosts.home.remote()) == this_node():
        return folder
    try:
        offer = await (await hosts.agent.remote(home)).offer.remote(folder)
        return await (await hosts.agent.remote(this_node())).fetch.remote(offer, deadline_s)
    except RayTaskError as error:
        raise error.cause from None
