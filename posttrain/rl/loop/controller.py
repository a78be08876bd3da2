"""The controller of asynchronous RL: asyncio loops that move records between engines, reward actor and trainer.

    prompts ──► dispatch ──► engines (vLLM actors) ──► [judge] ──► reward actor ──► [reference] ──► group
                   ▲                                                     │ zero advantage, unscored: dropped,
                   │ room in the queue                                   │ its place free at once
                   └──────────────── StalenessQueue ◄────────────────────┘
                                          │ a whole batch, in dispatch order; the trainer waits only here
                                          ▼
                     engines ◄── weights v+1 ── trainer (its own ranks): step ──► metrics, checkpoint, commit

Parts in brackets are optional. The judge runs on engines or behind an endpoint, the reference in a process of its own.

All loops run in one TaskGroup, so the first failure ends all of them:

    workers.run            feeds the engines, fetches what they sampled, replaces those that are lost
    dispatch.run           admits groups whenever there is room
    scoring.run            takes the sampled groups: rewards, advantages, whether each is trained on
    start                  before the first step: has the engines load the trainer's weights, and compares both
    steps.run              takes a batch, has the trainer make a step, sends the new weights; the only loop that waits
                           for generation
    weights.update         is one task for each new version. An engine loads it between two of its own steps, while its
                           requests are in flight and the trainer makes the next step
    _keep_ledger           writes the changes of the ledger to the disk
    elastic.run            if `workers` is a range: has engines join and leave
    progress.watch_reward  shows, beside the progress, that deadlines of the reward pass

Each loop has a file by its name. They share the `GroupBook`, the only place where the state of a group changes.
"""

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from posttrain.actors.garbage import rare_collections
from posttrain.context import BusyLog, StageContext
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.judge import rewards
from posttrain.rl.history.recovery import Survivor
from posttrain.rl.loop.balance import ThreadBalance
from posttrain.rl.loop.checkpoints import Checkpoints
from posttrain.rl.loop.dispatch import Dispatch
from posttrain.rl.loop.elastic import Elastic
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.parts import Parts
from posttrain.rl.loop.progress import StepProgress
from posttrain.rl.loop.scoring import Scoring
from posttrain.rl.loop.side import SideWork
from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.loop.start import COMPARED, OWN, Parity, Start, allowed_gap
from posttrain.rl.loop.steps import Steps, wake_all
from posttrain.rl.loop.tally import StepTally, sampled_before
from posttrain.rl.records import LedgerEvent, group_of_flight
from posttrain.rl.rollouts.requests import wave_seed
from posttrain.rl.rollouts.weights import update_calls
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.worker import Worker
from posttrain.sampling.workers import RolloutWorkers

NUM_ENGINES = "engines"  # a fact of the ledger, once engines have joined or left
FLUSH_S = 0.05  # pause between two writes of the ledger: a SIGKILL loses the changes since the last one


class _LastStepDone(Exception):
    """Ends the TaskGroup after the last step. The other loops have no end of their own."""


