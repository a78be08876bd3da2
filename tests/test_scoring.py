"""Finding plug-ins, and scoring in killable processes: real processes, real signals, real sandboxes."""

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy
import psutil
import pytest
from rollout_records import one_turn

from posttrain.errors import PluginError
from posttrain.records import Message, RewardResult, Rollout, Row, Scored, VersionSpan
from posttrain.scoring.plugins.lookup import REWARD, RewardSpec, check_reward, list_plugins, load_reward
from posttrain.scoring.pool.pool import RewardPool
from posttrain.scoring.pool.wire import Answer, FrameBuffer, Loaded, PairEncoder, Question, frame
from posttrain.scoring.remote.messages import pack_scorings, unpack_scorings
from posttrain.scoring.sandbox.run import Limits, SandboxError, SandboxResult, find_sandbox, run_python

HOSTILE = '''
import ctypes, os, subprocess, sys, time

def by_text(rollout, row, bonus=0.0):
    """Does what the text says. A file tells that a score which never ends has begun."""
    if rollout.text in ("hang", "spin"): open(f"{__file__}.{rollout.text}", "w").close()
    match rollout.text:
        case "hang": time.sleep(1000)
        case "spin":
            while True: pass
        case "sys.exit": sys.exit(3)
        case "os._exit": os._exit(0)
        case "segfault": ctypes.string_at(0)
        case "prints":
            for _ in range(100_000): print("x" * 50)
        case "100 MB": os.write(1, b"y" * 100_000_000)
        case "nan": return float("nan")
        case "infinite": return float("inf")
        case "none": return None
        case "text": return "1"
        case "raise": raise ValueError("bad thing")
        case "interrupt": raise KeyboardInterrupt
        case "reads stdin": return float(len(sys.stdin.read()))
        case "memory": bytearray(1 << 40)
        case "true": return True
        case "child":
            subprocess.Popen(["sleep", "1000"]); time.sleep(1000)
        case "daemon":
            subprocess.Popen(["setsid", "--fork", "sleep", "1000"]); time.sleep(1000)
        case "left behind":
            subprocess.Popen(["setsid", "sleep", "1000"])
    return 1.0 + bonus

async def later(rollout, row):
    import asyncio
    match rollout.text:
        case "hang": await asyncio.sleep(1000)
        case "spin":
            while True: pass
        case "os._exit": os._exit(4)
        case "raise": raise TimeoutError("my own")
    await asyncio.sleep(0.05)
    return True
'''


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    path = tmp_path / "hostile.py"
    path.write_text(HOSTILE)
    return str(path)


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test, none of the processes that it started is alive: they are known by a mark in their environment,
    those in a sandbox, which have none, by their command and by having no parent or ours."""
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    monkeypatch.setenv("TEST_MARK", mark)
    yield
    deadline, left = time.monotonic() + 10.0, [psutil.Process()]
    while left and time.monotonic() < deadline:
        left = [process for process in psutil.process_iter() if _is_left(process, mark)]
        time.sleep(0.05 if left else 0.0)
    assert [(process, process.cmdline()) for process in left] == []


def _is_left(process: psutil.Process, mark: str) -> bool:
    try:
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get("TEST_MARK") == mark:
            return True
        in_sandbox = [word for word in process.cmdline() if word == "/tmp/main.py" or word.endswith("inside.py")]
        return bool(in_sandbox) and process.ppid() in (1, os.getpid())
    except psutil.Error:
        return False


def reply(text: str, index: int = 0) -> Rollout:
    versions = (VersionSpan(0, 0, 1), VersionSpan(1, 1, 2))
    return one_turn("p", "g", index, (1, 2), (3, 4), text, (-0.5, -0.25), versions, "stop", "be brief")


ROW = Row("r1", "math", (Message("user", "?"),), "4", {"level": 1})


def score(name: str, texts: list[str], num_processes: int = 1, **options: float) -> tuple[list[Scored], RewardPool]:
    async def run() -> list[Scored]:
        await pool.start()
        try:
            return await asyncio.gather(*(pool.score(reply(text, index), ROW) for index, text in enumerate(texts)))
        finally:
            await pool.close()

    pool = RewardPool(name, num_processes=num_processes, **options)  # type: ignore[arg-type]
    return asyncio.run(run()), pool


def score_group(name: str, texts: list[str], **options: float) -> tuple[list[Scored], RewardPool]:
    """The scores of replies to one prompt that are scored together."""
    pool = RewardPool(name, **options)  # type: ignore[arg-type]
    return pool.score_all((reply(text, index), ROW) for index, text in enumerate(texts)), pool


@pytest.mark.slow
class TestPool:
    @pytest.mark.parametrize(
        ("text", "outcome", "reason"),
        [
            ("sys.exit", "error", "SystemExit: 3"),
            ("os._exit", "infrastructure", "exited with code 0"),
            ("segfault", "infrastructure", "SIGSEGV"),
            ("nan", "error", "value is nan"),
            ("infinite", "error", "value is inf"),
            ("none", "error", "returned None"),
            ("text", "error", "returned str '1'"),
            ("raise", "error", "ValueError: bad thing (hostile.py:21)"),
            ("interrupt", "error", "KeyboardInterrupt"),
            ("memory", "error", "MemoryError"),
        ],
    )
    def test_failures_are_unscored_and_hurt_nobody_else(
        self, hostile: str, text: str, outcome: str, reason: str
    ) -> None:
        results, _ = score(f"{hostile}:by_text", ["a", text, "b", "c"])
        assert results[1].result is None
        assert results[1].outcome == outcome
        assert reason in results[1].reason
        assert [results[i].outcome for i in (0, 2, 3)] == ["scored"] * 3

    @pytest.mark.parametrize(
        ("text", "value"),
        [("prints", 1.0), ("100 MB", 1.0), ("reads stdin", 0.0), ("true", 1.0), ("left behind", 1.0)],
    )
    def test_unusual_return_values_are_scored(self, hostile: str, text: str, value: float) -> None:
        results, _ = score(f"{hostile}:by_text", [text, "b"])
        assert results[0].outcome == "scored"
        assert results[0].result == RewardResult(value)

    @pytest.mark.parametrize("text", ["hang", "spin", "child", "daemon"])
    def test_alone_a_hang_is_a_timeout_without_a_score(self, hostile: str, text: str) -> None:
        results, pool = score(f"{hostile}:by_text", [text], timeout_s=0.3)
        assert (results[0].result, results[0].outcome) == (None, "timeout")
        assert results[0].wall_s >= 0.6
        assert (pool.stats.num_retries, pool.stats.num_restarts) == (1, 2)

    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_a_hang_while_others_pass_is_unscorable(self, hostile: str, num_processes: int) -> None:
        results, pool = score(f"{hostile}:by_text", ["a", "hang", "b", "c"], num_processes, timeout_s=0.8)
        assert [scored.outcome for scored in results] == ["scored", "unscorable", "scored", "scored"]
        assert results[1].result is None
        assert results[1].reason == "no score within 0.8 s, 2 times, while others were scored"
        assert pool.stats.outcomes == {"scored": 3, "unscorable": 1}
        assert (pool.stats.num_timeouts, pool.stats.late_row) == (2, "r1")

    @pytest.mark.parametrize("num_processes", [1, 2])
    def test_each_of_many_simultaneous_scorings_has_its_own_outcome(self, hostile: str, num_processes: int) -> None:
        fates = {150: ("hang", "unscorable"), 250: ("os._exit", "infrastructure"), 300: ("raise", "error")}
        unsendable = Row("r2", "math", (), None, {"image": b"123"})
        pairs = [(reply(fates[i][0] if i in fates else "a", i), unsendable if i == 200 else ROW) for i in range(400)]

        async def run() -> list[str]:
            await pool.start()
            try:
                return [scored.outcome for scored in await asyncio.gather(*pool.begin(pairs))]
            finally:
                await pool.close()

        pool = RewardPool(f"{hostile}:by_text", num_processes, timeout_s=1.0)
        outcomes = asyncio.run(run())
        expected = {index: outcome for index, (_, outcome) in fates.items()} | {200: "error"}
        assert {index: outcome for index, outcome in enumerate(outcomes) if outcome != "scored"} == expected

    @pytest.mark.parametrize(("function", "num_processes"), [("by_text", 1), ("later", 2)])
    def test_a_prompt_on_which_the_grader_hangs_costs_a_few_deadlines(
        self, hostile: str, num_processes: int, function: str
    ) -> None:
        """Also where two of its replies would pass: they come after the two that speak for the prompt. Not where one
        of the first passes."""
        bad, good = (Row(name, "math", (Message("user", "?"),), "4", {}) for name in ("bad", "good"))
        texts = ["a", "a", *["hang"] * 6, "a", "a", "a", *["hang"] * 2, "a"]
        rows = [good, good, *[bad] * 6, bad, bad, good, good, good, good]
        pool = RewardPool(f"{hostile}:{function}", num_processes, timeout_s=0.6, concurrency=2)
        results = pool.score_all((reply(text, i), row) for i, (text, row) in enumerate(zip(texts, rows, strict=True)))
        outcomes = [scored.outcome for scored in results]
        assert outcomes == [*["scored"] * 2, *["unscorable"] * 8, "scored", *["unscorable"] * 2, "scored"]
        not_tried = [scored.reason for scored in results if scored.reason.startswith("not tried")]
        in_processes = 2 * num_processes if function == "later" else 0  # before the first is known to hang
        assert 8 - 2 - in_processes - 2 * num_processes <= len(not_tried) <= 6
        assert set(not_tried) == {"not tried, because the reward hung on 2 other replies to this prompt"}
        assert pool.stats.num_timeouts == 2 * (outcomes.count("unscorable") - len(not_tried))

    def test_an_outage_gives_no_prompt_up(self, hostile: str) -> None:
        results, pool = score_group(f"{hostile}:by_text", ["hang"] * 3, timeout_s=0.1)
        assert [scored.outcome for scored in results] == ["timeout"] * 3
        assert pool.stats.num_timeouts == 6

    def test_a_pool_that_is_closed_ends_what_is_held_back(self, hostile: str) -> None:
        async def run() -> list[Scored]:
            pool = RewardPool(f"{hostile}:by_text", timeout_s=0.3)
            await pool.start()
            futures = pool.begin([(reply("hang", index), ROW) for index in range(5)])
            while pool.stats.num_timeouts < 2:
                await asyncio.sleep(0.01)
            await pool.close()
            return [await future for future in futures]

        assert {(scored.outcome, scored.reason) for scored in asyncio.run(run())} == {
            ("infrastructure", "the pool was closed")
        }

    def test_a_hang_is_unscorable_where_others_are_wrong(self, hostile: str) -> None:
        """A score of 0, here given to an earlier reply, is as good a sign as any other that the grader works."""

        async def run() -> list[str]:
            pool = RewardPool(f"{hostile}:by_text", timeout_s=0.8)
            await pool.start()
            outcomes = [(await pool.score(reply(text), ROW)).outcome for text in ("reads stdin", "hang")]
            await pool.close()
            return outcomes

        assert asyncio.run(run()) == ["scored", "unscorable"]

    def test_a_process_that_was_frozen_is_not_held_against_the_reply(self, tmp_path: Path) -> None:
        """Frozen at the same reply again and again, while its neighbour's replies pass."""
        path = tmp_path / "frozen.py"
        path.write_text(
            "import os, signal\ndef f(rollout, row):\n"
            "    if rollout.text == 'freeze': os.kill(os.getpid(), signal.SIGSTOP)\n    return 1.0\n"
        )
        results, pool = score(f"{path}:f", ["a", "freeze", "b"], 2, timeout_s=1.0)
        assert [scored.outcome for scored in results] == ["scored", "infrastructure", "scored"]
        assert (results[1].result, results[1].reason) == (None, "the reward's process was stopped")
        assert pool.stats.num_retries == 1

    def test_an_outage_is_never_a_zero(self, hostile: str) -> None:
        """Others passed before, but none passes any more: the grader is at fault, not the reply."""
        path = Path(hostile).with_name("outage.py")
        switch = Path(hostile).with_name("down")
        path.write_text(
            f"import os, time\ndef judge(rollout, row):\n    while os.path.exists({str(switch)!r}): time.sleep(0.01)\n"
            "    return 1.0\n"
        )

        async def run() -> list[Scored]:
            pool = RewardPool(f"{path}:judge", timeout_s=0.8)
            await pool.start()
            before = await pool.score(reply("a"), ROW)
            switch.touch()
            during = await pool.score(reply("b"), ROW)
            switch.unlink()
            after = await pool.score(reply("c"), ROW)
            await pool.close()
            return [before, during, after]

        assert [scored.outcome for scored in asyncio.run(run())] == ["scored", "timeout", "scored"]

    def test_without_retries_a_hang_is_a_timeout(self, hostile: str) -> None:
        results, pool = score(f"{hostile}:by_text", ["a", "hang"], timeout_s=1.0, retries=0)
        assert (results[1].result, results[1].outcome, pool.stats.num_retries) == (None, "timeout", 0)

    @pytest.mark.parametrize(
        ("text", "outcome"),
        [
            ("hang", "unscorable"),
            ("spin", "unscorable"),
            ("os._exit", "infrastructure"),
            ("raise", "error"),
        ],
    )
    def test_async_rewards_are_scored_and_time_out_one_by_one(self, hostile: str, text: str, outcome: str) -> None:
        results, _ = score(f"{hostile}:later", ["a", text, "b", "c"], timeout_s=0.5)
        assert [scored.outcome for scored in results] == ["scored", outcome, "scored", "scored"]

    def test_async_items_run_at_once(self, hostile: str) -> None:
        results, pool = score(f"{hostile}:later", ["a"] * 60, concurrency=30)
        assert pool.stats.outcomes == {"scored": 60}
        assert max(scored.wall_s for scored in results) < pool.stats.busy_s / 4

    def test_a_tower_of_powers_does_not_hang_the_grader(self) -> None:
        """It is refused before it is computed, and its neighbours are graded all the same."""
        results, _ = score("math", ["\\boxed{4}", "\\boxed{9^{9^{9^{9}}}}", "\\boxed{5}"], timeout_s=3.0)
        assert [scored.outcome for scored in results] == ["scored", "scored", "scored"]
        assert [scored.result.value for scored in results if scored.result] == [1.0, 0.0, 0.0]

    def test_args_reach_the_function(self, hostile: str) -> None:
        pool = RewardPool(RewardSpec(f"{hostile}:by_text", {"bonus": 0.5}), num_processes=2)
        results = pool.score_all((reply(str(index)), ROW) for index in range(300))
        assert len(results) == 300
        assert all(scored.result == RewardResult(1.5) for scored in results)

    def test_the_pool_works_under_uvloop(self, hostile: str) -> None:
        """vLLM installs it: its transports are not subclasses of asyncio's."""
        uvloop = pytest.importorskip("uvloop")
        pool = RewardPool(f"{hostile}:by_text", num_processes=1, timeout_s=1, retries=0)

        async def work() -> list[str]:
            await pool.start()
            outcomes = [(await pool.score(reply(text), ROW)).outcome for text in ("a", "hang", "b")]
            await pool.close()
            return outcomes

        assert uvloop.run(work()) == ["scored", "timeout", "scored"]

    def test_score_all_keeps_the_order(self, tmp_path: Path) -> None:
        path = tmp_path / "order.py"
        path.write_text("def value(rollout, row):\n    return float(rollout.text)\n")
        results = RewardPool(f"{path}:value", num_processes=2).score_all((reply(str(i)), ROW) for i in range(200))
        assert [scored.result.value for scored in results if scored.result] == [float(i) for i in range(200)]

    def test_a_row_that_json_cannot_carry(self, hostile: str) -> None:
        async def run() -> Scored:
            await pool.start()
            try:
                return await pool.score(reply("a"), Row("r9", "math", (), None, {"image": b"123"}))
            finally:
                await pool.close()

        pool = RewardPool(f"{hostile}:by_text")
        scored = asyncio.run(run())
        assert (scored.outcome, scored.reason) == ("error", "row r9: a bytes cannot be sent to a reward process")

    def test_closing_ends_what_is_running(self, hostile: str) -> None:
        async def run() -> Scored:
            pool = RewardPool(f"{hostile}:by_text")
            await pool.start()
            task = asyncio.create_task(pool.score(reply("hang"), ROW))
            while not Path(f"{hostile}.hang").exists():
                await asyncio.sleep(0.01)
            await pool.close()
            with pytest.raises(RuntimeError, match="start the pool"):
                await pool.score(reply("a"), ROW)
            return await task

        assert asyncio.run(run()).outcome == "infrastructure"

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("raise ValueError('broken at import')", "ValueError: broken at import (plug.py:1)"),
            ("import sys; sys.exit(1)", "SystemExit: 1"),
            ("import os; os._exit(9)", "exited with code 9"),
            ("import time; time.sleep(1000)", "more than 0.5 s"),
            ("import no_such_package", "plug.py:1 imports no_such_package, which is not installed in"),
            ("if 1 + 1: import no_such_package", "No module named 'no_such_package'"),
        ],
    )
    def test_a_plugin_that_cannot_be_loaded_is_refused_at_the_start(
        self, tmp_path: Path, source: str, message: str
    ) -> None:
        path = tmp_path / "plug.py"
        path.write_text(source + "\ndef f(rollout, row):\n    return 1.0\n")
        with pytest.raises(PluginError, match=message.replace("(", r"\(").replace(")", r"\)")):
            score(f"{path}:f", ["a"], start_timeout_s=0.5 if "sleep" in source else 60.0)

    def test_warm_up_is_outside_the_deadline(self, tmp_path: Path) -> None:
        path = tmp_path / "warm.py"
        path.write_text(
            "import time\nready = []\ndef warm_up():\n    time.sleep(3)\n    ready.append(1)\n"
            "def f(rollout, row):\n    return len(ready)\n"
        )
        results, _ = score(f"{path}:f", ["a"], timeout_s=2.5, retries=0)
        assert results[0].result == RewardResult(1.0)

    def test_workers_die_with_the_pool_process(self, hostile: str) -> None:
        """SIGKILL to the process that holds the pool, in the middle of a score that never ends."""
        program = f"""
            import asyncio, os
            from posttrain.scoring.pool.pool import RewardPool
            from tests.test_scoring import ROW, reply
            async def main():
                pool = RewardPool({hostile + ":by_text"!r}, num_processes=2, timeout_s=100)
                await pool.start()
                tasks = [asyncio.create_task(pool.score(reply(text), ROW)) for text in ("spin", "hang")]
                while not all(os.path.exists({hostile!r} + "." + text) for text in ("spin", "hang")):
                    await asyncio.sleep(0.01)
                print("started", flush=True)
                await asyncio.gather(*tasks)
            asyncio.run(main())
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
        parent = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) == 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
        assert psutil.wait_procs(workers, timeout=5.0)[1] == []

    def test_a_worker_imports_nothing_heavy(self, tmp_path: Path) -> None:
        path = tmp_path / "heavy.py"
        path.write_text(
            "import sys\ndef f(rollout, row):\n"
            "    return float(any(name in sys.modules for name in ('torch', 'pydantic', 'numpy', 'yaml')))\n"
        )
        results, _ = score(f"{path}:f", ["a"])
        assert results[0].result == RewardResult(0.0)


class TestWire:
    def test_a_pair_survives_the_journey(self) -> None:
        row = Row("r", "coding", (Message("system", "s"), Message("user", "é")), [1, None], {"a": {"b": [1.5]}})
        data = PairEncoder()(reply("text"), row).question(7)
        buffer: FrameBuffer[Question] = FrameBuffer(Question)
        messages = [message for byte in data for message in buffer.feed(bytes([byte]))]
        assert messages == [Question(7, reply("text"), row)]

    @pytest.mark.parametrize("size", [1, 7, 40, 10_000])
    def test_messages_are_read_however_they_are_cut(self, size: int) -> None:
        sent = [Answer(key, 0.5, RewardResult(float(key), {"a": 1.0}, "x" * key)) for key in range(60)]
        data = b"".join(map(frame, sent))
        buffer: FrameBuffer[Loaded | Answer] = FrameBuffer(Loaded | Answer)
        cuts = range(0, len(data), size)
        assert [message for cut in cuts for message in buffer.feed(data[cut : cut + size])] == sent

    def test_messages_before_one_that_cannot_be_read_are_read(self) -> None:
        good, bad = Answer(1, 0.5, error="e"), b"\xc1"
        messages = FrameBuffer(Loaded | Answer).feed(frame(good) * 2 + len(bad).to_bytes(4, "big") + bad)
        assert [next(messages), next(messages)] == [good, good]
        with pytest.raises(ValueError, match="MessagePack data is malformed"):
            next(messages)

    def test_a_row_arrives_as_json_would_carry_it(self) -> None:
        fields = {"pair": (1, 2), "array": numpy.arange(2), "day": date(2026, 1, 2), 3: math.nan}
        data = PairEncoder()(reply("text"), Row("r", "coding", (), (1,), fields)).question(0)
        arrived = next(FrameBuffer[Question](Question).feed(data)).row
        assert arrived.answer == [1]
        assert math.isnan(arrived.fields.pop("3"))
        assert arrived.fields == {"pair": [1, 2], "array": [0, 1], "day": "2026-01-02"}

    @pytest.mark.parametrize("bad", [{"lock": threading.Lock()}, {"raw": b"123"}, {"large": 2**80}])
    def test_scorings_are_packed_together_and_by_parts_where_one_cannot_be(self, bad: dict[str, Any]) -> None:
        plain = Row("a", "coding", (Message("user", "?"),), "4", {"level": 2, "hint": None, "share": 0.5})
        nested = Row("b", "coding", (Message("user", "?"),), (1, 2), {"day": date(2026, 1, 2), 3: numpy.arange(2)})
        wrong = Row("c", "coding", (), None, bad)
        groups = [(5, [(reply("x", 0), plain), (reply("y", 1), plain)]), (6, [(reply("z"), nested)])]

        def read(scorings: list[Any]) -> list[Any]:
            found = unpack_scorings(pack_scorings(scorings))
            return [
                (item.key, [pair if isinstance(pair, str) else pair.question(1) for pair in item.encoded()])
                for item in found
            ]

        expected = [(key, [PairEncoder()(rollout, row).question(1) for rollout, row in pairs]) for key, pairs in groups]
        assert read(groups) == expected
        assert len(unpack_scorings(pack_scorings(groups))[0].rows) == 1
        *good, (key, (first, second)) = read([*groups, (7, [(reply("x"), wrong), (reply("y"), plain)])])
        assert (good, key, second) == (expected, 7, PairEncoder()(reply("y"), plain).question(1))
        assert first.startswith("row c: ")

    def test_a_value_that_cannot_be_sent_is_named(self) -> None:
        with pytest.raises(TypeError, match="a object cannot be sent"):
            PairEncoder()(reply("text"), Row("r", "coding", (), object()))
        with pytest.raises(ValueError, match="surrogates not allowed"):
            PairEncoder()(reply("text"), Row("r", "coding", (Message("user", "\ud800"),)))

    def test_a_message_of_another_kind_is_refused_by_the_field_that_is_wrong(self) -> None:
        body = msgspec.msgpack.encode({"type": "answer", "key": "one", "seconds": 0.0})
        with pytest.raises(ValueError, match=r"Expected `int`, got `str` - at `\$.key`"):
            list(FrameBuffer(Loaded | Answer).feed(len(body).to_bytes(4, "big") + body))

    def test_a_monstrous_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at most"):
            list(FrameBuffer(Loaded | Answer).feed(b"\xff\xff\xff\xff"))


class TestPlugins:
    def test_a_reward_can_be_named_in_three_ways(self, hostile: str) -> None:
        for name in ("puzzles", "posttrain.rewards.puzzles:puzzles", "posttrain.rewards.puzzles.puzzles"):
            check_reward(name)
            assert load_reward(name).__name__ == "puzzles"
        check_reward(f"{hostile}:by_text", {"bonus": 1.0})
        assert load_reward(f"{hostile}:by_text", {"bonus": 1.0})(reply("a"), ROW) == 2.0

    def test_every_built_in_is_listed_and_passes_its_check(self) -> None:
        listed = {info.name: info for info in list_plugins(REWARD)}
        assert {"puzzles", "final_answer", "math", "code", "valid_json"} <= set(listed)
        args = {"overlong": {"max_tokens": 9}, "weighted_sum": {"rewards": {"math": 1}},
                "by_capability": {"rewards": {"math": "math"}}}  # fmt: skip
        for name, info in listed.items():
            if info.where.startswith("posttrain."):
                check_reward(name, args.get(name))
                assert info.summary

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("puzzels", "reward 'puzzels' is not known; did you mean 'puzzles'"),
            ("", "give a name"),
            ("posttrain.rewards.puzzels:puzzles", "no module posttrain.rewards.puzzels"),
            ("no_such_package.module.function", "no module no_such_package"),
            ("posttrain.rewards.puzzles:puzzle", "no function 'puzzle' in .*did you mean 'puzzles'"),
            ("posttrain.records.deeper:f", "posttrain.records is a module, not a package"),
            ("no/such/file.py:f", "there is no file /.*no/such/file.py"),
            ("{file}", "name the function too, as in .*plug.py:good"),
            ("{file}:goood", "did you mean 'good'.; functions there: good, one, many"),
            ("{file}:constant", "constant in .*plug.py is a constant, not a function"),
            ("{file}:Class", "Class in .*plug.py is a class, not a function"),
            ("{file}:one", r"plug.py:4: one\(rollout\) cannot be called with \(rollout, row\)"),
            ("{file}:many", r"plug.py:6: many\(a, b, c\) cannot be called .*missing a required argument: 'c'"),
            ("{broken}:f", r"broken.py:2: syntax error"),
        ],
    )
    def test_each_wrong_plugin_is_one_message(self, tmp_path: Path, name: str, message: str) -> None:
        plug, broken = tmp_path / "plug.py", tmp_path / "broken.py"
        plug.write_text(
            "def good(rollout, row, bonus=0): return 1.0\n\nconstant = 3\ndef one(rollout): return 1.0\n\n"
            "def many(a, b, c): return 1.0\n\nclass Class: pass\n"
        )
        broken.write_text("x = 1\ndef f(rollout, row)\n    return 1\n")
        with pytest.raises(PluginError, match=message) as raised:
            check_reward(name.format(file=plug, broken=broken))
        assert "\n" not in str(raised.value)

    def test_wrong_args_are_refused_before_anything_runs(self, hostile: str) -> None:
        with pytest.raises(PluginError, match="unexpected keyword argument 'bonsu'"):
            check_reward(f"{hostile}:by_text", {"bonsu": 1})
        with pytest.raises(PluginError, match="max_tokens"):
            check_reward("overlong")
        with pytest.raises(PluginError, match="did you mean 'math'"):
            check_reward("weighted_sum", {"rewards": {"mth": 1.0}})

    def test_checking_executes_nothing(self, tmp_path: Path) -> None:
        mark = tmp_path / "executed"
        (tmp_path / "p.py").write_text(f"open({str(mark)!r}, 'w')\nimport torch\ndef f(rollout, row): return 1.0\n")
        check_reward(f"{tmp_path / 'p.py'}:f")
        assert not mark.exists()

    @pytest.mark.parametrize(
        "source",
        [
            "import no_such.part\ndef f(rollout, row): return 1.0",
            "from no_such.part import f",
            "import math, no_such\ndef f(rollout, row): return 1.0",
            "def f(rollout, row):\n    import no_such\n    return 1.0",
            "async def f(rollout, row):\n    from no_such import part\n    return 1.0",
            "def warm_up():\n    import no_such\ndef f(rollout, row): return 1.0",
        ],
    )
    def test_a_package_that_is_not_installed_is_named(self, tmp_path: Path, source: str) -> None:
        path = tmp_path / "p.py"
        path.write_text(source)
        with pytest.raises(
            PluginError, match=f"reward '{path}:f': {path}:[12] imports no_such, which is not installed"
        ):
            check_reward(f"{path}:f")

    @pytest.mark.parametrize(
        "source",
        [
            "from functools import partial\nf = partial(max)",
            "from os.path import join as f",
            "from os import *",
            "try: import no_such\nexcept ImportError: no_such = None\ndef f(rollout, row): return 1.0",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING: import no_such\ndef f(rollout, row): return 1.0",
            "import sys\nsys.path.insert(0, 'lib')\nimport no_such\ndef f(rollout, row): return 1.0",
            "def g():\n    import no_such\ndef f(rollout, row): return 1.0",
            "import neighbour, package.part, sys, msgspec, posttrain.records\ndef f(rollout, row): return 1.0",
        ],
    )
    def test_what_only_running_can_tell_is_let_through(self, tmp_path: Path, source: str) -> None:
        (tmp_path / "p.py").write_text(source)
        (tmp_path / "neighbour.py").touch()
        (tmp_path / "package").mkdir()
        check_reward(f"{tmp_path / 'p.py'}:f")

    def test_a_spec_is_made_of_a_name_or_a_mapping(self) -> None:
        assert RewardSpec.of("a") == RewardSpec("a")
        assert RewardSpec.of({"name": "a", "args": {"x": 1}}) == RewardSpec("a", {"x": 1})
        with pytest.raises(PluginError, match="give a name, or a mapping"):
            RewardSpec.of({"nme": "a"})

    @pytest.mark.slow
    def test_importing_the_pool_imports_no_torch(self) -> None:
        program = (
            "import sys, posttrain.scoring.pool.pool; print(sorted({'torch', 'pydantic', 'ray'} & set(sys.modules)))"
        )
        output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert output == "[]\n"


FORKS = """
import os, time
count = 0
while count < 500:
    try:
        if not os.fork():
            time.sleep(1000)
    except OSError:
        break
    count += 1
