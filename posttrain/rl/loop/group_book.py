"""Where every group stands. The one object in which a group changes its state.

    admit ──► begun ──► generated ──► scored ──► take ──► trained
      │                     │            │
      └─────────────────────┴────────────┴─────► dropped: it teaches nothing, is too old, or is not needed

What is known of a group lies in several places, each with a purpose of its own: the queue knows which batch the group
may become part of, the ledger what a crash must not lose, the archive every rollout that was decided, the tally the
metrics of the step, the curriculum what is believed of the prompt, and the alarm how many rollouts had no score. Each
method here is one transition, and it tells all of them. Nothing else in the package may change a group's state.

A transition that cannot follow the group's state raises StageError: it would train a group twice, or lose one.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.alarm import UnscoredAlarm
from posttrain.rl.grading.groups import drop_reason, passes_and_failures
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import UNDECIDED, Entry, Ledger
from posttrain.rl.history.recovery import Survivor, scores_json
from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.loop.tally import StepTally
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import (
    DrawnPrompt,
    Drop,
    DropReason,
    Group,
    GroupState,
    LedgerEvent,
    ScoredGroup,
    group_of_flight,
)
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.rollouts import Reply


@dataclass(frozen=True, slots=True)
class Admission:
    """A group that has a place in a batch and is now to be sampled.

    stamp: the oldest policy version that may sample for it. recorded: what a run before had of each rollout, or ().
    """

    order: int
    stamp: int
    prompt: DrawnPrompt
    recorded: tuple[Reply, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """The groups of one optimizer step, in dispatch order. ready_since: Unix times since which they waited."""

    groups: list[ScoredGroup]
    ready_since: list[float]


@dataclass(slots=True)
class _Undecided:
    """A group that is neither trained on nor dropped. group: once it is sampled. scored: once it is ready."""

    state: GroupState
    group: Group | None = None
    scored: ScoredGroup | None = None
    ready_since: float = 0.0
    is_taken: bool = False  # it is part of the step that is being trained


class GroupBook:
    """Holds the undecided groups of a run whose next batch is trained at policy version `version`.

    queue, ledger, archive, tally and source are told of every transition, and nobody else may tell them of one.
    """

    def __init__(
        self,
        config: RlConfig,
        context: StageContext,
        queue: StalenessQueue,
        *,
        ledger: Ledger,
        archive: RolloutArchive,
        tally: StepTally,
        source: PromptSource,
        version: int = 0,
    ):
        self._config = config
        self._context = context
        self._queue = queue
        self._ledger = ledger
        self._archive = archive
        self._tally = tally
        self._source = source
        self._version = version  # at which the next batch will be trained
        self._alarm = UnscoredAlarm(config.reward.alarm_fraction, config.groups_per_step)
        self._idle_limit = config.stop_after_idle_steps * config.groups_per_step
        self._too_old = DropReason.STALE if config.staleness == "drop" else DropReason.SURPLUS
        self._undecided: dict[int, _Undecided] = {}
        self._too_old_for_scores: set[int] = set()  # groups that became too old while they were scored
        self._returning: dict[int, Entry] = {}  # groups of before a crash that are sampled again once there is room
        self._dropped_in_a_row = 0
        self._archived_seq = 0

    # ------------------------------------------------------------------ what is known

    @property
    def num_in_flight(self) -> int:
        """Groups that are being sampled or scored."""
        return self._queue.num_in_flight

    @property
    def archived_seq(self) -> int:
        """The ledger's transition up to which every dropped group is in the archive."""
        return self._archived_seq

    def room(self, oldest_version: int) -> int:
        """How many groups may be admitted now. oldest_version: that a worker may still sample with."""
        return self._queue.room(oldest_version)

    def figures(self) -> dict[str, int]:
        """How many groups wait to be trained on and are in flight, and how many places went to another capability."""
        return {
            "queue_groups": self._queue.num_ready,
            "in_flight_groups": self._queue.num_in_flight,
            "places_lent": self._queue.num_lent,
        }

    def position(self) -> dict[str, int]:
        """What a checkpoint keeps: the ledger's latest transition, and the dispatch order of the next new group."""
        return {"seq": self._ledger.seq, "next_order": self._queue.next_order}

    # ------------------------------------------------------------------ from admission to scores

    def admit(self, stamp: int) -> Admission:
        """Give the next place to a group that a crash left without one, or to a new one of the place's capability."""
        new = self._queue.next_order
        order, capability = self._queue.admit(stamp, self._first_returning if self._returning else None)
        if order == new:
            prompt = self._source.draw(capability, order)
            self._ledger.reserve(
                order,
                prompt.row.id,
                capability,
                system=prompt.system,
                prompts_seen=self._source.prompts_seen(capability),
                stamp=stamp,
            )
        else:
            entry = self._returning.pop(order)
            prompt = self._source.prompt(entry.prompt_id, entry.system)
            self._ledger.restart_group(order, stamp, ())
        self._undecided[order] = _Undecided(GroupState.RESERVED)
        return Admission(order, stamp, prompt)

    def _first_returning(self, capability: str) -> int | None:
        return next((order for order, entry in self._returning.items() if entry.capability == capability), None)

    def adopt(self, survivor: Survivor) -> Admission | Group | None:
        """Let a group of before a crash go on from where it stood; survivors come with the oldest stamp first.

        Returns what is left to do: its rest is to be sampled, or it is to be scored. That is None for a group that has
        its scores, and for one that has no place early enough, which is admitted again once there is room.
        """
        entry, scored = survivor.entry, survivor.scored
        order = entry.id
        if scored is not None and (reason := drop_reason(scored, self._config)) is not None:
            self._record_drop(order, reason, scored)
            return None
        is_ready = scored is not None
        if not survivor.replies or not self._queue.adopt(order, entry.capability, survivor.stamp, is_ready=is_ready):
            self._returning[order] = entry
            return None
        if scored is not None:
            self._undecided[order] = _Undecided(GroupState.SCORED, scored.group, scored, time.time())
            return None
        if survivor.group is not None:
            self._undecided[order] = _Undecided(GroupState.GENERATED, survivor.group)
            return survivor.group
        self._undecided[order] = _Undecided(GroupState.RESERVED)
        self._ledger.restart_group(order, survivor.stamp, survivor.replies)
        prompt = self._source.prompt(entry.prompt_id, entry.system)
        return Admission(order, survivor.stamp, prompt, survivor.replies)

    def begun(self, flight: Flight) -> None:
        """More of a group's replies is there, which a crash should not lose."""
        self._in_state(flight.order, GroupState.RESERVED, "be sampled")
        self._ledger.begun(flight.order, flight.replies)

    def generated(self, flight: Flight) -> Group:
        """All replies of a group are there. Returns the group, which is to be scored."""
        undecided = self._in_state(flight.order, GroupState.RESERVED, "be sampled")
        self._ledger.generated(flight.order, flight.replies)
        group = group_of_flight(flight)
        undecided.state, undecided.group = GroupState.GENERATED, group
        return group

    def scored(self, scored: ScoredGroup, reason: Drop | None) -> None:
        """A group has its rewards, and for the trainer its reference log-probabilities. reason: `drop_reason` of it.

        A group that became too old while it was scored stays dropped. Raises StageError where so many groups in a row
        taught nothing that there is no point in going on.
        """
        order = scored.group.order
        if order in self._too_old_for_scores:
            self._too_old_for_scores.remove(order)
            return
        undecided = self._in_state(order, GroupState.GENERATED, "be scored")
        undecided.state = GroupState.SCORED
        self._ledger.scored(order, scores_json(scored))
        self._tally.decided(scored, reason)
        if (alarm := self._alarm.observe(scored)) is not None:
            self._context.event("alarm", **alarm)
        counts = passes_and_failures(scored, self._config.reward.correct_threshold)
        self._source.observe(scored.group.prompt.row.id, *counts)
        if reason is None:
            self._dropped_in_a_row = 0
            undecided.scored, undecided.ready_since = scored, time.time()
            self._queue.ready(order)
        else:
            self._drop(order, reason, scored)
            self._count_idle(scored, reason)

    # ------------------------------------------------------------------ groups that are not trained on

    def drop_expired(self, stop_sampling: Callable[[int], Flight | None]) -> None:
        """Drop spare groups that were not needed and, in mode `drop`, groups too old for every batch to come.

        stop_sampling: has the workers cancel a group, and returns what there was of it.
        """
        for order in self._queue.expired():
            undecided = self._undecided[order]
            self._drop(order, self._too_old, undecided.scored)
            if undecided.state is GroupState.GENERATED:
                self._too_old_for_scores.add(order)
            flight = stop_sampling(order)
            if undecided.group is not None:
                lengths = [rollout.num_sampled for rollout in undecided.group.rollouts]
                self._tally.expired(self._too_old, undecided.group.prompt.row.id, lengths)
            elif flight is not None:
                lengths = [reply.num_sampled for reply in flight.replies]
                self._tally.expired(self._too_old, flight.prompt.row.id, lengths)

    def finish(self) -> None:
        """Training has ended: drop every group that is not decided. The ledger must have been written to the disk."""
        for entry in self._ledger.entries(UNDECIDED):
            undecided = self._undecided.pop(entry.id, None)
            self._record_drop(entry.id, DropReason.FINISHED, undecided.scored if undecided is not None else None)
        self._archive.write(self._version)
        self._ledger.event(LedgerEvent.FINISHED, self._version)

    def _drop(self, order: int, reason: Drop | DropReason, scored: ScoredGroup | None) -> None:
        """Drop a group that has a place in the queue. scored: its rewards, where it has them."""
        del self._undecided[order]
        self._queue.drop(order)
        self._record_drop(order, reason, scored)

    def _record_drop(self, order: int, reason: Drop | DropReason, scored: ScoredGroup | None) -> None:
        self._ledger.dropped(order, str(reason))
        if scored is not None:
            self._archive.add(scored, step=None, trainer_version=self._version, status=f"dropped:{reason}")

    def _count_idle(self, scored: ScoredGroup, reason: Drop) -> None:
        self._dropped_in_a_row += 1
        limit = self._idle_limit
        if self._dropped_in_a_row >= limit:
            rewards = dict(Counter(scored.rewards))
            why = Counter(scored.reasons).most_common(1)[0][0]
            raise StageError(
                f"{limit} groups in a row taught nothing (the last: {reason}, rewards {rewards}, most often {why!r}); "
                "choose prompts of other difficulty (profile.band) or look at the reward"
            )

    # ------------------------------------------------------------------ groups that are trained on

    def take(self, version: int) -> Batch | None:
        """The batch to be trained at `version`, or None while it is not complete."""
        orders = self._queue.take(version)
        if orders is None:
            return None
        self._version = version + 1
        groups: list[ScoredGroup] = []
        ready_since: list[float] = []
        for order in orders:
            undecided = self._in_state(order, GroupState.SCORED, "be part of a batch")
            assert undecided.scored is not None  # the queue gives out none that is not ready
            undecided.is_taken = True
            groups.append(undecided.scored)
            ready_since.append(undecided.ready_since)
        return Batch(groups, ready_since)

    def trained(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """Optimizer step `step` was made of these groups, with the advantages that they have here."""
        for scored in groups:
            order = scored.group.order
            if not self._in_state(order, GroupState.SCORED, "be trained on").is_taken:
                raise StageError(f"group {order} is not part of the batch of step {step}, so it cannot be trained on")
        for scored in groups:
            del self._undecided[scored.group.order]
            self._archive.add(scored, step=step, trainer_version=step, status="trained")
        self._ledger.trained([scored.group.order for scored in groups], step)
        self._archive.write(step)
        self._archived_seq = self._ledger.seq

    def _in_state(self, order: int, state: GroupState, what: str) -> _Undecided:
        """The group, which must be in a state. what: the transition, for the error."""
        undecided = self._undecided.get(order)
        if undecided is None:
            found = self._ledger.state_of(order) or "not admitted"
            raise StageError(f"group {order} cannot {what}: it is {found}, not {state}")
        if undecided.state is not state:
            raise StageError(f"group {order} cannot {what}: it is {undecided.state}, not {state}")
        return undecided
