"""One environment process that can be killed and is replaced, and the episodes in it; pool.py draws it."""

import asyncio
from collections.abc import Callable, Iterator

from posttrain.episodes.wire import Ask, Begin, Cancel, Ended, EnvironmentSetup, Full, Refused, Saved, Told
from posttrain.records import Outcome
from posttrain.sampling.progress import Progress
from posttrain.scoring.pool.process import PluginProcess
from posttrain.scoring.pool.wire import Loaded, frame

PROGRAM = "posttrain.episodes.environment_process"
START_S = 60.0
GRACE_S = 5.0  # how much later than its deadline an episode may end before its process is killed
LOOK_S = 0.5
START_TRIES = 3


class EpisodeLost(Exception):
    """The process of an episode was lost. is_cause: whether the episode's own code was running then; None if nobody's
    was. outcome: of an episode that was lost too often."""

    def __init__(self, reason: str, *, is_cause: bool | None, outcome: Outcome = Outcome.INFRASTRUCTURE):
        super().__init__(reason)
        self.is_cause = is_cause
        self.outcome = outcome


class Episode:
    """One episode in a process. `next` and `answer` take turns."""

    def __init__(self, place: "EnvironmentProcess", key: int):
        self.key = key
        self.due_s: float | None = None  # while the environment has its turn: when its process is killed
        self._place = place
        self._events: asyncio.Queue[Ask | Saved | Ended | EpisodeLost] = asyncio.Queue()

    async def next(self) -> Ask | Saved | Ended:
        """What the environment does next. Raises EpisodeLost."""
        event = await self._events.get()
        if isinstance(event, EpisodeLost):
            raise event
        return event

    def answer(self, answer: Told | Full | Refused) -> None:
        """Tell the environment what became of its `Ask`."""
        self._place.send(self, answer)

    def end(self) -> None:
        """Give the episode up, if it has not ended."""
        self._place.give_up(self)

    def hear(self, event: Ask | Saved | Ended | EpisodeLost) -> None:
        """Take what the environment does next, or that its process is lost."""
        if not isinstance(event, Saved):  # after which it goes on
            self.due_s = None
        self._events.put_nowait(event)


