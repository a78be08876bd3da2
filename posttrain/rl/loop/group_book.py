"""The state of every group. The `GroupBook` is the only object that changes it.

    admit ──► sampled_so_far ──► generated ──► scored ──► take ──► trained
      │                              │            │
      └──────────────────────────────┴────────────┴─────► dropped: it teaches nothing, is too old, or is not needed

Six objects keep something about a group, each for its own purpose:

    queue        which batch the group may become part of
    ledger       what a crash must not lose
    archive      every rollout of a scored group that was trained on or dropped
    tally        the metrics of the step
    source       the belief about the pass rate of the prompt
    alarm        how many rollouts had no score

Each method of the book is one transition, and it informs all of them. So they cannot come to disagree.

A transition that is not allowed in the state of the group raises StageError, because it would train on a group twice,
or lose one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.metrics.correctness import passes_and_failures
from posttrain.rl.grading.alarm import IdleLimit, UnscoredAlarm
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.groups import drop_reason
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import UNDECIDED, Entry, Ledger
from posttrain.rl.history.recovery import Survivor, scores_json
from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.loop.tally import StepTally
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import (
    Admission,
    Batch,
    Drop,
    DropReason,
    Group,
    GroupState,
    LedgerEvent,
    ScoredGroup,
    group_of_flight,
)
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.rollouts import UNBEGUN, reply_of


@dataclass(slots=True)
class _Undecided:
    """A group that is neither trained on nor dropped. group: None until it is sampled. scored: None until it is ready.
    num_first: how many of its replies were sampled whatever the others were; None: all.
    """

    state: GroupState
    group: Group | None = None
    scored: ScoredGroup | None = None
    ready_since: float = 0.0
    num_first: int | None = None
    is_taken: bool = False  # whether it is part of the batch that is being trained on


class GroupBook:
    """Holds the undecided groups of a run whose next batch is trained at policy version `version`.

    The book informs queue, ledger, archive, tally and source of every transition. No other code may do so.
    idle_steps: the run fails when as many groups in a row are dropped for their rewards as so many steps would need.
    first_replies: how many replies a group begins with; None: all.
    """

    def __init__(
        self,
        config: GradingConfig,
        context: StageContext,
        queue: StalenessQueue,
        *,
        ledger: Ledger,
        archive: RolloutArchive,
        tally: StepTally,
        source: PromptSource,
        idle_steps: int,
        version: int = 0,
        first_replies: int | None = None,
    ):
        self._config = config
        self._threshold = config.reward.correct_threshold
        self._context = context
        self._queue = queue
        self._ledger = ledger
        self._archive = archive
        self._tally = tally
        self._source = source
        self._first_replies = first_replies
        self._version = version  # the version at which the next batch will be trained on
        self._alarm = UnscoredAlarm(config.reward.alarm_fraction, queue.groups_per_step)
        first = queue.groups_per_step if not version else None
        self._idle = IdleLimit(idle_steps * queue.groups_per_step, first)
        self._undecided: dict[int, _Undecided] = {}
        self._too_old_for_scores: set[int] = set()  # groups that became too old while they were scored
        self._returning: dict[int, Entry] = {}  # groups from before a crash that wait for a place, to be sampled again
        self._archived_seq = 0

    # ------------------------------------------------------------------ what is known

    @property
    def num_in_flight(self) -> int:
        """Groups that are being sampled or scored."""
        return self._queue.num_in_flight

    @property
    def archived_seq(self) -> int:
        """The number of the ledger's transition up to which every dropped group is in the archive."""
        return self._archived_seq

    @property
    def next_order(self) -> int:
        """The dispatch order of the next new group."""
        return self._queue.next_order

    def move(self, shares: Mapping[str, float]) -> None:
        """Admit new groups by these shares of quotas."""
        self._queue.move(shares)

    def room(self, oldest_version: int) -> int:
        """How many groups may be admitted now. oldest_version: the oldest that a worker may still sample with."""
        return self._queue.room(oldest_version)

    def figures(self) -> dict[str, int]:
        """For the metrics of a step: groups that are ready, groups in flight, places given to another capability."""
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
        """Admit a group from before a crash that waits for a place, or a new group if there is none that fits."""
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

    def begins_with(self, prompt_id: str) -> int | None:
        """How many replies of a group are sampled before the others: None, all, where these could not end it."""
        first = self._first_replies
        return first if first is not None and self._source.may_stop(prompt_id, first) else None

    def _first_returning(self, capability: str) -> int | None:
        return next((order for order, entry in self._returning.items() if entry.capability == capability), None)

    def adopt(self, survivor: Survivor) -> Admission | Group | None:
        """Continue with a group from before a crash. Call it for the oldest stamp first.

        Returns the work that is left: an Admission if replies are to be sampled, a Group if it is to be scored, or
        None. It is None for a group that has its scores, which is ready or dropped. It is also None for a group that
        gets no place early enough, or has no replies: a later `admit` has it sampled again.
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
            self._undecided[order] = _Undecided(GroupState.GENERATED, survivor.group, num_first=self._first_replies)
            return survivor.group
        self._undecided[order] = _Undecided(GroupState.RESERVED, num_first=self._first_replies)
        self._ledger.restart_group(order, survivor.stamp, survivor.replies)
        prompt = self._source.prompt(entry.prompt_id, entry.system)
        return Admission(order, survivor.stamp, prompt, survivor.replies)

    def sampled_so_far(self, flight: Flight) -> None:
        """Record the replies of a group as far as they are sampled, so that a crash does not lose them."""
        self._in_state(flight.order, GroupState.RESERVED, "be sampled")
        left = self._config.group_size - flight.request.n
        self._ledger.sampled_so_far(flight.order, (*flight.replies, *(UNBEGUN,) * left))

    def first_sampled(self, flight: Flight) -> Group:
        """Record that the first replies of a group are sampled. Returns the group with these alone."""
        self.sampled_so_far(flight)
        undecided = self._undecided[flight.order]
        undecided.group, undecided.num_first = group_of_flight(flight), flight.request.n
        return undecided.group

    def first_scored(self, scored: ScoredGroup) -> Admission | None:
        """Decide by the rewards of its first replies whether a group goes on. Returns the work that is left then.

        Otherwise it is dropped, with these replies as its only ones; or it was dropped while it was scored.
        """
        group = scored.group
        undecided = self._undecided.get(group.order)
        if undecided is None:
            return None
        reason, counts = drop_reason(scored, self._config), passes_and_failures(scored.rewards, self._threshold)
        replies = tuple(reply_of(rollout) for rollout in group.rollouts)
        name = group.prompt.row.id
        if reason is None or reason.reason is not DropReason.ZERO_ADVANTAGE or self._source.goes_on(name, *counts):
            undecided.group = None
            unbegun = (UNBEGUN,) * (self._config.group_size - len(replies))
            return Admission(group.order, self._queue.stamp_of(group.order), group.prompt, (*replies, *unbegun))
        self._ledger.generated(group.order, replies)
        undecided.state = GroupState.GENERATED
        self.scored(scored, Drop(DropReason.STOPPED))
        return None

    def generated(self, flight: Flight) -> Group:
        """Record that all replies of a group are sampled. Returns the group, which is to be scored."""
        undecided = self._in_state(flight.order, GroupState.RESERVED, "be sampled")
        group = group_of_flight(flight)
        self._ledger.generated(flight.order, [reply_of(rollout) for rollout in group.rollouts])
        undecided.state, undecided.group = GroupState.GENERATED, group
        return group

    def scored(self, scored: ScoredGroup, reason: Drop | None) -> None:
        """Record the rewards of a group. It becomes ready, or is dropped if there is a `reason` (see `drop_reason`).

        A group that became too old while it was scored stays dropped. Raises StageError if as many groups in a row were
        dropped as `idle_steps` steps would need.
        """
        order = scored.group.order
        if order in self._too_old_for_scores:
            self._too_old_for_scores.remove(order)
            return
        undecided = self._in_state(order, GroupState.GENERATED, "be scored")
        undecided.state = GroupState.SCORED
        self._ledger.scored(order, scores_json(scored))
        self._tally.decided(scored, reason, in_parts=undecided.num_first is not None)
        if (alarm := self._alarm.observe(scored)) is not None:
            self._context.event("alarm", **alarm)
        self._source.observe(scored, self._threshold, undecided.num_first)
        self._source.decided(len(scored.rewards), is_useful=reason is None)
        if reason is None:
            undecided.scored, undecided.ready_since = scored, time.time()
            self._queue.ready(order)
        else:
            self._drop(order, reason, scored)
        self._idle.observe(scored, reason)

    # ------------------------------------------------------------------ groups that are not trained on

    def drop_expired(self, stop_sampling: Callable[[int], Flight | None]) -> None:
        """Drop spare groups that were not needed and, in mode `drop`, groups too old for every batch to come.

        stop_sampling: cancels a group at the workers, and returns its flight with the replies so far.
        """
        for order in self._queue.expired():
            undecided = self._undecided[order]
            self._drop(order, self._queue.too_old, undecided.scored)
            if undecided.state is GroupState.GENERATED:
                self._too_old_for_scores.add(order)
            flight = stop_sampling(order)
            if undecided.group is not None:
                lengths = [rollout.num_sampled for rollout in undecided.group.rollouts]
                self._tally.expired(self._queue.too_old, undecided.group.prompt.row.id, lengths)
            elif flight is not None:
                lengths = [reply.num_sampled for reply in flight.replies]
                self._tally.expired(self._queue.too_old, flight.prompt.row.id, lengths)

    def finish(self) -> None:
        """Drop every undecided group after the last step. Before, the ledger must have been written to the disk."""
        for entry in self._ledger.entries(UNDECIDED):
            undecided = self._undecided.pop(entry.id, None)
            self._record_drop(entry.id, DropReason.FINISHED, undecided.scored if undecided is not None else None)
        self._archive.write(self._version)
        self._archive.wait()
        self._ledger.event(LedgerEvent.FINISHED, self._version)

    def _drop(self, order: int, reason: Drop | DropReason, scored: ScoredGroup | None) -> None:
        """Drop a group that is in the queue. scored: the group with its rewards, if it has them."""
        del self._undecided[order]
        self._queue.drop(order)
        self._record_drop(order, reason, scored)

    def _record_drop(self, order: int, reason: Drop | DropReason, scored: ScoredGroup | None) -> None:
        self._ledger.dropped(order, str(reason))
        if scored is not None:
            self._archive.add(scored, step=None, trainer_version=self._version, status=f"dropped:{reason}")

    # ------------------------------------------------------------------ groups that are trained on

    def take(self, version: int) -> Batch | None:
        """The batch to be trained on at `version`, or None if it is not complete yet."""
        orders = self._queue.take(version)
        if orders is None:
            return None
        self._version = version + 1
        groups: list[ScoredGroup] = []
        ready_since: list[float] = []
        for order in orders:
            undecided = self._in_state(order, GroupState.SCORED, "be part of a batch")
            assert undecided.scored is not None  # the queue only puts ready groups into a batch
            undecided.is_taken = True
            groups.append(undecided.scored)
            ready_since.append(undecided.ready_since)
        return Batch(groups, ready_since)

    async def trained(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """Record that optimizer step `step` trained on these groups, with the advantages that they have here.

        When this returns, the step is on the disk: first its groups as scored in the ledger, then its file of the
        archive, then its groups as trained on in the ledger. So the archive is ahead of the ledger by one step at most,
        and never behind: see `audit.py`. The next step must be recorded after this one.
        """
        for scored in groups:
            order = scored.group.order
            if not self._in_state(order, GroupState.SCORED, "be trained on").is_taken:
                raise StageError(f"group {order} is not part of the batch of step {step}, so it cannot be trained on")
        for scored in groups:
            del self._undecided[scored.group.order]
            self._archive.add(scored, step=step, trainer_version=step, status="trained")
        await self._ledger.flush()
        self._archive.write(step)
        archived_seq = self._ledger.seq  # groups that are dropped from now on come to the file of the next step
        await self._archive.written()
        self._archived_seq = archived_seq
        self._ledger.trained([scored.group.order for scored in groups], step)
        await self._ledger.flush()

    def _in_state(self, order: int, state: GroupState, what: str) -> _Undecided:
        """Return the group. Raises StageError if it is not in `state`. what: the transition, for the message."""
        undecided = self._undecided.get(order)
        if undecided is None:
            found = self._ledger.state_of(order) or "not admitted"
            raise StageError(f"group {order} cannot {what}: it is {found}, not {state}")
        if undecided.state is not state:
            raise StageError(f"group {order} cannot {what}: it is {undecided.state}, not {state}")
        return undecided
