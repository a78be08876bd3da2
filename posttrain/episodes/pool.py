"""Environment processes that can be killed, and the episodes in them.

    begin ─► the process with the fewest episodes ─► Episode.next ─► Ask | Ended
                 │ an episode is late and the process does not end it, or the process dies
                 └─► SIGKILL, a new process; its episodes end with EpisodeLost, which says which was the cause

What waits for what: `Episode.next` waits for its environment, which has a deadline. Nothing waits for an environment
while the policy has its turn. The process notes whose code is running (`sampling.progress`), so the loss of a process
is the fault of one episode at most; all others begin again, with the turns that they had.
"""

import asyncio
from dataclasses import asdict
from functools import partial
from typing import Any

from posttrain.config.environments import EnvironmentConfig
from posttrain.episodes.process import LOOK_S, EnvironmentProcess, Episode, EpisodeLost
from posttrain.episodes.tools import environment_provided
from posttrain.episodes.wire import Begin, EnvironmentSetup, LoadedEnvironment
from posttrain.errors import PluginError
from posttrain.scoring.plugins.lookup import ENVIRONMENT, check_environment, resolve

MEMORY_GIB = 8.0


class EnvironmentPool:
    """The environments of a config in `workers` processes; as many for each interpreter, where some name another."""

    def __init__(self, config: EnvironmentConfig):
        self._config = config
        self._processes: list[EnvironmentProcess] = []
        self._num_episodes = 0
        self._watching: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that are ready."""
        return [process.pid for process in self._processes if process.pid is not None]

    @property
    def num_processes(self) -> int:
        """How many processes there are while the pool is open."""
        return self._config.workers * len(self._interpreters())

    def _interpreters(self) -> list[str]:
        return list(dict.fromkeys(item.python or "" for item in self._config.functions.values()))

    def setup(self, notes: str, python: str = "") -> EnvironmentSetup:
        """What a process is told to load. notes: the path of its notes. python: its interpreter. Raises PluginError for
        an unknown name."""
        functions = [(key, item) for key, item in self._config.functions.items() if (item.python or "") == python]
        loaded = {
            key: LoadedEnvironment(
                asdict(resolve(item.name, ENVIRONMENT)), dict(item.args), tuple(environment_provided(item))
            )
            for key, item in functions
        }
        sandbox = self._config.sandbox.model_dump()
        return EnvironmentSetup(loaded, self._config.timeout_s, MEMORY_GIB, notes, sandbox)

    @property
    def num_restarts(self) -> int:
        """How often a process was replaced."""
        return sum(process.num_restarts for process in self._processes)

    async def start(self) -> None:
        """Check the environments and start the processes. Raises PluginError if they cannot load them."""
        _check(self._config)
        self._processes = [
            EnvironmentProcess(partial(self.setup, python=python), self._changed, python)
            for python in self._interpreters()
            for _ in range(self._config.workers)
        ]
        failures = [why for why in await asyncio.gather(*(process.start() for process in self._processes)) if why]
        if failures:
            await self.close()
            raise PluginError(failures[0])
        self._watching = asyncio.create_task(self._watch())

    async def begin(self, environment: str, **fields: Any) -> Episode:
        """Begin an episode in a process, once one is ready.

        fields: those of `Begin` without the key. Raises EpisodeLost if no process can be started any more.
        """
        able = [process for process in self._processes if process.has(environment)]
        while not (ready := [process for process in able if process.is_ready]):
            if why := next((process.broken_by for process in able if process.broken_by), ""):
                for process in able:
                    process.restart()
                raise EpisodeLost(f"no environment process could be started: {why}", is_cause=None)
            self._changed.clear()
            await self._changed.wait()
        self._num_episodes += 1
        process = min(ready, key=len)
        return process.begin(Begin(self._num_episodes, environment, **fields))

    async def close(self) -> None:
        """End the processes and everything that they started."""
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(*(process.close() for process in self._processes), return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for process in self._processes:
                process.look()


def _check(config: EnvironmentConfig) -> None:
    for item in config.functions.values():
        check_environment(item.name, item.args, python=item.python or "")