class EnvironmentProcess:
    """Keeps one process alive, with the episodes in it.

    setup: what it loads, for the path of its notes. changed: is set when it becomes ready, or is given up.
    python: the interpreter that runs it; "" for this one.
    """

    def __init__(self, setup: Callable[[str], EnvironmentSetup], changed: asyncio.Event, python: str = ""):
        self._setup = setup
        self._python = python
        self._timeout_s = setup("").timeout_s
        self._environments = frozenset(setup("").environments)
        self._changed = changed
        self._process: PluginProcess | None = None
        self._notes: Progress | None = None
        self._loaded: asyncio.Future[str] | None = None
        self._episodes: dict[int, Episode] = {}
        self._restarting: asyncio.Task[None] | None = None
        self._dying: set[PluginProcess] = set()
        self.is_ready = False
        self.broken_by = ""
        self.num_restarts = 0

    def __len__(self) -> int:
        return len(self._episodes)

    def has(self, environment: str) -> bool:
        """Whether episodes of an environment can begin in it."""
        return environment in self._environments

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.is_ready else None

    # ------------------------------------------------------------------ its life

    async def start(self) -> str:
        """Start it and have it load the environments. Returns "", or the reason if it could not."""
        self._notes = Progress.create()
        setup = self._setup(self._notes.path)
        loaded = self._loaded = asyncio.get_running_loop().create_future()
        process = self._process = PluginProcess(
            PROGRAM,
            Loaded | Ask | Saved | Ended,
            on_messages=lambda messages: self._hear_all(process, messages),
            on_exit=lambda: self._on_exit(process),
            python=self._python,
        )
        try:
            try:
                data = frame(setup)
            except (TypeError, ValueError) as error:
                return f"environment: args must be JSON values: {error}"
            await process.start()
            process.send(data)
            why = await asyncio.wait_for(loaded, START_S)
        except OSError as error:  # TimeoutError is one too
            late = isinstance(error, TimeoutError)
            why = f"loading it took more than {START_S:g} s" if late else f"no new process: {error}"
        finally:
            self._notes.give_up()
        if why:
            self._process = None
            await process.close(grace_s=0.0)
        self.is_ready = not why
        self._changed.set()
        return why

    def restart(self) -> None:
        """Start another process, if none is being started."""
        if self._restarting is None or self._restarting.done():
            self.broken_by = ""
            self._restarting = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        for attempt in range(START_TRIES):
            self.num_restarts += 1
            why = await self.start()
            if not why:
                return
            await asyncio.sleep(LOOK_S * attempt)
        self.broken_by = why
        self._changed.set()

    async def close(self) -> None:
        self.is_ready = False
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        process, self._process = self._process, None
        await asyncio.gather(*(one.close() for one in (process, *self._dying) if one is not None))

    # ------------------------------------------------------------------ its episodes

    def begin(self, begin: Begin) -> Episode:
        episode = self._episodes[begin.key] = Episode(self, begin.key)
        self.send(episode, begin)
        return episode

    def send(self, episode: Episode, message: Begin | Told | Full | Refused) -> None:
        """Give the environment its turn. A message to an episode that is lost goes nowhere."""
        if self._episodes.get(episode.key) is episode and self._process is not None:
            episode.due_s = asyncio.get_running_loop().time() + self._timeout_s + min(GRACE_S, self._timeout_s)
            self._process.send(frame(message))

    def give_up(self, episode: Episode) -> None:
        if self._episodes.pop(episode.key, None) is not None and self._process is not None:
            self._process.send(frame(Cancel(episode.key)))

    def look(self) -> None:
        """Kill the process if an episode is so late that the process itself does not end it, or if it forks without
        end."""
        now, process = asyncio.get_running_loop().time(), self._process
        if process is not None and self.is_ready and process.forks.is_over():
            cause = self._running()
            self._dying.add(process)
            process.kill()
            self._lose(f"the environment had more than {process.forks.limit} processes", cause, Outcome.ERROR)
            return
        late = next((one for one in self._episodes.values() if one.due_s is not None and one.due_s < now), None)
        if late is None or process is None:
            return
        was_stopped = process.is_stopped
        cause = self._running() or late.key
        self._dying.add(process)
        process.kill()
        if was_stopped:
            self._lose("the environment's process was stopped", None)
        else:
            self._lose(f"the environment did nothing for {self._timeout_s:g} s", cause, Outcome.TIMEOUT)

    def _hear_all(self, process: PluginProcess, messages: Iterator[Loaded | Ask | Saved | Ended]) -> None:
        for message in messages:
            self._hear(process, message)

    def _hear(self, process: PluginProcess, message: Loaded | Ask | Saved | Ended) -> None:
        if process is not self._process:
            return
        if isinstance(message, Loaded):
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_result(message.failed)
            return
        episode = self._episodes.get(message.key)
        if episode is None:
            return
        if isinstance(message, Ended):
            del self._episodes[message.key]
        episode.hear(message)

    def _on_exit(self, process: PluginProcess) -> None:
        self._dying.discard(process)
        if process is not self._process:
            return
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(f"its process {process.how_it_ended}")
        elif self.is_ready:
            self._lose(f"the environment's process {process.how_it_ended}", self._running())

    def _running(self) -> int | None:
        """The key of the episode whose code is running, or was when the process died."""
        note = self._notes.read()[1] if self._notes is not None else ""
        return int(note) if note else None

    def _lose(self, reason: str, cause: int | None, outcome: Outcome = Outcome.INFRASTRUCTURE) -> None:
        self._process, self.is_ready = None, False
        episodes, self._episodes = self._episodes, {}
        self.restart()
        for key, episode in episodes.items():
            episode.hear(EpisodeLost(reason, is_cause=None if cause is None else key == cause, outcome=outcome))
