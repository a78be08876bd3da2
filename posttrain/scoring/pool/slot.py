"""One slot of a pool: a reward process, the items sent to it, and the deadline of the first of them.

A slot reports what happened to each item, and replaces a process that was lost. The pool decides whether an item is
tried again, and which outcome it gets.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from posttrain.records import Outcome
from posttrain.scoring.pool.item import Item
from posttrain.scoring.pool.process import PluginProcess
from posttrain.scoring.pool.wire import Answer, Loaded

_PROGRAM = "posttrain.scoring.pool.reward_process"
_PIPELINE_S = 0.02
_MAX_PIPELINE = 256
# The process of an async function cancels a late item itself. If it takes this much longer, it counts as stuck.
_ASYNC_GRACE_S = 1.0
_MAX_START_FAILURES = 3
_BACKOFF_S = 0.2
_LOOK_S = 0.5  # pause between two looks at how many processes there are


@dataclass(frozen=True, slots=True)
class Reports:
    """The functions by which a slot reports to its pool.

    replied: an item has an answer. late: an item passed its deadline. died: an item's process was lost, why, and what
    the outcome is if it is not tried again.
    unharmed: items that another item's failure took down with the process, and which must be sent again. room: the slot
    can take more items. broken: no process can be started, and why.
    """

    replied: Callable[[Item, Answer], None]
    late: Callable[[Item], None]
    died: Callable[[Item, str, Outcome], None]
    unharmed: Callable[[list[Item]], None]
    room: Callable[[], None]
    broken: Callable[[str], None]


class Slot:
    """Keeps one reward process alive and feeds it.

    setup: the frame that tells a new process what to load. python: the interpreter that runs it; "" for this one.
    """

    def __init__(
        self,
        setup: bytes,
        reports: Reports,
        *,
        timeout_s: float,
        start_timeout_s: float,
        concurrency: int,
        python: str = "",
    ):
        self._setup = setup
        self._python = python
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._concurrency = concurrency
        self._reports = reports
        self._items: dict[int, Item] = {}  # in the order sent
        self._unsent: list[bytes] = []
        self._process: PluginProcess | None = None
        self._loaded: asyncio.Future[str] | None = None
        self._is_async = False
        self._is_ready = False
        self._mean_s = _PIPELINE_S
        self._last_reply_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._dying: set[PluginProcess] = set()
        self._restarting: asyncio.Task[None] | None = None
        self.broken_by = ""
        self.num_restarts = 0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def pid(self) -> int | None:
        """The id of the process; None until it has loaded the plug-in."""
        return self._process.pid if self._process is not None and self._is_ready else None

    async def start(self) -> str:
        """Start a process and have it load the plug-in. Returns "", or the reason if it could not."""
        loop = asyncio.get_running_loop()
        loaded = self._loaded = loop.create_future()
        process = PluginProcess(
            _PROGRAM,
            Loaded | Answer,
            on_messages=lambda messages: self._on_messages(process, messages),
            on_exit=lambda: self._on_exit(process),
            python=self._python,
        )
        self._process = process
        try:
            await process.start()
            process.send(self._setup)
            reason = await asyncio.wait_for(loaded, self._start_timeout_s)
        except OSError as error:  # TimeoutError is one too
            late = isinstance(error, TimeoutError)
            reason = f"loading it took more than {self._start_timeout_s:g} s" if late else f"no new process: {error}"
        if reason:
            self._process = None
            await process.close(grace_s=0.0)
        self._is_ready = not reason
        return reason

    def accepts(self, item: Item) -> bool:
        """Whether the slot can take the item now."""
        if not self._is_ready:
            return False
        if not self._items:
            return True
        if item.alone or next(iter(self._items.values())).alone:
            return False
        if self._is_async:
            return len(self._items) < self._concurrency
        return len(self._items) < min(_PIPELINE_S / self._mean_s, _MAX_PIPELINE)

    def send(self, item: Item) -> None:
        """Take an item. `flush` then sends all items that were taken to the process, in one write."""
        item.sent_s = time.monotonic()
        self._items[item.key] = item
        self._unsent.append(item.pair.question(item.key))
        if len(self._items) == 1:
            self._arm()

    def flush(self) -> None:
        if self._unsent and self._process is not None:
            self._process.send(b"".join(self._unsent))
        self._unsent.clear()

    def revive(self) -> None:
        """Try once more to start a process, if the slot had given up."""
        if self.broken_by and (self._restarting is None or self._restarting.done()):
            self._restart(num_tries=1)

    def look(self) -> None:
        """Kill the process if it has started processes without end."""
        process = self._process
        if process is None or not process.forks.is_over():
            return
        why = f"the reward had more than {process.forks.limit} processes"
        if self._is_ready:
            self._dying.add(process)
            process.kill()
            self._lose(lambda item: self._reports.died(item, why, Outcome.ERROR))
        elif self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(why)

    def take_all(self) -> list[Item]:
        items = list(self._items.values())
        self._items.clear()
        self._unsent.clear()
        self._arm()
        return items

    async def close(self) -> None:
        self._is_ready = False
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        process, self._process = self._process, None
        await asyncio.gather(*(w.close() for w in (process, *self._dying) if w is not None))

    def _on_messages(self, process: PluginProcess, messages: Iterable[Loaded | Answer]) -> None:
        try:
            for message in messages:
                self._on_message(process, message)
        finally:  # also of those before one that cannot be read
            self._arm()
            self._reports.room()

    def _on_message(self, process: PluginProcess, message: Loaded | Answer) -> None:
        if process is not self._process:
            return
        if isinstance(message, Loaded):
            self._is_async = message.is_async
            if self._loaded is not None and not self._loaded.done():
                self._loaded.set_result(message.failed)
            return
        item = self._items.pop(message.key, None)
        if item is None:
            return
        self._last_reply_s = time.monotonic()
        self._mean_s += 0.1 * (max(message.seconds, 1e-5) - self._mean_s)
        self._reports.replied(item, message)

    def _arm(self) -> None:
        """Start the deadline of the first item: at the time it was sent, or at the answer to the item before it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        first = next(iter(self._items.values()), None)
        if first is None:
            return
        begun_s = first.sent_s if self._is_async else max(first.sent_s, self._last_reply_s)
        limit_s = self._timeout_s + (_ASYNC_GRACE_S if self._is_async else 0.0)
        delay_s = begun_s + limit_s - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def _expire(self) -> None:
        process = self._process
        assert process is not None
        self._dying.add(process)
        was_stopped = process.is_stopped  # then the item is late because its process is frozen
        process.kill()
        self._lose(self._blame("was stopped") if was_stopped else self._reports.late)

    def _on_exit(self, process: PluginProcess) -> None:
        self._dying.discard(process)
        if process is not self._process:
            return
        how = process.how_it_ended
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(f"its process {how}")
        elif self._is_ready:
            self._lose(self._blame(how))

    def _blame(self, how: str) -> Callable[[Item], None]:
        return lambda item: self._reports.died(item, f"the reward's process {how}", Outcome.INFRASTRUCTURE)

    def _lose(self, blame: Callable[[Item], None]) -> None:
        """Handle the loss of the process: report the item that ended it, send the others again, start another process.

        A plain function was working on the first item, which therefore is the cause. An async function was working on
        all items. So each is sent again alone, and an item counts as the cause only if it was already alone.
        """
        self._process, self._is_ready = None, False
        items = self.take_all()
        if self._is_async and len(items) > 1:
            for item in items:
                item.alone = True
            guilty, unharmed = [], items
        else:
            guilty, unharmed = items[:1], items[1:]
        self._restart(_MAX_START_FAILURES)
        self._reports.unharmed(unharmed)
        for item in guilty:
            blame(item)
        self._reports.room()

    def _restart(self, num_tries: int) -> None:
        self._restarting = asyncio.get_running_loop().create_task(self._start_again(num_tries))

    async def _start_again(self, num_tries: int) -> None:
        for attempt in range(num_tries):
            self.num_restarts += 1
            reason = await self.start()
            if not reason:
                self.broken_by = ""
                self._reports.room()
                return
            self.broken_by = reason if attempt == num_tries - 1 else ""
            await asyncio.sleep(0.0 if self.broken_by else _BACKOFF_S * 2**attempt)
        self._reports.broken(self.broken_by)


async def watch(slots: Sequence[Slot]) -> None:
    """Look at the processes of the slots again and again, until it is cancelled."""
    while True:
        await asyncio.sleep(_LOOK_S)
        for slot in slots:
            slot.look()
