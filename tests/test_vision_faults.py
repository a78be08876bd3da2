"""An RL run on prompts with pictures in which every kind of process is killed once."""

from random import Random

import pytest
from chaos_run import ChaosRun, write_stage
from kills import kill_each
from vision_folder import REWARD, write_picture_prompts
from vision_models import save_vision_policy

from posttrain.rl.history.audit import audit_stage
from posttrain.rl.history.recorded import read_rollouts

DEADLINE_S = 150.0
SURVIVED = (
    ("engine_core", "reserved"),
    ("rollout_actor", "reserved"),
    ("reward_process", "generated"),
    ("reward_actor", "generated"),
    ("trainer_rank", "trained"),
)
RESUMED = (("controller", "commit"), ("ray", "scored"))
IDS = "    ids = rollout.token_ids\n"
SLOW = "import time\n" + REWARD.replace(IDS, f"{IDS}    time.sleep(0.02 * (ids[0] % 5))\n")


@pytest.mark.slow
@pytest.mark.full  # test_rl_faults.py does so with text
@pytest.mark.timeout(900)
def test_one_kill_of_every_victim_in_a_run_with_pictures(tmp_path):
    assert "sleep" in SLOW
    (tmp_path / "reward.py").write_text(SLOW)
    folder = write_stage(
        tmp_path / "rl",
        save_vision_policy(tmp_path / "policy"),
        steps=40,
        prompts={"path": str(write_picture_prompts(tmp_path, 12))},
        reward={"name": f"{tmp_path}/reward.py:even_share", "workers": 2, "timeout_s": 30},
        images={},
        engine={"max_model_len": 256, "kv_cache_gib": 0.1, "deadline_s": 20, "stream_interval": 8},
        trainer_restarts=1,
        checkpoint_every=3,
    )
    run = ChaosRun(folder, Random(0))
    try:
        run.start()
        kill_each(run, SURVIVED, "survived", within_s=DEADLINE_S)
        kill_each(run, RESUMED, "resumed", within_s=DEADLINE_S)
        assert run.finish(DEADLINE_S) == 0
        assert run.orphans() == []
        audit = audit_stage(folder)
        assert audit.is_clean, audit.problems
        assert audit.totals["steps"] == 40
        assert any(item.rollout.prompt.media for item in read_rollouts(folder) if item.status == "trained")
        replayed = run.replay(DEADLINE_S)
        assert replayed["batches_equal"]
        assert replayed["weights_equal"], replayed
    finally:
        run.close()
