"""An RL run in which every kind of process is killed once: it recovers or is continued, and no group is lost.

`benchmarks/chaos.py` does the same for every victim, signal and state of the groups.
"""

import asyncio
import os
import signal
import threading
from random import Random

import pytest
import ray
from chaos_run import ChaosRun, save_policy, write_stage
from kills import kill_each

from posttrain.config.resources import TrainerResources
from posttrain.config.training import ParallelConfig
from posttrain.errors import StageError, TrainerLostError
from posttrain.files import read_jsonl
from posttrain.parallel.ranks import RankGroup
from posttrain.rl.history.audit import audit_stage

DEADLINE_S = 150.0
SURVIVED = (("reward_process", "generated"), ("reward_actor", "generated"), ("trainer_rank", "trained"))
RESUMED = (("controller", "commit"), ("ray", "scored"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_kill_of_every_victim_loses_nothing_and_trains_nothing_twice(tmp_path):
    folder = write_stage(
        tmp_path / "rl",
        save_policy(tmp_path / "policy"),
        steps=30,
        trainer_restarts=1,
        checkpoint_every=3,
        selection={"first_replies": 2},
    )
    run = ChaosRun(folder, Random(0))
    try:
        run.start()
        kill_each(run, SURVIVED, "survived", within_s=DEADLINE_S)
        events = [line["event"] for line in read_jsonl(folder / "events.jsonl")]
        assert events.count("trainer_restarted") == 1
        kill_each(run, RESUMED, "resumed", within_s=DEADLINE_S)
        assert run.finish(DEADLINE_S) == 0
        assert run.orphans() == []
        assert run.lives == 1 + len(RESUMED)
        audit = audit_stage(folder)
        assert audit.is_clean, audit.problems
        assert audit.totals["steps"] == 30
        assert audit.totals["steps_rolled_back"] > 0
        assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == list(range(30))
        # What the kills left of the run is one line of steps: trained again from the archive, it gives these weights.
        replayed = run.replay(DEADLINE_S)
        assert replayed["batches_equal"]
        assert replayed["weights_equal"], replayed
    finally:
        run.close()


@pytest.mark.slow
def test_nobody_waits_for_ever_for_a_rank(ray_session):
    group = RankGroup(ParallelConfig(), TrainerResources(cpus=0.5), threading.Event, deadline_s=2.0)
    try:
        with pytest.raises(StageError, match="the training was lost in wait: 1 of 1 ranks did not finish wait in 2 s"):
            group.get("wait")
        with pytest.raises(StageError, match="the training was lost in wait: 1 of 1 ranks did not finish wait in 2 s"):
            asyncio.run(group.call("wait"))
    finally:
        group.close()


@pytest.mark.slow
def test_a_rank_that_dies_is_told_by_its_name(ray_session):
    group = RankGroup(
        ParallelConfig(), TrainerResources(cpus=0.5), threading.Event, name="the trainer", lost=TrainerLostError
    )
    try:
        group.get("is_set")
        _, pid = ray.get(group._places[0])
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(TrainerLostError, match="the trainer was lost in is_set"):
            asyncio.run(group.call("is_set"))
        with pytest.raises(TrainerLostError, match="the trainer was lost in is_set"):
            group.get("is_set")
    finally:
        group.close()
