"""A run that is killed before any write to the disk: its audit is clean as it stands, and when it was continued."""

import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL

import pytest

STEPS = 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asynchronous", "deterministic"])
def test_ledger_and_rollouts_agree_whenever_a_run_is_killed(tmp_path, kind):
    script = Path(__file__).with_name("ledger_lives.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), kind],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    found = json.loads(done.stdout)[kind]
    for run in (*found["first"], *found["second"]):
        assert set(run["codes"][:-1]) <= {0, -SIGKILL}
        assert run["codes"][-1] == 0, run
        assert [audit["problems"] for audit in run["audits"]] == [[]] * len(run["audits"]), run
        totals = run["audits"][-1]["totals"]
        assert (totals["steps"], totals["committed"], totals["steps_unrecorded"]) == (STEPS, 2 * STEPS, 0)
    # Kills came between the archive and the ledger: at a new step, and after several steps were undone.
    assert {run["audits"][0]["totals"]["steps_unrecorded"] for run in found["first"]} == {0, 1}
    assert max(run["audits"][1]["totals"]["steps_unrecorded"] for run in found["second"]) > 1
