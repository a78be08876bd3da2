"""`posttrain rl --replay`: train again on the batches of a run, and say whether the new weights equal the old ones."""

from pathlib import Path

import typer

from posttrain.config.base import dump_yaml, load_config
from posttrain.context import StageContext
from posttrain.errors import EXIT_FAILED, EXIT_OK, ConfigError
from posttrain.pipeline.ray_session import ray_session
from posttrain.rl.config import RlConfig
from posttrain.rl.history.recovery import rl_stages
from posttrain.rl.history.replay import replay, seed_of


def replay_run(run_dir: Path, target: Path) -> int:
    """Replay every RL stage of a run, each into its own folder of `target`; returns the exit code."""
    equal = True
    for stage in rl_stages(run_dir):
        if not (stage / "config.yaml").exists():
            raise ConfigError(str(stage), ["has no config.yaml: it is not the folder of an RL stage that has run"])
        config = load_config(RlConfig, stage / "config.yaml")
        folder = target / stage.name
        if (folder / "metrics.jsonl").exists():
            raise ConfigError(str(folder), ["holds a replay already; remove it, or give another --run-dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_yaml(config))
        context = StageContext(stage.name, folder, target / "events.jsonl", seed=seed_of(stage))
        with ray_session():
            found = replay(config, context, stage)
        gap, why_not = found.get("largest_gap", 0.0), found.get("why_not")
        weights = {True: "equal", False: f"differ by up to {gap:.2g}", None: f"not compared ({why_not})"}
        typer.echo(
            f"{stage}: {found['steps']} steps again; batches {'equal' if found['batches_equal'] else 'DIFFER'}, "
            f"weights {weights[found['weights_equal']]}: {folder / 'model'}"
        )
        equal = equal and found["batches_equal"] and found["weights_equal"] is not False
    return EXIT_OK if equal else EXIT_FAILED
