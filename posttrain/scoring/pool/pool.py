"""Scores rollouts in reward processes that can be killed, each item with a deadline of its own.

    score() ─► queue ─► slot: a process and the items sent to it ─► reply ─► Scored
                 ▲            │ deadline passed: SIGKILL, new process
                 └────────────┘ late item to the back of the queue (once), its neighbours to the front, unharmed

What waits for what: `score` waits for its item's future; a slot waits for a reply, a deadline or the process's end.
A plain function runs one item at a time, so only the first item of a slot has a running deadline; the items behind it
hide the time of the round trip, as many as fit into about 20 ms. An async function runs up to `concurrency` at once.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from posttrain.errors import PluginError
from posttrain.records import Outcome, RewardResult, Rollout, Row, Scored
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward, resolve
from posttrain.scoring.pool.slot import Item, Reports, Slot
from posttrain.scoring.pool.wire import Answer, EncodedPair, Setup, encode_pairs, frame

_NEVER = float("-inf")


@dataclass(slots=True)
class PoolStats:
    """What a pool has done. outcomes: scorings by outcome; busy_s: seconds inside the reward function, all processes.

    num_retries: of single rollouts; num_restarts: of processes.
    """

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    busy_s: float = 0.0
    num_retries: int = 0
    num_restarts: int = 0

    def __add__(self, other: "PoolStats") -> "PoolStats":
        return PoolStats(
            self.outcomes + other.outcomes,
            self.busy_s + other.busy_s,
            self.num_retries + other.num_retries,
            self.num_restarts + other.num_restarts,
        )


class RewardPool:
    """A reward function in `num_processes` processes.

    spec: a name or RewardSpec. timeout_s: deadline of one score. retries: further tries after a timeout or a lost
    process. concurrency: items at once in a process of an async function. memory_gib: private memory that a process may
    use, None for no limit. start_timeout_s: for importing the plug-in and for its `warm_up()`.
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
        self._last_scored_s = _NEVER
        self._control: EncodedPair | None = None  # a pair that was scored without trouble
        self._settling: set[asyncio.Task[None]] = set()
        self._is_open = False

    @property
    def stats(self) -> PoolStats:
        self._stats.num_restarts = sum(slot.num_restarts for slot in self._slots)
        return self._stats

    @property
    def pids(self) -> list[int]:
        """Of the reward processes that are ready."""
        return [slot.pid for slot in self._slots if slot.pid is not None]

    async def start(self) -> None:
        """Checks the plug-in and starts the processes. Raises PluginError where they cannot load it."""
        check_reward(self.spec.name, self.spec.args)
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
            )
            for _ in range(self.num_processes)
        ]
        self._is_open = True
        failures = [reason for reason in await asyncio.gather(*(slot.start() for slot in self._slots)) if reason]
        if failures:
            await self.close()
            reason = failures[0]
            raise PluginError(reason if reason.startswith("reward ") else f"reward {self.spec.name!r}: {reason}")

    async def score(self, rollout: Rollout, row: Row) -> Scored:
        """The rollout's score, or why there is none. Whatever the reward function does, this does not raise."""
        return await self.begin([(rollout, row)])[0]

    def begin(self, pairs: Iterable[tuple[Rollout, Row]]) -> list[asyncio.Future[Scored]]:
        """Begins to score. Returns what `score` would wait for, for each pair; cancel one to give its score up."""
        return self.begin_encoded(encode_pairs(pairs))

    def begin_encoded(self, pairs: Iterable[EncodedPair | str]) -> list[asyncio.Future[Scored]]:
        """`begin`, with pairs that another process has encoded; a text in place of a pair is why it has no score."""
        if not self._is_open:
            raise RuntimeError("start the pool before scoring")
        futures = []
        for pair in pairs:
            future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
            futures.append(future)
            if isinstance(pair, str):
                future.set_result(self._count(Scored(None, Outcome.ERROR, pair)))
            else:
                self._add(pair, future)
        self._dispatch()
        return futures

    def score_all(self, pairs: Iterable[tuple[Rollout, Row]]) -> list[Scored]:
        """Starts the pool, scores all pairs, closes it: for a caller without an event loop. Results in order."""
        results: dict[int, Scored] = {}

        async def work(source: Iterator[tuple[int, tuple[Rollout, Row]]]) -> None:
            for index, (rollout, row) in source:
                results[index] = await self.score(rollout, row)

        async def run() -> None:
            await self.start()
            try:
                source = enumerate(pairs)
                await asyncio.gather(*(work(source) for _ in range(2 * self.concurrency * self.num_processes)))
            finally:
                await self.close()

        asyncio.run(run())
        return [results[index] for index in sorted(results)]

    async def close(self) -> None:
        """Ends the processes and all they started. What is still being scored comes back as `infrastructure`."""
        self._is_open = False
        waiting = [*self._queue, *(item for slot in self._slots for item in slot.take_all())]
        self._queue.clear()
        for item in waiting:
            self._resolve(item, Scored(None, Outcome.INFRASTRUCTURE, "the pool was closed"))
        for task in self._settling:
            task.cancel()
        await asyncio.gather(*(slot.close() for slot in self._slots), *self._settling, return_exceptions=True)

    def _setup(self) -> bytes:
        target = asdict(resolve(self.spec.name))
        try:
            return frame(Setup(target, dict(self.spec.args), self.timeout_s, self.memory_gib))
        except (TypeError, ValueError) as error:
            raise PluginError(f"reward {self.spec.name!r}: args must be JSON values: {error}") from error

    def _add(self, pair: EncodedPair, future: asyncio.Future[Scored], is_control: bool = False) -> None:
        self._num_items += 1
        self._queue.append(Item(self._num_items, pair, future, time.monotonic(), is_control=is_control))

    def _dispatch(self) -> None:
        """Sends what can be sent; where no process can be started any more, ends what waits as `infrastructure`."""
        self._fill_slots()
        for slot in self._slots:
            slot.flush()
        broken = [slot for slot in self._slots if slot.broken_by]
        if self._queue and broken and len(broken) == len(self._slots):
            self._fail_waiting(broken)

    def _fill_slots(self) -> None:
        while self._queue:
            item = self._queue[0]
            if item.future.done():  # its caller gave up
                self._queue.popleft()
                continue
            slot = min((slot for slot in self._slots if slot.accepts(item)), key=len, default=None)
            if slot is None:
                break
            slot.send(self._queue.popleft())

    def _fail_waiting(self, broken: Sequence[Slot]) -> None:
        reason = f"no reward process could be started: {broken[0].broken_by}"
        waiting = list(self._queue)
        self._queue.clear()
        for item in waiting:
            self._resolve(item, Scored(None, Outcome.INFRASTRUCTURE, reason))
        for slot in broken:  # for the scores to come
            slot.revive()

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
        if not self._retry(item):
            task = asyncio.get_running_loop().create_task(self._settle_late(item))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    def _died(self, item: Item, reason: str) -> None:
        item.num_deaths += 1
        if not self._retry(item):
            self._resolve(item, Scored(None, Outcome.INFRASTRUCTURE, reason))

    def _retry(self, item: Item) -> bool:
        if item.is_control or item.num_timeouts + item.num_deaths > self.retries:
            return False
        self._stats.num_retries += 1
        self._queue.append(item)
        return True

    async def _settle_late(self, item: Item) -> None:
        """Decide what a rollout is that passed its deadline in every try.

        A grader that hangs on this reply again and again, while it scores others, cannot parse the reply: a wrong
        answer. Where others are not scored either, the grader is at fault, and nothing is known of the reply.
        """
        reason = f"no score within {self.timeout_s:g} s" + (f", {item.num_timeouts} times" if self.retries else "")
        if not item.is_control and item.num_timeouts > 1 and await self._others_are_scored(item.sent_s):
            result = RewardResult(0.0, reason="unparseable")
            self._resolve(item, Scored(result, Outcome.UNPARSEABLE, f"{reason}, while others were scored"))
        else:
            self._resolve(item, Scored(None, Outcome.TIMEOUT, reason))

    async def _others_are_scored(self, since_s: float) -> bool:
        """Whether another rollout was scored since then; if none was, score one again that was scored before."""
        if self._last_scored_s > since_s:
            return True
        if not self._control:
            return False
        future: asyncio.Future[Scored] = asyncio.get_running_loop().create_future()
        self._add(self._control, future, is_control=True)
        self._dispatch()
        return (await future).outcome is Outcome.SCORED

    def _resolve(self, item: Item, scored: Scored) -> None:
        if item.future.done():
            return
        wall_s = time.monotonic() - item.started_s
        scored = Scored(scored.result, scored.outcome, scored.reason, wall_s)
        item.future.set_result(scored if item.is_control else self._count(scored))

    def _count(self, scored: Scored) -> Scored:
        self._stats.outcomes[scored.outcome] += 1
        return scored
