"""The output of `posttrain ledger audit`."""

import json
from pathlib import Path

import typer

from posttrain.errors import EXIT_FAILED, EXIT_OK
from posttrain.pipeline.rundir import DONE, is_running
from posttrain.rl.history.audit import Audit, audit_stage
from posttrain.rl.history.recovery import rl_stages


def print_audits(run_dir: Path, as_json: bool) -> int:
    """Audit every RL stage of a run and print the results. Returns the exit code."""
    audits = [audit_stage(stage) for stage in rl_stages(run_dir)]
    if as_json:
        found = [
            {
                "stage": str(item.stage),
                "state": _state(item.stage),
                "clean": item.is_clean,
                "totals": item.totals,
                "problems": item.problems,
            }
            for item in audits
        ]
        typer.echo(json.dumps(found, indent=2))
    else:
        for item in audits:
            typer.echo(_text(item))
    return EXIT_OK if all(item.is_clean for item in audits) else EXIT_FAILED


def _state(stage: Path) -> str:
    if (stage / DONE).exists():
        return "finished"
    return "running" if is_running(stage.parent) else "not finished"


def _text(audit: Audit) -> str:
    width = max(map(len, audit.totals))
    state = _state(audit.stage)
    so_far = "" if state == "finished" else f" so far; the stage is {state}"
    lines = [f"{audit.stage}: {'clean' if audit.is_clean else 'NOT CLEAN'}{so_far}"]
    lines += [f"  {name:<{width}}  {count}" for name, count in audit.totals.items()]
    lines += [f"  problem: {problem}" for problem in audit.problems]
    return "\n".join(lines)
