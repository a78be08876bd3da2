"""The book of groups on its own: every transition reaches the queue, the ledger, the archive, the tally and the
selection, and none that cannot follow is let through. Ledger, archive, queue and source are the real ones."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.base import validate_config
from posttrain.config.rewards import SystemsConfig
from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.files import read_jsonl
from posttrain.metrics.correctness import passes_and_failures
from posttrain.records import FinishReason, Message, Outcome, RewardResult, Row, Scored, Segment, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.groups import drop_reason, scored_group
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.history.recovery import survivors
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.loop.tally import StepTally
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.records import Admission, DropReason, Group, LedgerEvent, ScoredGroup
from posttrain.rl.rollouts.requests import sample_request
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.rollouts import UNBEGUN, Reply, make_rollout

ROWS = [Row(f"p{index}", "sums", (Message("user", f"{index} + 1 ="),), str(index + 1)) for index in range(40)]


def config_of(**changes: Any) -> RlConfig:
    data = {
        "model": {"path": "model"}, "prompts": {"path": "prompts.jsonl"}, "reward": {"name": "math"}, "group_size": 2,
        "groups_per_step": 2, "max_staleness": 1, "steps": 10, "stop_after_idle_steps": 2,
    }  # fmt: skip
    return validate_config(RlConfig, {**data, **changes}, "test")


class Bench:
    """A book with everything that it tells, over a folder. `crashed` opens the same folder again."""

    def __init__(self, folder: Path, version: int = 0, **changes: Any):
        self.folder, self.config = folder, config_of(**changes)
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.queue = StalenessQueue(
            self.config.groups_per_step,
            self.config.max_staleness,
            {"sums": 1.0},
            refills=self.config.mixture_refills,
            version=version,
            mode=self.config.staleness,
            first_order=self.ledger.next_order,
            over_provision=self.config.over_provision,
        )
        self.tally = StepTally({}, {}, self.config.reward.correct_threshold)
        self.source = PromptSource(ROWS, SystemsConfig(), lambda row, messages: [1, 2, 3], seed=0)
        self.context = StageContext("rl", folder, folder / "events.jsonl", 0)
        self.book = GroupBook(
            self.config,
            self.context,
            self.queue,
            ledger=self.ledger,
            archive=RolloutArchive(folder / "rollouts", build_tokenizer()),
            tally=self.tally,
            source=self.source,
            idle_steps=self.config.stop_after_idle_steps,
            version=version,
            first_replies=self.config.first_replies,
        )

    def sampled(self, admission: Admission, version: int = 0) -> Flight:
        """What the workers give back of a group: two replies of three tokens."""
        flight = self.flight(admission)
        segment = Segment((5, 6, 7), True, (-0.5, -0.5, -0.5), (VersionSpan(version, 0, 3),))
        for index in range(2):
            flight.finished[index] = make_rollout(
                admission.prompt.prompt,
                Reply((segment,), "12", FinishReason.STOP),
                prompt_id=admission.prompt.row.id,
                group_id=f"g{admission.order}",
                index=index,
                system=None,
                worker="engine0",
                started_s=1.0,
                finished_s=2.0,
            )
        flight.recorded = [Reply(rollout.segments, rollout.text, rollout.finish_reason) for rollout in flight.rollouts]
        return flight

    def flight(self, admission: Admission, recorded: Sequence[Reply] = ()) -> Flight:
        request = sample_request(self.config.sampling, admission.prompt, 2, stop_ids=(0,))
        return Flight(admission.order, admission.stamp, admission.prompt, request, recorded)

    def score(self, group: Group, *rewards: float | None) -> ScoredGroup:
        known = [reward for reward in rewards if reward is not None]
        mean = sum(known) / len(known) if known else 0.0
        scored = ScoredGroup(
            group,
            rewards,
            tuple("right" if reward else "wrong" for reward in rewards),
            tuple(None if reward is None or len(known) < 2 else reward - mean for reward in rewards),
            tuple(Outcome.TIMEOUT if reward is None else Outcome.SCORED for reward in rewards),
        )
        self.book.scored(scored, drop_reason(scored, self.config))
        return scored

    def first(self, *rewards: float | None) -> tuple[int, Admission | None]:
        """Take one group from its admission to the scores of its first two replies; its order and what is left."""
        admission = self.book.admit(0)
        group = self.book.first_sampled(self.sampled(admission))
        scored = scored_group(group, [Scored(RewardResult(reward)) for reward in rewards], self.config)
        return admission.order, self.book.first_scored(scored)

    def ready(self, *, rewards: tuple[float | None, ...] = (1.0, 0.0), version: int = 0) -> int:
        """Take one group from its admission to its scores; returns its dispatch order."""
        admission = self.book.admit(version)
        self.score(self.book.generated(self.sampled(admission, version)), *rewards)
        return admission.order

    @property
    def states(self) -> dict[int, str]:
        self.ledger.flush_now()
        return {entry.id: str(entry.state) for entry in self.ledger.entries()}

    def events(self, order: int) -> list[str]:
        self.ledger.flush_now()
        return [event for _, _, event, group, _ in self.ledger.log() if group == order]

    def trained(self, groups: Sequence[ScoredGroup], step: int) -> None:
        asyncio.run(self.book.trained(groups, step))

    def archived(self, step: int) -> list[tuple[str, int | None, str]]:
        rows = pq.read_table(self.folder / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
        return sorted({(row["group_id"], row["step"], row["status"]) for row in rows})

    def metrics(self) -> dict[str, Any]:
        """Of the step that ends now, over a batch that does not matter here."""
        group = self.book.generated(self.sampled(self.book.admit(0)))
        filler = ScoredGroup(group, (1.0, 0.0), ("", ""), (0.5, -0.5), (Outcome.SCORED, Outcome.SCORED))
        return self.tally.values(0, [filler], ages_s=[0.0], waited_s=0.0, trained={})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_group_from_its_admission_to_the_step_that_trains_it(bench):
    assert bench.book.room(0) == 4
    orders = [bench.ready(), bench.ready()]
    assert bench.book.figures() == {"queue_groups": 2, "in_flight_groups": 0, "places_lent": 0}
    batch = bench.book.take(0)
    assert batch is not None
    assert [scored.group.order for scored in batch.groups] == orders
    assert len(batch.ready_since) == 2
    assert bench.states == {0: "scored", 1: "scored"}  # until the step is made
    bench.trained(batch.groups, 0)
    assert bench.states == {0: "trained", 1: "trained"}
    assert bench.events(0) == ["reserved", "generated", "scored", "trained"]
    assert bench.archived(0) == [("g0", 0, "trained"), ("g1", 0, "trained")]
    seq_of = {(event, order): seq for seq, _, event, order, _ in bench.ledger.log()}
    assert bench.book.archived_seq == seq_of["scored", 1]  # the last transition before the file was begun
    assert bench.book.position() == {"seq": bench.ledger.seq, "next_order": 2}


def test_replies_that_have_begun_outlive_a_crash(bench):
    admission = bench.book.admit(0)
    begun = Reply((Segment((5, 6), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),)),), "", FinishReason.RUNNING)
    bench.book.sampled_so_far(bench.flight(admission, [begun, UNBEGUN]))
    bench.ledger.flush_now()
    (survivor,) = survivors(bench.ledger, bench.source, 0)
    assert survivor.replies == (begun, UNBEGUN)


@pytest.mark.parametrize(
    ("rewards", "reason", "counted"),
    [
        ((0.0, 0.0), "zero_advantage", "groups_dropped_zero_advantage"),
        ((None, 1.0), "unscored:timeout", "groups_dropped_unscored"),
    ],
)
def test_a_group_that_teaches_nothing_is_dropped_everywhere_and_its_place_is_free(bench, rewards, reason, counted):
    full = bench.book.room(0)
    order = bench.ready(rewards=rewards)
    assert bench.states == {order: "dropped"}
    assert bench.book.room(0) == full
    assert bench.book.figures()["queue_groups"] == 0
    assert bench.events(order)[-2:] == ["scored", "dropped"]
    assert bench.metrics()[counted] == 1
    bench.book.finish()
    assert bench.archived(0) == [(f"g{order}", None, f"dropped:{reason}")]


@pytest.fixture
def screening(tmp_path: Path) -> Bench:
    """Groups of six that begin with two replies. The source says whether equal ones go on."""
    bench = Bench(tmp_path, group_size=6, selection={"first_replies": 2})
    bench.asked = []
    bench.source.goes_on = lambda *values: bench.asked.append(values) or bench.goes_on
    return bench


def test_first_replies_come_before_the_others_only_where_they_may_end_the_group(screening, tmp_path):
    screening.source.may_stop = lambda name, first: (name, first) == ("p3", 2)
    assert [screening.book.begins_with(name) for name in ("p3", "p4")] == [2, None]
    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole", group_size=6, selection={"first_replies": None})
    whole.source.may_stop = screening.source.may_stop
    assert whole.book.begins_with("p3") is None


def test_a_group_of_equal_first_replies_stops_if_the_beliefs_say_so(screening):
    full, screening.goes_on = screening.book.room(0), False
    order, left = screening.first(0.0, 0.0)
    assert left is None
    assert [passes_and_failures for _, *passes_and_failures in screening.asked] == [[0, 2]]
    assert screening.states == {order: "dropped"}
    assert screening.events(order) == ["reserved", "generated", "scored", "dropped"]
    assert screening.book.room(0) == full
    metrics = screening.metrics()
    assert (metrics["groups_dropped_stopped"], metrics["groups_dropped_zero_advantage"]) == (1, 0)
    assert (metrics["tokens_dropped"], metrics["tokens_generated"]) == (6, 6)  # what it cost
    screening.book.finish()
    assert screening.archived(0) == [(f"g{order}", None, "dropped:stopped")]


@pytest.mark.parametrize(("rewards", "goes_on"), [((1.0, 0.0), False), ((1.0, 1.0), True)])
def test_other_groups_go_on_from_their_first_replies_also_after_a_crash(screening, tmp_path, rewards, goes_on):
    screening.goes_on = goes_on
    order, left = screening.first(*rewards)
    assert bool(screening.asked) == (rewards[0] == rewards[1])
    assert left is not None
    assert (left.order, left.stamp, len(left.recorded)) == (order, 0, 6)
    assert left.recorded[2:] == (UNBEGUN,) * 4
    assert screening.book._undecided[order].num_first == 2  # of what counts for pass@k
    assert all(reply.finish_reason for reply in left.recorded[:2])
    assert screening.states == {order: "reserved"}
    (survivor,) = survivors(screening.ledger, screening.source, 0)
    assert (survivor.group, survivor.replies) == (None, left.recorded)
    screening.ledger.close()
    again = Bench(tmp_path, group_size=6, selection={"first_replies": 2})
    assert again.book.adopt(survivor) == left


def test_a_group_that_was_dropped_while_its_first_replies_were_scored_stays_dropped(screening):
    screening.goes_on = True
    admission = screening.book.admit(0)
    group = screening.book.first_sampled(screening.sampled(admission))
    screening.ledger.flush_now()
    screening.book.finish()
    scored = scored_group(group, [Scored(RewardResult(1.0))] * 2, screening.config)
    assert screening.book.first_scored(scored) is None
    assert screening.events(admission.order) == ["reserved", "dropped"]


def test_too_many_groups_in_a_row_that_teach_nothing_end_the_run(bench):
    for _ in range(3):
        bench.ready(rewards=(0.0, 0.0))
    bench.ready()  # one that teaches: the count begins again
    for _ in range(3):
        bench.ready(rewards=(0.0, 0.0))
    with pytest.raises(StageError, match=r"4 groups in a row taught nothing .*zero_advantage.*look at the reward"):
        bench.ready(rewards=(0.0, 0.0))


def test_a_new_run_of_which_nothing_can_be_scored_ends_after_a_batch(tmp_path):
    bench = Bench(tmp_path)
    bench.ready(rewards=(None, None))
    with pytest.raises(StageError, match="not one reply of the first 2 groups could be scored; most often: wrong"):
        bench.ready(rewards=(None, None))
    (tmp_path / "later").mkdir()
    later = Bench(tmp_path / "later", version=3)
    for _ in range(3):
        later.ready(rewards=(None, None), version=3)


def test_unscored_rollouts_raise_the_alarm(bench):
    for rewards in ((1.0, 0.0), (1.0, 0.0), (None, None)):
        bench.ready(rewards=rewards)
    (alarm,) = [event for event in read_jsonl(bench.folder / "events.jsonl") if event["event"] == "alarm"]
    assert (alarm["what"], alarm["fraction"], alarm["outcomes"]) == ("unscored", 0.5, {"timeout": 2})


def test_spares_that_were_not_needed_are_dropped_with_what_was_sampled_of_them(tmp_path):
    """Whether they are still sampled, or scored; the workers are told to stop, and late scores change nothing."""
    bench = Bench(tmp_path, max_staleness=0, over_provision=1.0, stop_after_idle_steps=20)
    for _ in range(6):  # losses, from which the queue learns that spares will be needed
        bench.ready(rewards=(0.0, 0.0))
    for _ in range(2):
        bench.ready()
    batch = bench.book.take(0)
    assert batch is not None
    bench.trained(batch.groups, 0)
    placed = [bench.book.admit(1) for _ in range(2)]
    spares = [bench.book.admit(1) for _ in range(bench.book.room(1))]
    assert len(spares) == 2
    scoring = bench.book.generated(bench.sampled(spares[0], 1))
    for admission in placed:
        bench.score(bench.book.generated(bench.sampled(admission, 1)), 1.0, 0.0)
    assert bench.book.take(1) is not None
    stopped: list[int] = []

    def stop(order: int) -> Flight | None:
        stopped.append(order)
        return bench.sampled(spares[1], 1) if order == spares[1].order else None

    bench.book.drop_expired(stop)
    assert stopped == [admission.order for admission in spares]
    assert [bench.states[admission.order] for admission in spares] == ["dropped", "dropped"]
    bench.score(scoring, 1.0, 0.0)
    assert bench.events(spares[0].order) == ["reserved", "generated", "dropped"]
    values = bench.metrics()
    assert values[f"groups_dropped_{DropReason.SURPLUS}"] == 2
    assert values["tokens_dropped"] == (6 + 2) * 2 * 3  # six groups without an advantage, two spares


def test_what_is_not_decided_at_the_end_is_dropped_once(bench):
    ready, sampled = bench.ready(), bench.book.admit(0)
    bench.book.generated(bench.sampled(sampled))
    reserved = bench.book.admit(0)
    bench.ledger.flush_now()
    bench.book.finish()
    assert bench.states == dict.fromkeys((ready, sampled.order, reserved.order), "dropped")
    assert bench.archived(0) == [(f"g{ready}", None, "dropped:finished")]
    bench.ledger.flush_now()
    assert [event for _, _, event, _, _ in bench.ledger.log()].count(LedgerEvent.FINISHED) == 1


def test_after_a_crash_every_group_goes_on_from_where_it_stood(tmp_path):
    before = Bench(tmp_path)
    ready = before.ready()
    scoring = before.book.admit(0)
    before.book.generated(before.sampled(scoring))
    sampling = before.book.admit(0)
    begun = Reply((Segment((5, 6), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),)),), "", FinishReason.RUNNING)
    before.book.sampled_so_far(before.flight(sampling, [begun, UNBEGUN]))
    unbegun = before.book.admit(0)
    before.ledger.flush_now()
    before.ledger.close()

    after = Bench(tmp_path)
    rest = [after.book.adopt(survivor) for survivor in survivors(after.ledger, after.source, 0)]
    by_order = {item.order: item for item in rest if item is not None}
    assert set(by_order) == {scoring.order, sampling.order}
    group = by_order[scoring.order]
    assert isinstance(group, Group)
    admission = by_order[sampling.order]
    assert isinstance(admission, Admission)
    assert admission.recorded == (begun, UNBEGUN)
    assert after.book.figures() == {"queue_groups": 1, "in_flight_groups": 2, "places_lent": 0}
    again = after.book.admit(0)  # the one of which nothing was left comes before any new group
    assert (again.order, again.prompt.row.id) == (unbegun.order, unbegun.prompt.row.id)
    after.score(group, 1.0, 0.0)
    batch = after.book.take(0)
    assert batch is not None
    assert [scored.group.order for scored in batch.groups] == [ready, scoring.order]
    assert after.events(sampling.order)[-1] == after.events(unbegun.order)[-1] == LedgerEvent.RESTARTED


def test_a_survivor_that_teaches_nothing_now_is_dropped(tmp_path):
    """The rules may have changed between the two runs: here one of two rollouts has no score, and min_group is 2."""
    before = Bench(tmp_path, group_size=3, min_group=2)
    admission = before.book.admit(0)
    group = before.book.generated(before.sampled(admission))
    scored = ScoredGroup(group, (1.0, None), ("", ""), (0.0, None), (Outcome.SCORED, Outcome.TIMEOUT))
    before.book.scored(scored, None)
    before.ledger.flush_now()
    before.ledger.close()
    after = Bench(tmp_path)
    assert [after.book.adopt(item) for item in survivors(after.ledger, after.source, 0)] == [None]
    assert after.states == {admission.order: "dropped"}


STEPS = ("generated", "scored", "taken", "trained")


@pytest.mark.parametrize(("reached", "wanted"), itertools.product(("admitted", *STEPS, "dropped"), STEPS))
def test_a_transition_that_cannot_follow_is_refused_by_name(tmp_path, reached, wanted):
    bench = Bench(tmp_path, groups_per_step=1)
    admission = bench.book.admit(0)
    flight = bench.sampled(admission)
    order = {"admitted": 0, "generated": 1, "scored": 2, "taken": 3, "trained": 4, "dropped": 5}
    group = Group(flight.order, flight.prompt, flight.rollouts)
    scored = ScoredGroup(group, (1.0, 0.0), ("", ""), (0.5, -0.5))
    if order[reached] >= 1:
        bench.book.generated(flight)
    if order[reached] >= 2:
        scored = bench.score(group, *((0.0, 0.0) if reached == "dropped" else (1.0, 0.0)))
    if reached in ("taken", "trained"):
        assert bench.book.take(0) is not None
    if reached == "trained":
        bench.trained([scored], 0)
    states = bench.states

    def attempt() -> Any:
        if wanted == "generated":
            return bench.book.generated(flight)
        if wanted == "scored":
            return bench.book.scored(scored, None)
        return bench.book.take(1) if wanted == "taken" else bench.trained([scored], 0)

    follows = {("admitted", "generated"), ("generated", "scored"), ("taken", "trained")}
    if (reached, wanted) in follows:
        attempt()
    elif wanted == "taken":
        assert attempt() is None  # nothing is handed out twice
        assert bench.states == states
    else:
        needed = {"generated": "be sampled: it is {}, not reserved", "scored": "be scored: it is {}, not generated"}
        message = needed.get(wanted, "be trained on").format(states[admission.order])
        with pytest.raises(StageError, match=f"group {admission.order} .*{message}"):
            attempt()
        assert bench.states == states


def test_a_group_that_was_never_admitted_is_refused(bench):
    flight = bench.sampled(Admission(7, 0, bench.source.prompt("p0", None)))
    with pytest.raises(StageError, match="group 7 cannot be sampled: it is not admitted, not reserved"):
        bench.book.generated(flight)


def test_the_selection_hears_of_every_scored_group(bench):
    heard = []
    bench.source.observe = lambda scored, threshold, first: heard.append(
        (scored.group.prompt.row.id, *passes_and_failures(scored.rewards, threshold), scored.group.oldest_version)
    )
    bench.ready()
    bench.ready(rewards=(0.0, 0.0))
    names = [entry.prompt_id for entry in _entries(bench)]
    assert heard == [(names[0], 1, 1, 0), (names[1], 0, 2, 0)]


def _entries(bench: Bench) -> list[Any]:
    bench.ledger.flush_now()
    return bench.ledger.entries()
