"""Simulated actors: an engine that decodes, and work that takes a known number of seconds.

Time is continuous. An engine does not go from token to token: between two events its batch stays the same, so how many
steps it makes until then is computed at once, parts of a step included.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from posttrain.forecast.costs import EngineCosts

EPSILON = 1e-9


@dataclass(slots=True, eq=False)
class SimulatedGroup:
    """A group from its admission on. lengths: tokens of its replies. is_kept: whether it will be trained on. stamp: of
    its admission. oldest: the policy version that sampled its first token. num_left: replies that an engine has and are
    not finished. later: lengths of the replies that no engine was given yet. num_unscored: replies without a score that
    engines were given.
    """

    order: int
    lengths: list[int]
    is_kept: bool
    stamp: int
    oldest: int = -1
    num_left: int = 0
    later: list[int] = field(default_factory=list)
    num_unscored: int = 0
    ready_since: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of all replies."""
        return sum(self.lengths)


class Engine:
    """An engine, or the engines of a judge. Its batch has at most `max_seqs` sequences, the rest wait.

    padded: the batch is refilled only when all of it is finished, and until then costs as if none were, as in libraries
    without continuous batching. finished: is called with each group all of whose sequences are finished, and the time.
    """

    def __init__(
        self,
        name: str,
        costs: EngineCosts,
        max_seqs: int,
        *,
        prompt_tokens: int,
        finished: Callable[[SimulatedGroup], None],
        padded: bool = False,
    ):
        self.name = name
        self.version = 0
        self.speed = 1.0
        self.busy_s = 0.0
        self.tokens = 0.0
        self.epoch = 0  # counts changes of what happens next; an event of an earlier one is not valid any more
        self.intervals: list[tuple[float, float]] = []
        self.groups: set[int] = set()
        self._costs = costs
        self._max_seqs = max_seqs
        self._prompt_tokens = prompt_tokens
        self._finished = finished
        self._padded = padded
        self._now = 0.0
        self._paused_until = 0.0
        self._debt_s = 0.0  # work to be done before the next decode step: prompts, KV caches to compute again
        self._steps = 0.0
        self._batch = 0  # sequences that a step costs
        self._context = 0.0
        self._running: list[tuple[float, int, SimulatedGroup, int]] = []  # by the step at which each ends
        self._waiting: deque[tuple[SimulatedGroup, int]] = deque()
        self._count = 0

    @property
    def is_busy(self) -> bool:
        """Whether it has work."""
        return bool(self._running or self._waiting)

    def send(self, group: SimulatedGroup, lengths: list[int], now: float) -> None:
        """Take a group whose replies will have these lengths."""
        self.advance(now)
        group.num_left = len(lengths)
        self.groups.add(group.order)
        self._waiting.extend((group, length) for length in lengths)
        if self._padded:
            self.epoch += 1  # its batch is filled by the next event, when all that is sent at this time is here
        else:
            self._fill()

    def withdraw(self, group: SimulatedGroup, now: float) -> None:
        """Stop sampling for a group."""
        if group.order not in self.groups:
            return
        self.advance(now)
        self.groups.discard(group.order)
        self._waiting = deque(item for item in self._waiting if item[0] is not group)
        left = [item for item in self._running if item[2] is not group]
        self._context -= sum(self._context_of(item) for item in self._running if item[2] is group)
        self._running = left
        heapq.heapify(self._running)
        self._batch = len(left) if not self._padded or not left else self._batch
        self._fill()

    def _context_of(self, item: tuple[float, int, SimulatedGroup, int]) -> float:
        end, _, _, length = item
        return self._prompt_tokens + length - (end - self._steps)

    def update(self, version: int, now: float, *, pause_s: float, recomputes: bool) -> None:
        """Stop for new weights."""
        self.advance(now)
        self.version = version
        self._paused_until = max(self._paused_until, now + pause_s)
        if recomputes:
            num_shared = len(self._running) - len({item[2].order for item in self._running})
            self._debt_s += max(0.0, self._context - num_shared * self._prompt_tokens) * self._costs.prefill_s
        self.epoch += 1

    def change_speed(self, speed: float, now: float) -> None:
        """Go on at another share of the full speed."""
        if speed != self.speed:
            self.advance(now)
            self.speed = speed
            self.epoch += 1

    def _fill(self) -> None:
        self.epoch += 1
        if self._padded and self._running:
            return
        while self._waiting and len(self._running) < self._max_seqs:
            group, length = self._waiting.popleft()
            if group.oldest < 0:
                group.oldest = self.version
                self._debt_s += self._prompt_tokens * self._costs.prefill_s  # once for the group, whose prompt is one
            self._count += 1
            heapq.heappush(self._running, (self._steps + length, self._count, group, length))
            self._context += self._prompt_tokens
        self._batch = len(self._running)

    def next_end(self) -> float:
        """When the next sequence ends, or a batch can be filled; infinity if there is no work."""
        if not self._running:
            return max(self._now, self._paused_until) if self._waiting else math.inf
        steps = max(0.0, self._running[0][0] - self._steps)
        work_s = self._debt_s + self._steps_s(steps)
        return max(self._now, self._paused_until) + work_s / self.speed

    def _steps_s(self, steps: float) -> float:
        base = self._costs.decode_s(self._batch) + self._costs.context_s * self._context
        return steps * base + self._costs.context_s * self._batch * steps * steps / 2

    def _steps_in(self, seconds: float) -> float:
        base = self._costs.decode_s(self._batch) + self._costs.context_s * self._context
        growth = self._costs.context_s * self._batch
        if not growth:
            return seconds / base
        return (math.sqrt(base * base + 2 * growth * seconds) - base) / growth

    def advance(self, now: float) -> None:
        """Work until `now`. No sequence may end before."""
        start, self._now = max(self._now, min(self._paused_until, now)), now
        if not self._running or now <= start:
            return
        self.busy_s += now - start
        if self.intervals and start - self.intervals[-1][1] < EPSILON:
            start_before, _ = self.intervals.pop()
            self.intervals.append((start_before, now))
        else:
            self.intervals.append((start, now))
        seconds = (now - start) * self.speed
        paid = min(seconds, self._debt_s)
        self._debt_s -= paid
        steps = min(self._steps_in(seconds - paid), max(0.0, self._running[0][0] - self._steps))
        self._steps += steps
        self.tokens += steps * len(self._running)
        self._context += steps * len(self._running)

    def end_first(self, now: float) -> None:
        """End the sequences that are finished at `now`, and those that end in the same step. Fill an empty batch."""
        self.advance(now)
        if not self._running:
            self._fill()
            return
        self._steps = max(self._steps, self._running[0][0])
        done: list[SimulatedGroup] = []
        while self._running and self._running[0][0] <= self._steps + EPSILON:
            _, _, group, length = heapq.heappop(self._running)
            self._context -= self._prompt_tokens + length
            group.num_left -= 1
            if not group.num_left:
                self.groups.discard(group.order)
                done.append(group)
        if not self._padded:
            self._batch = len(self._running)
        self._fill()
        for group in done:
            self._finished(group)


