"""Scores rollouts in reward processes that can be killed, each item with a deadline of its own.

    score() ─► queue ─► slot: a process and the items sent to it ─► reply ─► Scored
                 ▲            │ deadline passed: SIGKILL, new process
                 └────────────┘ late item to the back of the queue (once), its neighbours to the front, unharmed

Where the first replies to a prompt are late, the others of the same call wait in siblings.py, and may be given up.

What waits for what: `score` waits for the future of its item. A slot waits for a reply, a deadline or the end of its
process. A plain function scores one item at a time, so the deadline of only the first item in a slot is running. More
items, as many as take about 20 ms, are sent behind it, so that the process need not wait for the next message. An async
function scores up to `concurrency` items at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from posttrain.errors import PluginError
from posttrain.records import Outcome, Rollout, Row, Scored
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward, resolve
from posttrain.scoring.pool.item import Item, Receiver
from posttrain.scoring.pool.siblings import GIVEN_UP, Siblings
from posttrain.scoring.pool.slot import Reports, Slot, watch
from posttrain.scoring.pool.stats import PoolStats
from posttrain.scoring.pool.wire import Answer, EncodedPair, Setup, encode_pairs, frame

CLOSED = "the pool was closed"


class RewardPool:
    """A reward function in `num_processes` processes.

    spec: a name or RewardSpec. timeout_s: seconds that one score may take. retries: how often a rollout is tried again
    after a timeout or a lost process. concurrency: how many items an async function scores at once in one process.
    memory_gib: private memory that a process may use; None sets no limit. start_timeout_s: seconds that the import of
    the plug-in, with its `warm_up()`, may take.
    """

    def __init__(
        self,
        spec: str | RewardSpec,
        num_processes: int = 1,
        timeout_s: float = 10.0,
        *,
        retries: int = 1,
        concurrency: int = 32,
        memory_gib: float | None = 8.0,
        start_timeout_s: float = 60.0,
    ):
        if num_processes < 1 or timeout_s <= 0 or retries < 0 or concurrency < 1:
            raise ValueError("num_processes and concurrency must be at least 1, timeout_s above 0, retries at least 0")
        self.spec = RewardSpec.of(spec)
        self.num_processes = num_processes
        self.timeout_s = timeout_s
        self.retries = retries
        self.concurrency = concurrency
        self.memory_gib = memory_gib
        self.start_timeout_s = start_timeout_s
        self._stats = PoolStats()
        self._slots: list[Slot] = []
        self._queue: deque[Item] = deque()
        self._num_items = 0
        self._last_scored_s = float("-inf")
        self._control: EncodedPair | None = None  # a pair that was scored without trouble
        self._settling: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._is_open = False
        self._is_scheduled = False

    @property
    def stats(self) -> PoolStats:
        self._stats.num_restarts = sum(slot.num_restarts for slot in self._slots)
        return self._stats

    @property
    def pids(self) -> list[int]:
        """The process ids of the reward processes that are ready."""
        return [slot.pid for slot in self._slots if slot.pid is not None]

    async def start(self) -> None:
        """Check the plug-in and start the processes. Raises PluginError if they cannot load it."""
        check_reward(self.spec.name, self.spec.args, python=self.spec.python)
        reports = Reports(
            self._replied, self._late, self._died, self._queue_in_front, self._dispatch, lambda _: self._dispatch()
        )
        setup = self._setup()
        self._slots = [
            Slot(
                setup,
                reports,
                timeout_s=self.timeout_s,
                start_timeout_s=self.start_timeout_s,
                concurrency=self.concurrency,
                python=self.spec.python,
            )
            for _ in range(self.num_processes)
        ]
        self._is_open = True
        self._watching = asyncio.get_running_loop().create_task(watch(self._slots))
        failures = [reason for reason in await asyncio.gather(*(slot.start() for slot in self._slots)) if reason]
        if failures:
            await self.close()
            reason = failures[0]
            raise PluginError(reason if reason.startswith("reward ") else f"reward {self.spec.name!r}: {reason}")

    async def score(self, rollout: Rollout, row: Row) -> Scored:
        """The rollout's score, or the reason why it has none. It raises nothing, whatever the reward function does."""
        return await self.begin([(rollout, row)])[0]

    def begin(self, pairs: Iterable[tuple[Rollout, Row]]) -> list[asyncio.Future[Scored]]:
        """Begin to score. Returns a future for the score of each pair. A cancelled future gives up its score."""
        new = asyncio.get_running_loop().create_future
        futures = [(pair, new()) for pair in encode_pairs(pairs)]
        self.begin_encoded(futures)
        return [future for _, future in futures]

    def begin_encoded(self, pairs: Iterable[tuple[EncodedPair | str, Receiver]]) -> None:
        """As `begin`, for pairs that another process has encoded, each with who gets its score. If it could not encode
        a pair, the reason is given in place of the pair.
        """
        if not self._is_open:
            raise RuntimeError("start the pool before scoring")
        row, siblings = None, Siblings()
        for pair, receiver in pairs:
            if isinstance(pair, str):
                receiver.set_result(self._count(Scored(None, Outcome.ERROR, pair)))
                continue
            if pair.row is not row:  # consecutive replies to one prompt share its encoded row
                row, siblings = pair.row, Siblings()
            self._add(pair, receiver, siblings)
        self._dispatch_soon()

    def score_all(self, pairs: Iterable[tuple[Rollout, Row]]) -> list[Scored]:
        """For callers without an event loop: start the pool, score all pairs, close it. Returns the scores in order."""
        results: dict[int, Scored] = {}

        async def work(source: Iterator[list[tuple[int, tuple[Rollout, Row]]]]) -> None:
            for run in source:
                futures = self.begin(pair for _, pair in run)
                results.update(zip((index for index, _ in run), await asyncio.gather(*futures), strict=True))

        async def run() -> None:
            await self.start()
            try:
                source = ([*run] for _, run in groupby(enumerate(pairs), key=lambda item: item[1][1].id))
                await asyncio.gather(*(work(source) for _ in range(2 * self.concurrency * self.num_processes)))
            finally:
                await self.close()

        asyncio.run(run())
        return [results[index] for index in sorted(results)]

    async def close(self) -> None:
        """End the reward processes and everything that they started. Unfinished scores get outcome `infrastructure`."""
        self._is_open = False
        waiting = [*self._queue, *(item for slot in self._slots for item in slot.take_all())]
        self._queue.clear()
        self._fail(waiting, CLOSED)
        for task in (*self._settling, *filter(None, [self._watching])):
            task.cancel()
        await asyncio.gather(*(slot.close() for slot in self._slots), *self._settling, return_exceptions=True)

    def _setup(self) -> bytes:
        target = asdict(resolve(self.spec.name))
        try:
            return frame(Setup(target, dict(self.spec.args), self.timeout_s, self.memory_gib))
        except (TypeError, ValueError) as error:
            raise PluginError(f"reward {self.spec.name!r}: args must be JSON values: {error}") from error

    def _add(self, pair: EncodedPair, receiver: Receiver, siblings: Siblings, *, is_control: bool = False) -> None:
        self._num_items += 1
        self._queue.append(Item(self._num_items, pair, receiver, time.monotonic(), siblings, is_control=is_control))

    def _dispatch_soon(self) -> None:
        """Send queued items when all that comes in this round of the event loop is there."""
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Send queued items to slots with room. They end as `infrastructure` if no process can be started any more."""
        self._is_scheduled = False
        self._fill_slots()
        for slot in self._slots:
            slot.flush()
        broken = [slot for slot in self._slots if slot.broken_by]
        if self._queue and broken and len(broken) == len(self._slots):
            self._fail_waiting(broken)

    def _fill_slots(self) -> None:
        while self._queue:
            item = self._queue[0]
            if item.receiver.done():  # its caller gave up
                self._queue.popleft()
                self._hear(item.siblings.settled(item))
                continue
            if item.siblings.holds_back(item):
                self._queue.popleft()
                self._hear(item.siblings.settled())
                continue
            slot = min((slot for slot in self._slots if slot.accepts(item)), key=len, default=None)
            if slot is None:
                break
            slot.send(self._queue.popleft())

    def _fail_waiting(self, broken: Sequence[Slot]) -> None:
        reason = f"no reward process could be started: {broken[0].broken_by}"
        waiting = list(self._queue)
        self._queue.clear()
        self._fail(waiting, reason)
        for slot in broken:  # for the scores to come
            slot.revive()

    def _fail(self, items: Iterable[Item], reason: str) -> None:
        for item in items:
            self._resolve(item, Scored(None, Outcome.INFRASTRUCTURE, reason))

    def _queue_in_front(self, items: list[Item]) -> None:
        self._queue.extendleft(reversed(items))

    def _replied(self, item: Item, answer: Answer) -> None:
        self._stats.busy_s += answer.seconds
        if answer.is_late:
            self._late(item)
        elif answer.result is None:
            self._resolve(item, Scored(None, Outcome.ERROR, answer.error))
        else:
            self._last_scored_s = time.monotonic()
            self._control = item.pair
            self._resolve(item, Scored(answer.result))

    def _late(self, item: Item) -> None:
        item.num_timeouts += 1
        self._stats.num_timeouts += 1
        self._stats.late_row = item.pair.row_id
        item.siblings.is_late(item)
        if not self._retry(item):
            task = asyncio.get_running_loop().create_task(self._settle_late(item))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    def _died(self, item: Item, reason: str, outcome: Outcome) -> None:
        item.num_deaths += 1
        if not self._retry(item):
            self._resolve(item, Scored(None, outcome, reason))

    def _retry(self, item: Item) -> bool:
        if item.is_control or item.num_timeouts + item.num_deaths > self.retries:
            return False
        self._stats.num_retries += 1
        self._queue.append(item)
        return True

    async def _settle_late(self, item: Item) -> None:
        """Decide why a rollout has no score that passed its deadline in every try.

        If the reward scores other rollouts meanwhile, it hangs because of this one, and further tries are useless. If
        it scores no others either, the reward or a service that it needs is down, and a later try may succeed.
        """
        reason = f"no score within {self.timeout_s:g} s" + (f", {item.num_timeouts} times" if self.retries else "")
        if not item.is_control and item.num_timeouts > 1 and await self._others_are_scored(item.sent_s):
            self._resolve(item, Scored(None, Outcome.UNSCORABLE, f"{reason}, while others were scored"))
        else:
            self._resolve(item, Scored(None, Outcome.TIMEOUT, reason))

    async def _others_are_scored(self, since_s: float) -> bool:
        """Whether the reward has scored another rollout since then; if not, an earlier rollout is scored again."""
        if self._last_scored_s > since_s:
            return True
        if not self._control:
            return False
        future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        self._add(self._control, future, Siblings(), is_control=True)
        self._dispatch()
        return (await future).outcome is Outcome.SCORED

    def _resolve(self, item: Item, scored: Scored) -> None:
        if item.receiver.done():
            return
        wall_s = time.monotonic() - item.started_s
        scored = Scored(scored.result, scored.outcome, scored.reason, wall_s)
        item.receiver.set_result(scored if item.is_control else self._count(scored))
        self._hear(item.siblings.settled(item, scored.outcome))

    def _hear(self, settled: tuple[list[Item], list[Item]]) -> None:
        """Send the replies that were held back for their siblings, or give them up."""
        to_send, given_up = settled
        for item in given_up:
            self._resolve(item, GIVEN_UP)
        if not self._is_open:
            self._fail(to_send, CLOSED)
        elif to_send:
            self._queue_in_front(to_send)
            self._dispatch_soon()

    def _count(self, scored: Scored) -> Scored:
        self._stats.outcomes[scored.outcome] += 1
        return scored
