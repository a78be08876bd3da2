"""The events of an asynchronous run, on the queue that the controller uses.

    admit ──► engine ──► [judge] ──► rewards ──► [reference] ──► ready | dropped ──► StalenessQueue
      ▲          ▲                      │ first replies: now the others                   │ a whole batch
      │          └──────────────────────┘                                                 │
      └── room ◄── engines take the version ◄── pull, pause ◄── step ◄── trainer ◄────────┘

The loops wait for each other as in `posttrain/rl/loop`: the trainer for a batch, and for the engines to have taken the
version before the last one. Each group goes to the engine with the fewest groups.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from posttrain.forecast.actors import Engine, SimulatedGroup, Work
from posttrain.forecast.costs import Costs
from posttrain.rl.loop.staleness import Mode, StalenessQueue

Draw = Callable[[random.Random, str, int], tuple[list[int], bool]]
MAX_EVENTS = 3_000_000


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated. engines, max_seqs: how many, and sequences in the batch of each. judges: engines of the judge.
    reward_workers: groups that are scored at the same time. shares: of capabilities in each batch. draw: the lengths of
    a new group's replies and whether it is kept, of a capability, for a step. first_replies: how many of them are
    sampled and scored before the others, None: all; a group that these stop has no others. padded: see `Engine`.
    """

    costs: Costs
    draw: Draw
    engines: int
    max_seqs: int
    groups_per_step: int
    max_staleness: int
    prompt_tokens: int = 0
    mode: Mode = "pace"
    over_provision: float = 0.0
    refills: int = 3
    shares: Mapping[str, float] = field(default_factory=lambda: {"all": 1.0})
    judges: int = 0
    judge_tokens: int = 0
    reward_workers: int = 64
    first_replies: int | None = None
    padded: bool = False


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. began, ended: seconds since the start. waited_s: for the batch. staleness: mean of its
    groups. queue: groups that were ready when it began.
    """

    began: float
    ended: float
    waited_s: float
    tokens: int
    staleness: float
    queue: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened. busy: intervals of each actor. sampled: tokens by each engine. dropped: groups. end: seconds."""

    steps: tuple[StepRecord, ...]
    busy: Mapping[str, list[tuple[float, float]]]
    busy_s: Mapping[str, float]
    sampled: Mapping[str, float]
    judged: float
    dropped: int
    end: float


