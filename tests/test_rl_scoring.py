"""Groups whose rewards fail, and the actor that scores groups: real reward processes, real Ray, real signals."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from rollout_records import drawn, one_turn

from posttrain.config.base import validate_config
from posttrain.config.resources import RewardResources
from posttrain.config.rewards import RewardConfig
from posttrain.errors import PluginError, StageError
from posttrain.records import Message, Rollout, Row, Scored, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.alarm import UnscoredAlarm
from posttrain.rl.grading.groups import drop_reason, score_group
from posttrain.rl.loop.tally import StepTally
from posttrain.rl.prompts.profile import nothing_scored
from posttrain.rl.records import Drop, DropReason, Group, ScoredGroup
from posttrain.scoring.pool.pool import RewardPool
from posttrain.scoring.remote.actor import MARK
from posttrain.scoring.remote.client import RewardClient

REWARD = '''
import os, pathlib, subprocess, time

def by_text(rollout, row):
    """Does what the text says, and keeps count of it; a number is the score."""
    what, _, value = rollout.text.partition(" ")
    seen = pathlib.Path(__file__).with_name("seen")
    with seen.open("a") as file:
        file.write(f"{rollout.index}\\n")
    match what:
        case "raise": raise ValueError("bad thing")
        case "die": os._exit(7)
        case "nan": return float("nan")
        case "hang": time.sleep(1000)
        case "slow": time.sleep(0.5)
        case "stuck" if seen.read_text().split().count(str(rollout.index)) == 1: time.sleep(1000)
        case "daemon":
            subprocess.Popen(["setsid", "--fork", "sleep", "1000"]); time.sleep(0.5)
        case "flaky" if seen.read_text().split().count(str(rollout.index)) == 1: raise ConnectionError("try again")
    return float(value or 1)
'''
ROW = Row("r1", "math", (Message("user", "?"),), "4")


@pytest.fixture
def reward(tmp_path: Path) -> str:
    (tmp_path / "reward.py").write_text(REWARD)
    return f"{tmp_path}/reward.py:by_text"


def make_rollout(text: str, index: int = 0) -> Rollout:
    return one_turn("r1", "g0", index, (1, 2), (3, 4), text, (-0.5, -0.25), (VersionSpan(0, 0, 2),), "stop")


def make_config(name: str, /, **changes: Any) -> RlConfig:
    data = {"model": {"path": "m"}, "prompts": {"path": "p"}, "group_size": 4, "groups_per_step": 4}
    return validate_config(RlConfig, {**data, "reward": {"name": name}, **changes}, "test")


class PoolScorer:
    """A pool in this process, asked as the actor asks its own."""

    def __init__(self, pool: RewardPool):
        self.pool = pool

    async def score(self, pairs: Sequence[tuple[Rollout, Row]]) -> list[Scored]:
        return await asyncio.gather(*(self.pool.score(rollout, row) for rollout, row in pairs))


def score_texts(texts: Sequence[str], config: RlConfig, **options: Any) -> ScoredGroup:
    async def run() -> ScoredGroup:
        pool = RewardPool(config.reward.name, **{"timeout_s": 20.0, **options})
        await pool.start()
        try:
            return await score_group(group, PoolScorer(pool), config)
        finally:
            await pool.close()

    prompt = drawn(ROW, ROW.messages, (1, 2))
    group = Group(0, prompt, tuple(make_rollout(text, index) for index, text in enumerate(texts)))
    return asyncio.run(run())


class TestGroups:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("text", "outcome", "options"),
        [
            ("raise", "error", {}),
            ("nan", "error", {}),
            ("die", "infrastructure", {}),
            ("hang", "timeout", {"retries": 0, "timeout_s": 2.0}),
        ],
    )
    def test_what_fails_is_left_out_and_the_rest_trained_on(
        self, reward: str, text: str, outcome: str, options: dict[str, Any]
    ) -> None:
        config = make_config(reward, reward={"name": reward, "rescores": 0})
        scored = score_texts(["right 1", text, "wrong 0", "half 0.5"], config, **options)
        assert scored.rewards == (1.0, None, 0.0, 0.5)
        assert scored.outcomes == ("scored", outcome, "scored", "scored")
        assert scored.advantages == (0.5, None, -0.5, 0.0)
        assert scored.reasons[1].startswith(f"{outcome}: ")
        assert drop_reason(scored, config) is None
        few = make_config(reward, reward={"name": reward, "rescores": 0}, min_group=4)
        assert drop_reason(score_texts(["1", text, "0", "0.5"], few, **options), few) == Drop(
            DropReason.UNSCORED, outcome
        )

    @pytest.mark.slow
    def test_an_answer_that_the_grader_hangs_on_again_has_no_score(self, reward: str, tmp_path: Path) -> None:
        config = make_config(reward, reward={"name": reward, "rescores": 3})
        scored = score_texts(["right 1", "hang", "right 1", "wrong 0"], config, timeout_s=2.0)
        assert scored.rewards == (1.0, None, 1.0, 0.0)
        assert scored.advantages[1] is None
        assert scored.outcomes[1] == "unscorable"
        assert scored.reasons[1].startswith("unscorable: no score within 2 s, 2 times")
        assert (tmp_path / "seen").read_text().split().count("1") == 2  # a third try would hang too

    @pytest.mark.slow
    @pytest.mark.parametrize(("rescores", "rewards"), [(0, (1.0, None, 0.0, None)), (1, (1.0, 1.0, 0.0, 1.0))])
    def test_only_what_has_no_score_is_scored_again(
        self, reward: str, rescores: int, rewards: tuple[float | None, ...], tmp_path: Path
    ) -> None:
        config = make_config(reward, reward={"name": reward, "rescores": rescores})
        assert score_texts(["right 1", "flaky", "wrong 0", "flaky"], config).rewards == rewards
        assert sorted((tmp_path / "seen").read_text().split()) == sorted("0123" + "13" * rescores)

    @pytest.mark.slow
    def test_the_most_frequent_outcome_is_told_and_counted_as_unscored(self, reward: str) -> None:
        config = make_config(reward, reward={"name": reward, "rescores": 0})
        lost = score_texts(["right 1", "die", "raise", "raise"], config)
        reason = drop_reason(lost, config)
        assert reason == Drop(DropReason.UNSCORED, "error")
        good = score_texts(["right 1", "wrong 0", "right 1", "wrong 0"], config)
        tally = StepTally({}, {}, 0.5)
        tally.decided(lost, reason)
        tally.decided(good, None)
        metrics = tally.values(0, [good], ages_s=[0.0], waited_s=0.0, trained={})
        assert (metrics["groups_dropped_unscored"], metrics["rollouts_unscored"]) == (1, 3)
        assert metrics["unscored_fraction"] == 3 / 8

    @pytest.mark.slow
    def test_drops_are_counted_by_reason_length_and_difficulty(self, reward: str) -> None:
        config = make_config(reward)
        same = score_texts(["right 1"] * 4, config)
        good = score_texts(["right 1", "wrong 0", "right 1", "wrong 0"], config)
        prompt_id = same.group.prompt.row.id
        tally = StepTally({}, {prompt_id: 0.3}, 0.5)
        tally.decided(good, None)
        tally.decided(same, Drop(DropReason.ZERO_ADVANTAGE))
        tally.expired(DropReason.STALE, prompt_id, [9, 0, 0, 9])
        tally.expired(DropReason.SURPLUS, "another", [0, 0, 0, 0])
        metrics = tally.values(0, [good], ages_s=[0.0], waited_s=0.0, trained={})
        tokens = len(same.group.rollouts[0].token_ids)
        dropped = {name: count for name, count in metrics.items() if name.startswith("groups_dropped_") and count}
        by_length = Counter([2 ** (tokens - 1).bit_length(), 8, 0])
        assert dropped == {
            "groups_dropped_zero_advantage": 1, "groups_dropped_stale": 1, "groups_dropped_surplus": 1,
            "groups_dropped_pass_rate/0.25": 2, "groups_dropped_pass_rate/unknown": 1,
            **{f"groups_dropped_length/{length}": count for length, count in by_length.items()},
        }  # fmt: skip
        assert metrics["groups_too_easy"] == 1
        assert metrics["tokens_dropped"] == 4 * tokens + 18


class TestAlarm:
    @pytest.mark.slow
    def test_one_alarm_is_raised_for_each_window_while_the_reward_fails(self, reward: str) -> None:
        config = make_config(reward, reward={"name": reward, "rescores": 0, "alarm_fraction": 0.5})
        good = score_texts(["right 1"] * 4, config)
        half = score_texts(["right 1", "right 1", "raise", "raise"], config)
        lost = score_texts(["raise", "raise", "raise", "die"], config)
        alarm = UnscoredAlarm(config.reward.alarm_fraction, config.groups_per_step)  # over 4 groups of 4
        told = [alarm.observe(scored) for scored in [good, *[half] * 4, lost, lost, lost, *[good] * 4]]
        assert [index for index, fields in enumerate(told) if fields is not None] == [5]
        assert told[5] is not None
        # Three groups lost half of their rollouts, the last one all.
        assert (told[5]["fraction"], told[5]["limit"], told[5]["groups"], told[5]["rollouts"]) == (10 / 16, 0.5, 4, 16)
        assert told[5]["outcomes"] == {"error": 9, "infrastructure": 1}
        assert told[5]["reasons"][0][0].startswith("error: ValueError: bad thing (reward.py:")
        assert told[5]["reasons"][0][1] == 9

    @pytest.mark.slow
    def test_a_reward_that_always_raises_ends_the_profile_with_its_own_words(self, reward: str) -> None:
        pairs = [(make_rollout("raise", index), ROW) for index in range(3)]
        error = nothing_scored(RewardPool(reward).score_all(pairs))
        assert isinstance(error, StageError)
        assert "; most often: error: ValueError: bad thing (reward.py:" in str(error)


# --- the actor ---


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """After every test, no process that any reward actor's processes started is alive."""
    yield
    deadline = time.monotonic() + 20.0
    while (left := marked()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def marked() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if MARK in process.environ() and process.status() != psutil.STATUS_ZOMBIE and is_ours(process):
                found.append(process)
    return found


def is_ours(process: psutil.Process) -> bool:
    mark = os.environ.get("POSTTRAIN_SESSION")
    return mark is not None and process.environ().get("POSTTRAIN_SESSION") == mark


def with_client(
    reward: str, work: Callable[[RewardClient], Coroutine[Any, Any, Any]], deadline_s: float = 30.0, **options: Any
) -> Any:
    async def run() -> Any:
        client = RewardClient(
            RewardConfig(name=reward, **{"timeout_s": 30.0, **options}), RewardResources(), deadline_s
        )
        await client.start()
        try:
            return await work(client)
        finally:
            await client.close()
            assert client.pids() == []

    return asyncio.run(run())


def pairs_of(*texts: str) -> list[tuple[Rollout, Row]]:
    return [(make_rollout(text, index), ROW) for index, text in enumerate(texts)]


async def at_work(tmp_path: Path, scorings: int) -> None:
    """Return when this number of scorings have begun."""
    seen = tmp_path / "seen"
    while not seen.exists() or len(seen.read_text().split()) < scorings:
        await asyncio.sleep(0.01)


def gone(pids: Sequence[int]) -> bool:
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    return psutil.wait_procs(processes, timeout=20.0)[1] == []


@pytest.mark.slow
@pytest.mark.timeout(120)
class TestActor:
    def test_many_groups_at_once_each_in_its_order(self, ray_session: None, reward: str) -> None:
        async def work(client: RewardClient) -> list[int]:
            calls = [client.score(pairs_of(*(f"value {call * 8 + index}" for index in range(8)))) for call in range(40)]
            values = [
                [scored.result.value for scored in scores if scored.result] for scores in await asyncio.gather(*calls)
            ]
            assert values == [[float(call * 8 + index) or 0.0 for index in range(8)] for call in range(40)]
            assert await client.score([]) == []
            assert client.stats.outcomes == {"scored": 320}
            pids = client.pids()
            assert len(set(pids)) == 3
            assert os.getpid() not in pids
            assert {psutil.Process(pid).ppid() for pid in pids[1:]} == {pids[0]}
            return pids

        assert gone(with_client(reward, work, workers=2))

    def test_groups_of_one_call_are_taken_as_they_come_and_only_the_rest_is_scored_again(
        self, ray_session: None, reward: str, tmp_path: Path
    ) -> None:
        """The actor is killed while it scores one of three groups."""

        async def work(client: RewardClient) -> None:
            taken: dict[int, list[float]] = {}
            changed = asyncio.Event()

            def take(found: Sequence[tuple[int, Sequence[Scored]]]) -> None:
                for place, scores in found:
                    assert place not in taken
                    taken[place] = [scored.result.value for scored in scores if scored.result]
                changed.set()

            stuck, first, second = pairs_of("stuck 1", "right 0.5", "right 0.25")
            scoring = asyncio.create_task(client.score_each([[stuck], [first, second], [], [second]], take))
            while len(taken) < 3:
                changed.clear()
                await changed.wait()
            assert taken == {1: [0.5, 0.25], 2: [], 3: [0.25]}
            assert not scoring.done()
            os.kill(client.pids()[0], signal.SIGKILL)
            await scoring
            assert taken == {0: [1.0], 1: [0.5, 0.25], 2: [], 3: [0.25]}
            assert client.num_restarts == 1
            assert Counter((tmp_path / "seen").read_text().split()) == {"0": 2, "1": 1, "2": 2}

        with_client(reward, work, workers=2)

    def test_what_cannot_be_sent_is_not_scored_and_named(self, ray_session: None, reward: str) -> None:
        async def work(client: RewardClient) -> None:
            row = Row("r", "math", (Message("user", "?"),), None, {"lock": threading.Lock()})
            (scored,) = await asyncio.wait_for(client.score([(make_rollout("right 1", 0), row)]), 30.0)
            assert (scored.outcome, scored.result) == ("error", None)
            assert scored.reason == "row r: a lock cannot be sent to a reward process"
            assert [scored.outcome for scored in await client.score(pairs_of("right 1"))] == ["scored"]

        with_client(reward, work)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_a_killed_reward_process_is_replaced_while_it_scores(
        self, ray_session: None, reward: str, tmp_path: Path, number: int
    ) -> None:
        async def work(client: RewardClient) -> None:
            scoring = asyncio.create_task(client.score(pairs_of("slow 1", "slow 1", "slow 0", "slow 1")))
            await at_work(tmp_path, 1)
            os.kill(client.pids()[1], number)
            scores = await scoring
            assert [scored.outcome for scored in scores] == ["scored", "scored", "scored", "scored"]
            assert (client.stats.num_retries, client.stats.num_restarts, client.num_restarts) == (1, 1, 0)

        with_client(reward, work, timeout_s=5.0)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_a_killed_reward_actor_is_replaced_while_it_scores(
        self, ray_session: None, reward: str, tmp_path: Path, number: int
    ) -> None:
        """What it was scoring is scored by the next one, and nothing that it started is left."""

        async def work(client: RewardClient) -> None:
            before = client.pids()
            calls = [pairs_of("daemon 1", "slow 1"), pairs_of("slow 0.5", "slow 1")]
            scoring = asyncio.gather(*(client.score(pairs) for pairs in calls))
            await at_work(tmp_path, 2)
            old = marked()
            assert len(old) >= 2
            os.kill(before[0], number)
            values = [[scored.result.value for scored in scores if scored.result] for scores in await scoring]
            assert values == [[1.0, 1.0], [0.5, 1.0]]
            assert client.num_restarts >= 1  # a busy machine may look frozen too
            assert gone([*before, *(process.pid for process in old)])
            assert set(client.pids()).isdisjoint(before)
            assert [scored.outcome for scored in await client.score(pairs_of("right 1"))] == ["scored"]

        with_client(reward, work, deadline_s=3.0, workers=2)

    def test_signals_of_all_kinds_never_make_a_zero(self, ray_session: None, reward: str) -> None:
        """Replies that are worth 1 and score in their time get that or nothing, whoever is hit in between."""

        async def work(client: RewardClient) -> None:
            async def hit() -> None:
                for turn in range(8):
                    await asyncio.sleep(0.6)
                    pids = client.pids()
                    with contextlib.suppress(ProcessLookupError, IndexError):
                        os.kill(
                            pids[0 if turn % 4 == 3 else 1 + turn % 2], (signal.SIGKILL, signal.SIGSTOP)[turn // 2 % 2]
                        )

            hitting = asyncio.create_task(hit())
            scores = []
            while not hitting.done():
                groups = await asyncio.gather(*(client.score(pairs_of(*["slow 1"] * 2)) for _ in range(2)))
                scores += [scored for group in groups for scored in group]
            await hitting
            assert client.num_restarts + client.stats.num_restarts >= 2
            assert len(scores) >= 4
            assert {(s.outcome, s.result.value if s.result else None) for s in scores} <= {
                ("scored", 1.0),
                ("timeout", None),
                ("infrastructure", None),
            }

        with_client(reward, work, deadline_s=2.0, workers=2, timeout_s=3.0)

    def test_scoring_ends_with_an_error_when_no_actor_stays_alive(self, ray_session: None, reward: str) -> None:
        async def work(client: RewardClient) -> None:
            async def kill_each() -> None:
                killed = set()
                while True:
                    for pid in set(client.pids()[:1]) - killed:
                        killed.add(pid)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await asyncio.sleep(0.02)

            killing = asyncio.create_task(kill_each())
            with pytest.raises(StageError, match="lost 6 times without one score in between; it died"):
                await client.score(pairs_of("hang"))
            assert client.num_restarts == 5
            with pytest.raises(StageError, match="lost 6 times"):
                await client.score(pairs_of("right 1"))
            killing.cancel()

        with_client(reward, work)

    def test_a_reward_that_cannot_be_loaded_is_refused_at_the_start(self, ray_session: None, tmp_path: Path) -> None:
        (tmp_path / "broken.py").write_text("raise ValueError('at import')\ndef f(rollout, row): return 1.0\n")

        async def run() -> None:
            client = RewardClient(RewardConfig(name=f"{tmp_path}/broken.py:f"), RewardResources())
            with pytest.raises(RuntimeError, match="start the client"):
                await client.score(pairs_of("a"))
            with pytest.raises(PluginError, match=r"importing it failed: ValueError: at import \(broken.py:1\)"):
                await client.start()
            assert client.pids() == []

        asyncio.run(run())

    def test_closing_ends_what_is_being_scored_without_a_score(
        self, ray_session: None, reward: str, tmp_path: Path
    ) -> None:
        async def run() -> list[Scored]:
            client = RewardClient(RewardConfig(name=reward), RewardResources())
            await client.start()
            scoring = asyncio.create_task(client.score(pairs_of("hang", "hang")))
            await at_work(tmp_path, 1)
            await client.close()
            return await scoring

        assert [(scored.result, scored.outcome) for scored in asyncio.run(run())] == [(None, "infrastructure")] * 2

    def test_a_path_is_relative_to_the_folder_of_the_caller(
        self, ray_session: None, reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)

        async def work(client: RewardClient) -> None:
            assert [scored.outcome for scored in await client.score(pairs_of("right 1"))] == ["scored"]

        with_client("reward.py:by_text", work)