class Controller:
    """Runs optimizer steps `first_step` to `steps` - 1.

    survivors: groups from before a crash, the oldest stamp first. is_early: whether the engines have the weights of
    policy version `first_step` already, so that sampling begins before the trainer is there.
    """

    def __init__(
        self,
        config: RlConfig,
        context: StageContext,
        parts: Parts,
        *,
        first_step: int = 0,
        survivors: Sequence[Survivor] = (),
        is_early: bool = False,
    ):
        self._config = config
        self._context = context
        self._parts = parts
        self._first_step = first_step
        self._survivors = survivors
        self._is_early = is_early
        self._changed = asyncio.Event()  # wakes the loops that wait for room in the queue or for a complete batch
        self._workers = self._make_workers()
        self._reward_log = BusyLog(context, "reward", "score")
        self._scorer = rewards(config, parts.judge)
        self._tally = self._make_tally()
        self._book = self._make_book()
        self._progress = StepProgress(
            context,
            config.steps,
            first_step=first_step,
            tokens_sampled=sampled_before(context.dir, sum(item.tokens for item in parts.profile)),
            stats=lambda: self._scorer.stats,
        )
        self._start = Start(
            context,
            parts.trainer,
            self._workers,
            version=first_step,
            tolerance=allowed_gap(config.parity_tolerance, config.model.dtype),
            is_early=is_early,
        )
        self._elastic = self._make_elastic() if config.resources.rollout.is_elastic else None
        self._steps = self._make_steps()
        self._side = self._make_side_work()
        self._scoring = Scoring(
            config,
            self._scorer,
            self._book,
            reference=parts.reference,
            take_beside=self._side.take,
            go_on=lambda left, worker: self._dispatch.send(left, worker),
            log=self._reward_log,
            changed=self._changed,
        )
        self._dispatch = Dispatch(
            config,
            self._book,
            self._workers,
            side=self._side,
            steps=self._steps,
            stop_ids=parts.stop_ids,
            changed=self._changed,
            is_early=is_early,
        )

    def _make_workers(self) -> RolloutWorkers:
        config = self._config
        return RolloutWorkers(
            self._context,
            self._parts.engines,
            deadline_s=config.engine.deadline_s,
            finished=self._sampled,
            begun=self._sampled_so_far,
            rollouter=self._parts.rollouter,
            calls=partial(update_calls, config),
            version=self._first_step if self._is_early else self._first_step - 1,
            took=self._took,
            replaced=self._replaced,
            given_up=self._given_up if config.resources.rollout.is_elastic else None,
            wave_seed=partial(wave_seed, self._context.seed) if config.deterministic else None,
        )

    def _make_tally(self) -> StepTally:
        parts = self._parts
        logs = {**{worker.name: worker.log for worker in self._workers.workers}, "reward": self._reward_log}
        return StepTally(
            logs | (dict(parts.judge.logs) if parts.judge is not None else {}),
            {item.prompt_id: item.pass_rate for item in parts.profile},
            self._config.reward.correct_threshold,
            reads=lambda: (self._workers.num_read, self._workers.num_cached),
        )

    def _make_queue(self) -> StalenessQueue:
        config = self._config
        queue = StalenessQueue(
            config.groups_per_step,
            config.max_staleness,
            self._parts.shares,
            refills=config.mixture_refills,
            version=self._first_step,
            mode=config.staleness,
            first_order=self._parts.ledger.next_order,
            over_provision=0.0 if config.deterministic else config.over_provision,
        )
        if (moved := self._parts.source.moved(self._parts.shares)) is not None:  # a continued run
            queue.move(moved)
        return queue

    def _make_book(self) -> GroupBook:
        config, parts = self._config, self._parts
        return GroupBook(
            config,
            self._context,
            self._make_queue(),
            ledger=parts.ledger,
            archive=parts.archive,
            tally=self._tally,
            source=parts.source,
            idle_steps=config.stop_after_idle_steps,
            version=self._first_step,
            first_replies=config.first_replies,
        )

    def _make_elastic(self) -> Elastic:
        config, parts = self._config, self._parts
        return Elastic(
            config,
            self._context,
            self._workers,
            engines=parts.engines,
            prompts=parts.source.first(COMPARED),
            stop_ids=parts.stop_ids,
            tolerance=allowed_gap(config.parity_tolerance, config.model.dtype),
            changed=self._engines_changed,
            forecast=parts.forecast,
            had=parts.ledger.fact(NUM_ENGINES),
        )

    def _make_steps(self) -> Steps:
        config, context, parts = self._config, self._context, self._parts
        return Steps(
            config,
            context,
            parts.trainer,
            max_staleness=config.max_staleness,
            first_step=self._first_step,
            book=self._book,
            workers=self._workers,
            source=parts.source,
            shares=parts.shares,
            tally=self._tally,
            checkpoints=Checkpoints(
                context.dir, parts.ledger, parts.trainer, every=config.checkpoint_every, steps=config.steps
            ),
            changed=self._changed,
            tell=self._tell,
            balance=self._make_balance(),
        )

    def _make_balance(self) -> ThreadBalance | None:
        resources = self._config.resources
        if resources.trainer_threads is None:
            return None
        names = [worker.name for worker in self._workers.workers]
        return ThreadBalance(max(1, int(resources.trainer.cpus)), resources.trainer_threads, names)

    def _make_side_work(self) -> SideWork:
        config, parts = self._config, self._parts
        return SideWork(
            config,
            self._context,
            self._workers,
            scorer=self._scorer,
            version=self._first_step,
            evaluation=config.evaluation,
            heldout=parts.heldout,
            stop_ids=parts.stop_ids,
            told=parts.ledger.event,
        )

    # ------------------------------------------------------------------ the loops

    @property
    def parity(self) -> Parity:
        """How far the log-probabilities of engines and trainer were apart before the first step of this run."""
        assert self._start.parity is not None
        return self._start.parity

    async def run(self) -> None:
        """Train to the last step. If a loop fails, its exception is raised; of several failures, the first."""
        await self._scorer.start()
        with rare_collections():
            try:
                async with self._parts.rollouter or nullcontext():
                    await self._run_loops()
            finally:
                await self._scorer.close()
                self._reward_log.flush()
                await self._parts.ledger.flush()

    def finish(self) -> None:
        """Drop the groups that are still undecided. It is called once, after the last step."""
        self._book.finish()

    async def _run_loops(self) -> None:
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._workers.run())
                tasks.create_task(self._keep_ledger())
                tasks.create_task(self._scoring.run(tasks))
                tasks.create_task(self._train(tasks))
                tasks.create_task(self._progress.watch_reward())
                if self._elastic is not None:
                    tasks.create_task(self._elastic.run())
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]  # the others may be its consequences
        if failure is not None and not isinstance(failure, _LastStepDone):
            raise failure

    async def _keep_ledger(self) -> None:
        while True:
            await self._parts.ledger.flush()
            await asyncio.sleep(FLUSH_S)

    def _begin_sampling(self, tasks: asyncio.TaskGroup) -> None:
        for group in self._dispatch.go_on_with(self._survivors):
            self._scoring.sampled(group)
        tasks.create_task(self._dispatch.run())

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        if self._is_early:
            self._begin_sampling(tasks)
        await self._start.load_weights()
        orders = self._dispatch.open() if self._is_early else []
        if orders:
            self._start.wait_for(orders)
        else:  # groups of before a crash may have taken all places, or there is an environment
            some = self._parts.source.first(COMPARED)
            self._start.send_replies(some, self._config.sampling, self._parts.stop_ids)
        await self._start.check()
        if not self._is_early:
            self._begin_sampling(tasks)
        await self._steps.run(tasks)
        self._side.stop()
        await self._steps.finish_update()
        raise _LastStepDone

    def _took(self, worker: str, version: int) -> None:
        self._parts.ledger.event(LedgerEvent.WEIGHTS_TAKEN, [worker, version])
        wake_all(self._changed)

    def _replaced(self, worker: str, reason: str) -> None:
        self._parts.ledger.event(LedgerEvent.ENGINE_REPLACED, [worker, reason])
        wake_all(self._changed)

    def _given_up(self, worker: Worker, reason: str) -> None:
        assert self._elastic is not None
        self._elastic.given_up(worker, reason)
        wake_all(self._changed)

    def _engines_changed(self, worker: Worker, has_joined: bool) -> None:
        if has_joined:
            self._tally.watch(worker.name, worker.log)
        else:
            self._tally.forget(worker.log)
        assert self._elastic is not None
        self._parts.ledger.set_fact(NUM_ENGINES, self._elastic.num_engines)
        wake_all(self._changed)

    def _sampled_so_far(self, flight: Flight) -> None:
        if flight.order >= 0:
            self._book.sampled_so_far(flight)

    def _sampled(self, flight: Flight) -> None:
        if flight.order <= OWN:
            self._start.sampled(group_of_flight(flight))
        elif flight.order < 0:
            self._scoring.sampled(flight)
        else:
            is_whole = flight.request.n == self._config.group_size
            group = self._book.generated(flight) if is_whole else self._book.first_sampled(flight)
            self._start.sampled(group)
            self._scoring.sampled(group)

    def _tell(self, step: int, metrics: dict[str, Any]) -> None:
        if self._elastic is not None:
            metrics = {**metrics, "engines": self._elastic.num_engines}
            self._elastic.step(metrics["step_wall_s"], metrics["wait_s"])
        values = {
            **metrics,
            **self._book.figures(),
            "engines_replaced": self._workers.num_replaced,
            **self._side.figures(),
            **({"prompts_set_aside": self._parts.num_set_aside} if self._parts.num_set_aside else {}),
        }
        self._progress.step(step, values)