class Simulation:
    """One run of `Setting`. `run` makes optimizer steps and returns what happened."""

    def __init__(self, setting: Setting, seed: int = 0):
        self._setting = setting
        self._random = random.Random(seed)
        self._queue = StalenessQueue(
            setting.groups_per_step,
            setting.max_staleness,
            setting.shares,
            refills=setting.refills,
            mode=setting.mode,
            over_provision=setting.over_provision,
        )
        self._engines = [
            Engine(
                f"engine-{number}",
                setting.costs.engine,
                setting.max_seqs,
                prompt_tokens=setting.prompt_tokens,
                finished=self._sampled,
                padded=setting.padded,
            )
            for number in range(setting.engines)
        ]
        judge = setting.costs.judge
        self._judges = [
            Engine(
                f"judge-{number}", judge, setting.max_seqs, prompt_tokens=setting.prompt_tokens, finished=self._judged
            )
            for number in range(setting.judges)
            if judge is not None
        ]
        self._trainer = Work("trainer")
        self._groups: dict[int, SimulatedGroup] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._ties = itertools.count()
        self._scheduled: dict[str, int] = {}
        self._touched: set[Engine] = set()  # engines of which what happens next may have changed
        self._version = 0  # of the trainer
        self._updating = False
        self._wants_update = False
        self._waiting_since = 0.0
        self._scoring = 0
        self._unscored: list[SimulatedGroup] = []
        self._batch: list[SimulatedGroup] = []
        self._steps: list[StepRecord] = []
        self._dropped = 0
        self._now = 0.0

    def run(self, steps: int) -> Trace:
        """Make so many steps. Raises ValueError if nothing goes on any more, or it would take too long to simulate."""
        self._admit()
        for _ in range(MAX_EVENTS):
            if len(self._steps) >= steps:
                return self._trace()
            self._schedule()
            if not self._events:
                raise ValueError("the simulation came to a halt: no group can be sampled, scored or trained on")
            now, _, happen = heapq.heappop(self._events)
            self._now = now
            happen(now)
        raise ValueError(f"the simulation was stopped after {MAX_EVENTS} events, {len(self._steps)} steps")

    # ------------------------------------------------------------------ events

    def _at(self, time: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._ties), happen))

    def _schedule(self) -> None:
        """Put the next end of each actor among the events, if it has changed."""
        if self._setting.costs.cores is not None:
            self._share_cores(self._setting.costs.cores)
        for engine in self._touched:
            self._expect(engine, engine.end_first)
        self._touched.clear()
        self._expect(self._trainer, self._trained)

    def _expect(self, actor: Engine | Work, end: Callable[[float], None]) -> None:
        if self._scheduled.get(actor.name) == actor.epoch:
            return
        epoch = self._scheduled[actor.name] = actor.epoch
        time = actor.next_end()
        if math.isfinite(time):
            self._at(max(time, self._now), lambda now: self._end(actor, end, epoch, now=now))

    def _end(self, actor: Engine | Work, end: Callable[[float], None], epoch: int, *, now: float) -> None:
        if actor.epoch == epoch:  # otherwise something has changed since, and another event stands for its end
            if isinstance(actor, Engine):
                self._touched.add(actor)
            end(now)

    def _share_cores(self, cores: float) -> None:
        actors: list[Engine | Work] = [*self._engines, *self._judges, self._trainer]
        speed = min(1.0, cores / max(1, sum(actor.is_busy for actor in actors)))
        for actor in actors:
            actor.change_speed(speed, self._now)
        self._touched.update(self._engines, self._judges)

    def _send(self, engines: list[Engine], group: SimulatedGroup, lengths: list[int]) -> None:
        """Give a group to the engine with the fewest groups."""
        engine = min(engines, key=lambda engine: len(engine.groups))
        engine.send(group, lengths, self._now)
        self._touched.add(engine)

    # ------------------------------------------------------------------ from admission to the queue

    def _oldest_version(self) -> int:
        return min(engine.version for engine in self._engines)

    def _admit(self) -> None:
        oldest = self._oldest_version()
        for _ in range(self._queue.room(oldest)):
            order, capability = self._queue.admit(oldest)
            lengths, is_kept = self._setting.draw(self._random, capability, self._version)
            group = self._groups[order] = SimulatedGroup(order, lengths, is_kept, oldest)
            first = self._setting.first_replies
            if first is not None:
                group.later = lengths[first:]
            self._sample(group, lengths[:first])

    def _sample(self, group: SimulatedGroup, lengths: list[int]) -> None:
        group.num_unscored = len(lengths)
        self._send(self._engines, group, lengths)

    def _sampled(self, group: SimulatedGroup) -> None:
        if self._judges:
            self._send(self._judges, group, [self._setting.judge_tokens] * group.num_unscored)
        else:
            self._judged(group)

    def _judged(self, group: SimulatedGroup) -> None:
        self._unscored.append(group)
        self._score(self._now)

    def _score(self, now: float) -> None:
        while self._unscored and self._scoring < self._setting.reward_workers:
            group = self._unscored.pop(0)
            self._scoring += 1
            self._at(now + self._setting.costs.reward_s, lambda now, group=group: self._scored(group, now))

    def _scored(self, group: SimulatedGroup, now: float) -> None:
        self._scoring -= 1
        self._score(now)
        reference_s = self._setting.costs.reference_s if not group.later else 0.0
        self._at(now + reference_s, lambda now: self._decide(group, now))

    def _decide(self, group: SimulatedGroup, now: float) -> None:
        if self._queue.holds(group.order):
            if group.later:
                later, group.later = group.later, []
                self._sample(group, later)
            elif group.is_kept:
                self._queue.ready(group.order)
            else:
                self._drop(group.order)
        self._train(now)
        self._admit()

    def _drop(self, order: int) -> None:
        self._queue.drop(order)
        self._groups.pop(order)
        self._dropped += 1

    # ------------------------------------------------------------------ training and new weights

    def _train(self, now: float) -> None:
        if self._batch or (orders := self._queue.take(self._version)) is None:
            return
        queue = self._queue.num_ready + len(orders)
        self._batch = [self._groups.pop(order) for order in orders]
        for order in self._queue.expired():
            for engine in self._engines:
                engine.withdraw(self._groups[order], now)
            self._touched.update(self._engines)
            self._drop(order)
        tokens = sum(group.tokens for group in self._batch)
        prompts = len(self._batch) * self._setting.prompt_tokens  # replies of a group share the prompt
        staleness = sum(self._version - group.oldest for group in self._batch) / len(self._batch)
        self._version += 1
        costs = self._setting.costs.trainer
        self._trainer.begin(costs.fixed_s + (tokens + prompts) * costs.token_s, now)
        self._steps.append(StepRecord(now, now, now - self._waiting_since, tokens, staleness, queue))
        self._admit()

    def _trained(self, now: float) -> None:
        self._trainer.end(now)
        if self._updating:  # the engines still take the version before
            self._wants_update = True
            return
        self._update(now)

    def _update(self, now: float) -> None:
        self._updating, self._wants_update = True, False
        version = self._version
        costs = self._setting.costs.update
        self._at(now + costs.pull_s, lambda now: self._load(version, now))
        self._steps[-1] = replace(self._steps[-1], ended=now)
        self._batch = []
        self._waiting_since = now
        self._train(now)
        self._admit()

    def _load(self, version: int, now: float) -> None:
        costs = self._setting.costs.update
        for engine in self._engines:
            engine.update(version, now, pause_s=costs.pause_s, recomputes=costs.recomputes)
        self._touched.update(self._engines)
        self._at(now + costs.pause_s, self._updated)
        self._admit()

    def _updated(self, now: float) -> None:
        self._updating = False
        if self._wants_update:
            self._update(now)

    def _trace(self) -> Trace:
        actors: list[Engine | Work] = [*self._engines, *self._judges, self._trainer]
        for actor in actors:
            actor.advance(self._now)
        return Trace(
            tuple(self._steps),
            {actor.name: actor.intervals for actor in actors},
            {actor.name: actor.busy_s for actor in actors},
            {engine.name: engine.tokens for engine in self._engines},
            sum(judge.tokens for judge in self._judges),
            self._dropped,
            self._now,
        )