print(count)
"""


@pytest.mark.slow
class TestSandbox:
    def run(self, source: str, **limits: float) -> SandboxResult:
        return run_python(source, b"", Limits(**limits))  # type: ignore[arg-type]

    def test_this_machine_has_a_sandbox(self) -> None:
        assert find_sandbox() in ("namespaces", "bubblewrap")

    def test_input_output_and_exit_code(self) -> None:
        result = run_python("import sys\nprint(input() + '!')\nprint('e', file=sys.stderr)\nsys.exit(7)", b"hello\n")
        assert (result.stdout, result.stderr, result.exit_code, result.limit) == (b"hello!\n", "e", 7, "")

    def test_a_program_has_no_network(self) -> None:
        """A listener of ours on the loopback interface cannot be reached either."""
        import socket

        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), 5).close()
            result = self.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
        assert result.exit_code == 1
        assert "Error" in result.stderr

    def test_a_program_sees_no_files_of_the_host(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("x")
        paths = [str(secret), os.path.abspath(__file__), "/etc/passwd", "/proc/1/environ", os.path.expanduser("~/.ssh")]
        result = self.run(f"import os\nprint([path for path in {paths!r} if os.path.exists(path)])")
        assert result.stdout == b"[]\n"

    @pytest.mark.parametrize("path", ["/usr/x", "/x", "/lib/x", "/dev/x"])
    def test_nothing_can_be_written_but_tmp(self, path: str) -> None:
        assert self.run("open('/tmp/x', 'w').write('1')").exit_code == 0
        assert self.run(f"open({path!r}, 'w').write('1')").exit_code == 1
        assert not Path(path).exists()

    def test_a_program_sees_no_environment_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET_TOKEN", "1")
        assert b"SECRET_TOKEN" not in self.run("import os\nprint(dict(os.environ))").stdout

    def test_a_program_over_the_memory_limit_is_ended(self) -> None:
        assert self.run("x = bytearray(1 << 30)").limit == "memory"

    def test_a_program_over_the_wall_or_cpu_time_is_ended(self) -> None:
        assert self.run("import time\ntime.sleep(1000)", wall_s=0.5).limit == "wall"
        assert self.run("while True: pass", cpu_s=1, wall_s=30).limit == "cpu"

    def test_a_program_over_the_output_limit_is_ended_and_its_output_cut(self) -> None:
        result = self.run("while True: print('x' * 1000)", output_bytes=10_000)
        assert (result.limit, len(result.stdout)) == ("output", 10_000)

    def test_endless_words_to_stderr_do_not_stop_the_clock(self) -> None:
        source = "import os, time\nwhile True:\n    os.write(2, b'x')\n    time.sleep(0.001)"
        assert self.run(source, wall_s=1.0).limit == "wall"

    def test_a_program_over_the_disk_limit_gets_an_error(self) -> None:
        result = self.run("f = open('/tmp/f', 'wb')\nwhile True: f.write(bytes(1 << 16))", disk_mib=4)
        assert (result.limit, "OSError" in result.stderr) == ("disk", True)

    def test_a_fork_bomb_is_limited(self) -> None:
        result = self.run(FORKS, num_processes=16)
        assert 0 < int(result.stdout.split()[-1]) <= 16
        assert self.run("import os, time\nwhile os.fork(): pass\ntime.sleep(100)").limit == "processes"

    def test_a_limit_that_the_program_lived_with_is_none(self) -> None:
        source = "import traceback\ntry: x = bytearray(1 << 40)\nexcept MemoryError: traceback.print_exc()"
        result = self.run(source)
        assert (result.exit_code, result.limit, "MemoryError" in result.stderr) == (0, "", True)

    def test_killed_from_outside_is_no_fault_of_the_program(self) -> None:
        """Then nothing is known of it: an error, not a result."""
        find_sandbox()
        before = set(psutil.Process().children())

        def kill() -> None:
            deadline = time.monotonic() + 20.0
            while time.monotonic() < deadline and killing.is_set():
                time.sleep(0.02)
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in set(psutil.Process().children()) - before:
                        if any(inner.cmdline()[-1:] == ["/tmp/main.py"] for inner in [child, *child.children(True)]):
                            child.kill()
                            return

        killing = threading.Event()
        killing.set()
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with pytest.raises(SandboxError, match="killed by SIGKILL"):
                self.run("import time\ntime.sleep(1000)", wall_s=30.0)
        finally:
            killing.clear()
            killer.join()

    def test_cannot_kill_outside(self) -> None:
        source = (
            f"import os\nfor pid in ({os.getpid()}, -1):\n    try: os.kill(pid, 9)\n    except OSError as e: print(e)"
        )
        result = self.run(source)
        assert result.exit_code == 0
        assert result.stdout.count(b"No such process") == 2

    def test_cannot_undo_its_isolation(self) -> None:
        source = """
            import ctypes, os
            libc = ctypes.CDLL(None)
            libc.mount(None, b"/usr", None, 0x1000 | 0x20, None)
            libc.umount2(b"/usr", 2)
            print(os.getuid() != 0)
            open("/usr/x", "w")
        """
        result = self.run(textwrap.dedent(source))
        assert result.stdout == b"True\n"
        assert "Read-only" in result.stderr or "Permission" in result.stderr