@dataclass(slots=True, eq=False)
class Work:
    """What takes a known number of seconds at full speed, one piece after another: steps of the trainer."""

    name: str
    is_busy: bool = False
    speed: float = 1.0
    left_s: float = 0.0
    busy_s: float = 0.0
    epoch: int = 0
    intervals: list[tuple[float, float]] = field(default_factory=list)
    _now: float = 0.0

    def begin(self, seconds: float, now: float) -> None:
        """Begin a piece."""
        self._now, self.left_s, self.is_busy = now, seconds, True
        self.intervals.append((now, now))
        self.epoch += 1

    def advance(self, now: float) -> None:
        """Work until `now`."""
        if self.is_busy:
            self.left_s = max(0.0, self.left_s - (now - self._now) * self.speed)
            self.busy_s += now - self._now
            self.intervals[-1] = (self.intervals[-1][0], now)
        self._now = now

    def change_speed(self, speed: float, now: float) -> None:
        """Go on at another share of the full speed."""
        if speed != self.speed:
            self.advance(now)
            self.speed = speed
            self.epoch += 1

    def next_end(self) -> float:
        """When the piece ends; infinity if there is none."""
        return self._now + self.left_s / self.speed if self.is_busy else math.inf

    def end(self, now: float) -> None:
        """The piece is finished."""
        self.advance(now)
        self.left_s, self.is_busy = 0.0, False
        self.epoch += 1
