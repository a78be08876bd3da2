"""The agent of a host: a Ray actor that brings to its host, once, what several processes there need.

The directory (directory.py) makes it when the first process of the host asks for something. Ray starts it again if its
process is lost; what it was asked for then is pulled again.
"""

import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.hosts.checks import HostReport, report_of_this
from posttrain.hosts.folders import FolderOffer, fetch_folder, offer_folder, state_of, take_folder
from posttrain.hosts.lease import Lease
from posttrain.hosts.relay import Relay, Source
from posttrain.hosts.weights import WeightCopies, WeightsOffer

THREADS = 8


class HostAgent:
    """Runs as a Ray actor; every method is a coroutine of one event loop."""

    def __init__(self) -> None:
        import ray

        self._relay = Relay(ray.util.get_node_ip_address())
        self._copies = WeightCopies(self._relay)
        self._lease = Lease()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="host-agent")
        self._fetching: dict[str, asyncio.Lock] = {}
        self._offers: dict[tuple[object, ...], FolderOffer] = {}  # by the folder, and size and date of its files

    async def report(self) -> HostReport:
        """What this host has: its packages and its clock."""
        return await self._run(report_of_this)

    async def source(self) -> Source:
        """Where the relay of this host is reached."""
        return self._relay.source

    async def offer(self, folder: str) -> FolderOffer:
        """List a folder of this host, and serve its files."""
        async with self._fetching.setdefault(folder, asyncio.Lock()):
            state = await self._run(state_of, Path(folder))
            if state not in self._offers:
                self._offers[state] = await self._run(offer_folder, Path(folder), self._relay)
            return self._offers[state]

    async def fetch(self, offer: FolderOffer, deadline_s: float) -> str:
        """Where this host has the folder of an offer. See `fetch_folder`."""
        async with self._fetching.setdefault(offer.digest, asyncio.Lock()):
            return str(await self._run(fetch_folder, offer, deadline_s))

    async def take(self, offer: FolderOffer, folder: str, deadline_s: float) -> None:
        """Write the files of an offer to a folder of this host. See `take_folder`."""
        await self._run(take_folder, offer, Path(folder), deadline_s)

    async def bring(self, offer: WeightsOffer, deadline_s: float) -> str:
        """The path of a version of weights on this host. See `WeightCopies.bring`."""
        coming = self._copies.bring(offer, deadline_s, self._threads)
        return await asyncio.wrap_future(coming)

    async def enroll(self, pid: int) -> None:
        """End a process of this host if the home host is not heard for LEASE_S."""
        self._lease.enroll(pid)

    async def renew(self) -> None:
        """Called by the home host, each second."""
        self._lease.renew()

    async def pid(self) -> tuple[str, int]:
        """The host's name and the process id of the agent."""
        return socket.gethostname(), os.getpid()

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
