"""Side work: evaluations, which are sampled beside the training on the same engines.

    evaluation is due ─► one worker is kept ──► its replies ────► reward ──► evaluations.jsonl
                         at its version            └ all are sampled: the worker takes the newest version

Replies of side work have a low priority in the engines. They take at most half of the places of one engine, unless
training has no group in flight. Their groups have a dispatch order below 0. They are not part of the staleness queue,
of the ledger's groups or of the archive. A crash loses unfinished side work, which begins again when it is next due.

An evaluation has exactly one policy version, so one worker is kept at that version until all replies are sampled. The
worker still samples groups of the training. While it is kept, new groups are stamped with its version, so the bound on
staleness holds for them too. The price: an evaluation that lasts longer than `max_staleness` steps makes the training
wait. If the worker is lost, the evaluation begins again with the newest version.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from posttrain.context import StageContext
from posttrain.files import append_jsonl
from posttrain.records import DrawnPrompt
from posttrain.rl.config import EvaluationConfig
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.groups import Scorer, score_group
from posttrain.rl.loop.evaluation import (
    FILE,
    EvaluatedPrompt,
    accuracies,
    evaluated_prompt,
    evaluation_metrics,
    evaluation_request,
    is_due,
    last_evaluated,
    unscored_prompts,
)
from posttrain.rl.records import Group, LedgerEvent, group_of_flight
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.worker import Worker
from posttrain.sampling.workers import RolloutWorkers

LOW_PRIORITY = 2  # vLLM starts requests with a lower number first; those of the training have at most 0


@dataclass(eq=False)
class Evaluation:
    """A running evaluation of policy version `version`, at which `worker` is kept.

    last: the version of the evaluation before. unsent: the numbers of the prompts that are still to be sent. tokens:
    all sampled tokens, also those of replies that had to be sampled again. resampled: how often a prompt had to be
    sampled again.
    """

    worker: Worker
    version: int
    last: int | None
    unsent: deque[int]
    num_sampled: int = 0
    began: float = field(default_factory=time.time)
    tokens: int = 0
    resampled: int = 0
    scored: dict[int, EvaluatedPrompt] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Sent:
    """The purpose of a flight: prompt `number` of an evaluation."""

    replies: int
    evaluation: Evaluation
    number: int


class SideWork:
    """Sends evaluations when they are due, and takes their results.

    version: the policy version from which training starts or continues. heldout: the prompts of `evaluation`. stop_ids:
    token ids that end a reply. told: is called with each event for the ledger's log.
    """

    def __init__(
        self,
        config: GradingConfig,
        context: StageContext,
        workers: RolloutWorkers,
        *,
        scorer: Scorer,
        version: int,
        evaluation: EvaluationConfig | None,
        heldout: Sequence[DrawnPrompt],
        stop_ids: tuple[int, ...],
        told: Callable[[LedgerEvent, Any], None],
    ):
        self._config = config
        self._context = context
        self._workers = workers
        self._scorer = scorer
        self._heldout = heldout
        self._stop_ids = stop_ids
        self._told = told
        self._evaluation: Evaluation | None = None
        self._evaluation_config = evaluation
        self._last_evaluated = last_evaluated(context.dir, version) if self._evaluation_config is not None else None
        self._step = version
        self._sent: dict[int, _Sent] = {}
        self._next_order = -1
        self._counts: Counter[str] = Counter()
        self._ended: dict[str, float] = {}  # what the latest evaluation found, until it is told

    def dispatch(self, step: int) -> None:
        """Send as much side work as there is room for. step: the number of optimizer steps so far."""
        self._step = step
        self._begin_evaluation()
        while (flight := self._next_flight()) is not None:
            self._workers.send(flight)

    def figures(self) -> dict[str, float]:
        """For the metrics of a step: counts since the last call, if there are evaluations, and what one of them found
        if it has ended since."""
        names = ["tokens_evaluated", "evaluated_unscored"] if self._evaluation_config is not None else []
        counts, self._counts = self._counts, Counter()
        ended, self._ended = self._ended, {}
        return {**{name: counts[name] for name in names}, **ended}

    def stop(self) -> None:
        """Abandon a running evaluation after the last step."""
        if (running := self._evaluation) is not None:
            running.worker.is_kept = False
            self._told(LedgerEvent.EVALUATION_ABANDONED, running.version)

    async def take(self, flight: Flight) -> None:
        """Take a sampled group of side work: score it, and pass the result on."""
        sent = self._sent.pop(flight.order)
        group = group_of_flight(flight)
        tokens = sum(rollout.num_sampled for rollout in group.rollouts)
        self._counts["tokens_evaluated"] += tokens
        await self._evaluated(sent.evaluation, sent.number, group, tokens=tokens)

    # ------------------------------------------------------------------ what is sent

    def _next_flight(self) -> Flight | None:
        """The next group to send, or None if there is none or no room for its replies."""
        running = self._evaluation
        if (
            running is not None
            and self._evaluation_config is not None
            and running.unsent
            and self._has_room(self._evaluation_config.samples)
        ):
            number = running.unsent.popleft()
            prompt = self._heldout[number]
            max_tokens = self._config.sampling.max_tokens
            request = evaluation_request(
                self._evaluation_config, prompt, max_tokens=max_tokens, stop_ids=self._stop_ids
            )
            return self._flight(prompt, request, _Sent(request.n, running, number), version=running.version)
        return None

    def _has_room(self, replies: int) -> bool:
        taken = sum(sent.replies for sent in self._sent.values())
        places = self._config.engine.max_num_seqs
        is_idle = all(order < 0 for order in self._workers.flights)
        return not taken or taken + replies <= (places if is_idle else places // 2)

    def _flight(self, prompt: DrawnPrompt, request: SampleRequest, sent: _Sent, *, version: int | None) -> Flight:
        order = self._next_order
        self._next_order -= 1
        self._sent[order] = sent
        return Flight(order, 0, prompt, replace(request, priority=LOW_PRIORITY), version=version)

    # ------------------------------------------------------------------ evaluations

    def _begin_evaluation(self) -> None:
        if self._evaluation_config is None:
            return
        if (running := self._evaluation) is not None:
            if running.worker.is_kept:
                return
            # The worker was lost, and its requests with it, so this evaluation ends without a result.
            self._evaluation, self._last_evaluated = None, running.last
            self._sent = {order: sent for order, sent in self._sent.items() if sent.evaluation is not running}
        worker = self._workers.weights.newest()
        if worker is None or not is_due(self._evaluation_config, worker.policy_version, self._last_evaluated):
            return
        worker.is_kept = True
        version, all_numbers = worker.policy_version, deque(range(len(self._heldout)))
        self._evaluation = Evaluation(worker, version, self._last_evaluated, all_numbers)
        self._last_evaluated = version
        self._told(LedgerEvent.EVALUATION_STARTED, [worker.name, version])

    async def _evaluated(self, running: Evaluation, number: int, group: Group, *, tokens: int) -> None:
        """Take the replies to a prompt. If any token is of another version, the prompt is sampled again."""
        running.tokens += tokens
        versions = {version for rollout in group.rollouts for version in rollout.versions}
        if versions - {running.version}:
            running.resampled += 1
            running.unsent.append(number)
            return
        running.num_sampled += 1
        if running.num_sampled == len(self._heldout):
            self._evaluation = None
            await self._workers.weights.release(running.worker)
        scored = await score_group(group, self._scorer, self._config)
        running.scored[number] = evaluated_prompt(scored)
        self._counts["evaluated_unscored"] += scored.rewards.count(None)
        if self._evaluation_config is not None and len(running.scored) == len(self._heldout):
            prompts = [running.scored[at] for at in sorted(running.scored)]
            line: dict[str, Any] = {
                "policy_version": running.version,
                "step": self._step,
                "capabilities": accuracies(
                    prompts, samples=self._evaluation_config.samples, threshold=self._config.reward.correct_threshold
                ),
                "seconds": time.time() - running.began,
                "tokens": running.tokens,
                "resampled": running.resampled,
            }
            append_jsonl(self._context.dir / FILE, line)
            self._ended = evaluation_metrics(running.version, line["capabilities"])
            where = f"evaluation of version {running.version}"
            unscored_prompts(prompts).tell(self._context, where, self._config.reward.alarm_fraction)
            self._told(LedgerEvent.EVALUATED, running.version)
