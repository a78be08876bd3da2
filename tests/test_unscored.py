"""Unscored replies: the reasons, the rows, and the sentences and events about them."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rollout_records import drawn

from posttrain.context import StageContext
from posttrain.errors import PluginError, StageError
from posttrain.files import read_jsonl
from posttrain.metrics.faults import fault_words
from posttrain.metrics.unscored import Failure, Unscored, kind_of
from posttrain.records import Message, Outcome, RewardResult, Rollout, Row, Scored
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.scoring import ScoringProgress, lateness, sample_and_score
from posttrain.scoring.plugins.results import to_result
from posttrain.scoring.pool.stats import PoolStats

GOOD = Scored(RewardResult(1.0))


def returned(value: object) -> Failure:
    with pytest.raises(PluginError) as raised:
        to_result(value)
    return Outcome.ERROR, str(raised.value)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (lambda: returned(None), "none"),
        (lambda: returned(float("nan")), "nan"),
        (lambda: returned(float("-inf")), "inf"),
        (lambda: returned(RewardResult(1.0, {"part": float("inf")})), "inf"),
        (lambda: returned("1.0"), "text"),
        (lambda: returned({"score": 1}), "dict"),
        (lambda: (Outcome.ERROR, "KeyError: 'x' (reward.py:3)"), "KeyError"),
        (lambda: (Outcome.ERROR, "error: KeyError: 'x' (reward.py:3)"), "KeyError"),  # as a scored group keeps it
        (lambda: (Outcome.TIMEOUT, "no score within 10 s: twice"), "timeout"),
        (lambda: (Outcome.UNSCORABLE, "no score within 10 s, 2 times, while others were scored"), "unscorable"),
        (lambda: (Outcome.INFRASTRUCTURE, "the reward's process exited with code 7"), "infrastructure"),
        (lambda: (Outcome.ERROR, ""), "error"),
    ],
)
def test_the_kind_of_a_missing_score_is_one_word(failure, kind):
    assert kind_of(failure()) == kind


def counted(*prompts: tuple[str, Sequence[Failure], int]) -> Unscored:
    unscored = Unscored()
    for name, failed, replies in prompts:
        unscored.add(name, failed, replies)
    return unscored


def test_the_sentence_names_prompts_kinds_and_a_row():
    none, nan, bad = returned(None), returned(float("nan")), (Outcome.ERROR, "ValueError: bad (rw.py:3)")
    unscored = counted(("p1", [], 4), ("p2", [none] * 4, 4), ("p3", [nan] * 3 + [bad], 4), ("p4", [nan] * 4, 4))
    assert unscored.sentence("profile") == (
        "profile: 3 of 4 prompts could not be scored (nan 2, none 1), e.g. row p3: "
        "the reward's value is nan; it must be finite"
    )
    partly = counted(("p1", [bad], 4), ("p2", [], 4))
    assert partly.sentence("evaluation") == (
        "evaluation: 1 of 8 replies could not be scored (ValueError 1), e.g. row p1: ValueError: bad (rw.py:3)"
    )
    both = counted(("p1", [bad], 4), ("p2", [none] * 4, 4))
    assert both.sentence("x").endswith("; and of the other prompts 1 replies (ValueError 1)")
    before = counted(("p9", [(Outcome.ERROR, "text")] * 2, 2))  # of an earlier run, of which the kind alone is known
    assert before.sentence("profile") == "profile: 1 of 1 prompts could not be scored (text 1), e.g. row p9"


@pytest.mark.parametrize(("lost", "event"), [(0, None), (2, "unscored"), (3, "alarm")])
def test_few_unscored_replies_are_reported_and_many_raise_an_alarm(tmp_path: Path, lost: int, event: str | None):
    context = StageContext("rl", tmp_path, tmp_path / "events.jsonl")
    unscored = counted(*((f"p{i}", [returned(None)] * 2 if i < lost else [], 2) for i in range(10)))
    unscored.tell(context, "profile", 0.2)
    events = list(read_jsonl(tmp_path / "events.jsonl")) if event else []
    assert [line["event"] for line in events] == ([event] if event else [])
    for line in events:
        assert (line["prompts"], line["prompts_unscored"], line["kinds"]) == (10, lost, {"none": lost})
        assert line["rows"] == ["p0", "p1", "p2"][:lost]
        words = fault_words(line)
        assert words is not None
        assert words[0] == event
        assert words[1].startswith(f"profile: {lost} of 10 prompts could not be scored (none {lost}), e.g. row p0: the")
        assert words[1].endswith("reward.alarm_fraction is 20%") == (event == "alarm")
        assert not set("{}[]") & set(words[1])


def flights(count: int) -> list[Flight]:
    found = []
    for order in range(count):
        row = Row(f"p{order}", "math", (Message("user", "?"),))
        flight = Flight(order, 0, drawn(row, row.messages, (1,)), SampleRequest((1,), 1, 1.0, max_tokens=4))
        flight.finished[0] = Rollout(row.id, "g", 0, flight.prompt.prompt, (), "x", "stop")
        found.append(flight)
    return found


class Sampled:
    """Stands for engines: all groups are sampled at once."""

    async def groups(self, flights, on_done):
        for flight in flights:
            on_done(flight)


def test_progress_counts_what_is_scored_and_shows_timeouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All is sampled at once. One prompt's reward hangs until a look at the timeouts has been told of."""
    monkeypatch.setattr("posttrain.sampling.scoring.LOOK_S", 0.01)
    monkeypatch.setattr("posttrain.context.PROGRESS_INTERVAL_S", 0.0)
    context, stats = StageContext("rl", tmp_path, tmp_path / "events.jsonl"), PoolStats()
    unscored = Unscored()
    progress = ScoringProgress(context, 3, "prompts", stats=lambda: stats, unscored=unscored, phase="pass@k profile")

    def told() -> list[dict]:
        return list(read_jsonl(context.events)) if context.events.exists() else []

    async def score(pairs):
        name = pairs[0][1].id
        if name == "p1":
            stats.num_timeouts, stats.late_row = 2, "p1"
            deadline = time.monotonic() + 20.0
            while not any("reward:" in line["values"] for line in told()) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            return [Scored(None, Outcome.UNSCORABLE, "no score")]
        return [GOOD]

    async def run():
        async with progress:
            return await sample_and_score(Sampled(), flights(3), score, progress=progress)

    assert [scores[0].outcome for scores in asyncio.run(run())] == ["scored", "unscorable", "scored"]
    lines = told()
    late = next(line for line in lines if "reward:" in line["values"])
    assert late["done"] < late["total"] == 3
    assert late["values"]["reward:"] == "2 timeouts so far, e.g. p1"
    assert late["values"]["waiting for a score"] == 3 - late["done"]
    assert lines[-1]["done"] == 3
    assert lines[-1]["values"]["unscored"] == 1
    assert unscored.lost == {"p1": "unscorable"}
    assert lateness(PoolStats()) == {}


def test_an_error_of_the_scorer_is_raised_as_it_is(tmp_path: Path):
    context = StageContext("rl", tmp_path, tmp_path / "events.jsonl")
    progress = ScoringProgress(context, 2, "prompts", stats=PoolStats, unscored=Unscored())

    async def score(pairs):
        raise StageError("the reward actor was lost")

    async def run():
        async with progress:
            await sample_and_score(Sampled(), flights(2), score, progress=progress)

    with pytest.raises(StageError, match="the reward actor was lost"):
        asyncio.run(run())
