"""From engines with the start policy to engines that have the trainer's weights and agree with it.

    engines stand ──► sampling, while the trainer starts ──► the engines load its weights ──► more groups ──► compared
                        groups of version 0, which are trained on like any others                     ──► first step

In a new run the engines have the weights of the model folder, which are those of policy version 0. So sampling begins
at once. A few groups are held back until the engines have loaded the same weights from the trainer, in the way of every
later update. The log-probabilities of both kinds of groups are compared with the trainer's before the first step. If
they differed, the importance ratios of every step would be wrong, and training would not show it. A fault in an update
would be found too.

Other runs sample nothing before the engines have the trainer's weights, and compare a few replies that are sampled for
this alone: those that continue from a checkpoint or with a new trainer, and deterministic ones. With an environment
such replies take the place of the groups that are held back: an episode may last for hours, and the first step must not
wait for it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from posttrain.config.engines import SamplingConfig
from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.records import DrawnPrompt, Rollout
from posttrain.rl.records import Group
from posttrain.rl.rollouts.requests import sample_request
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.samples import rollout_samples
from posttrain.sampling.rollouter import Flight, SingleTurn
from posttrain.sampling.workers import RolloutWorkers

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
HELD_BACK = 2  # groups of each engine that are sampled with the trainer's weights before the first step
COMPARED = 16  # rollouts of each engine, and of each kind
HIGH_PRIORITY = -2  # of what the first step waits for; vLLM starts requests with a lower number first
OWN = -(10**9)  # the dispatch order of the first group that is sampled for the comparison alone


@dataclass(frozen=True, slots=True)
class Parity:
    """The mean and the largest absolute difference of log-probabilities (in nats) over the sampled tokens."""

    mean_gap: float
    max_gap: float
    num_tokens: int


def allowed_gap(parity_tolerance: float | None, dtype: str) -> float:
    """The largest mean gap that rounding can explain: the one that the config gives, or that of the data type."""
    return parity_tolerance or TOLERANCE[dtype]


class Start:
    """Brings the trainer's weights to the engines, and compares log-probabilities before the first step.

    version: of the policy that training starts or continues from. tolerance: the largest mean gap. is_early: whether
    groups are sampled before the engines have the trainer's weights.
    """

    def __init__(
        self,
        context: StageContext,
        trainer: TrainerClient,
        workers: RolloutWorkers,
        *,
        version: int,
        tolerance: float,
        is_early: bool,
    ):
        self._context = context
        self._trainer = trainer
        self._workers = workers
        self._version = version
        self._tolerance = tolerance
        self._is_early = is_early
        self._awaited: set[int] = set()
        self._later: set[int] = set()  # groups that are sampled with the trainer's weights
        self._found: defaultdict[tuple[str, bool], list[Rollout]] = defaultdict(list)
        self._changed = asyncio.Event()
        self.parity: Parity | None = None

    async def load_weights(self) -> None:
        """Wait for the trainer, and have every engine load its weights. A group that is in flight goes on."""
        manifest = await self._trainer.async_publish()
        await self._workers.weights.update(manifest, self._version, again=True)

    def wait_for(self, orders: Iterable[int]) -> None:
        """Groups of these orders are sampled with the trainer's weights. `check` waits for them."""
        self._awaited = set(orders)
        self._later = set(self._awaited)

    def send_replies(self, prompts: Sequence[DrawnPrompt], sampling: SamplingConfig, stop_ids: tuple[int, ...]) -> None:
        """Have each engine sample one reply to each prompt, for the comparison alone: no prompt begins an episode."""
        names = [worker.name for worker in self._workers.workers]
        pairs = [(name, prompt) for name in names for prompt in prompts]
        self.wait_for(range(OWN, OWN - len(pairs), -1))
        for place, (name, prompt) in enumerate(pairs):
            request = replace(sample_request(sampling, prompt, 1, stop_ids=stop_ids), priority=HIGH_PRIORITY)
            flight = Flight(OWN - place, self._version, prompt, request, worker=name, rollouter=SingleTurn())
            self._workers.send(flight)

    def sampled(self, group: Group) -> None:
        """Take note of a sampled group."""
        is_later = group.order in self._later
        self._awaited.discard(group.order)
        if self.parity is None and (is_later or self._is_early):
            for rollout in group.rollouts:
                found = self._found[rollout.worker, is_later]
                if len(found) < COMPARED and any(segment.trained for segment in rollout.segments):
                    found.append(rollout)
        self._changed.set()

    async def check(self) -> None:
        """Compare engines and trainer, once the groups to wait for are sampled. `parity` is that of the largest gap.

        Raises StageError if the mean gap of an engine is above the tolerance. An engine that was lost in the meantime
        may be left out.
        """
        while self._awaited:
            self._changed.clear()
            await self._changed.wait()
        worst = Parity(0.0, 0.0, 0)
        for (worker, is_later), rollouts in list(self._found.items()):
            if rollouts:
                name = worker if is_later else f"{worker}, with the weights of the model folder,"
                worst = max(worst, await self._compare(name, rollouts), key=lambda item: item.mean_gap)
        self.parity = worst
        self._found.clear()
        self._context.event("parity", mean_gap=worst.mean_gap, max_gap=worst.max_gap, tokens=worst.num_tokens)

    async def _compare(self, name: str, rollouts: Iterable[Rollout]) -> Parity:
        samples = [sample for rollout in rollouts for sample in rollout_samples(rollout, self._version, 0.0)]
        gaps = [
            abs(ours - theirs)
            for sample, values in zip(samples, await self._trainer.async_logprobs(samples), strict=True)
            for ours, theirs in zip(values, sample.sampler_logprobs, strict=True)
        ]
        parity = Parity(sum(gaps) / len(gaps), max(gaps), len(gaps))
        if not parity.mean_gap <= self._tolerance:
            raise StageError(
                f"{name} and the trainer disagree on the log-probabilities of {parity.num_tokens} sampled tokens: mean "
                f"gap {parity.mean_gap:.2g}, largest {parity.max_gap:.2g}, allowed mean {self._tolerance:g} "
                "(parity_tolerance); training on them would be silently wrong"
            )
        return parity
