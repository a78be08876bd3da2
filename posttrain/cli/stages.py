"""The commands that run something: `posttrain run`, and one command for each kind of stage.

Left out: what these commands share once their arguments are read (runs.py).
"""

from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import ConfigError

stages_app = typer.Typer()

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Set any field; values are YAML.")
]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run is kept.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and start nothing.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace finished results, and unfinished work of another config, without asking.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the run.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Config of the stage.", show_default=False)]


@stages_app.command()
def run(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="A YAML file, or a bundled name: quickstart, quickstart-vision, tools."
        ),
    ] = "",
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    *,
    start_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage, and what needs it, again.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Run this stage and no other.")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="URI", help="Continue a run that was stored there; no PIPELINE.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Run a pipeline, or continue an earlier run of it.

    A stage whose config, inputs and code have not changed is skipped. A stage that now has more steps or epochs is
    continued. Before any other change of a finished stage the command asks. After Ctrl-C or a failure the same command
    continues the run. In an override the first part of the key is the stage's name.

    Examples:

      posttrain run quickstart

      posttrain run quickstart rl.steps=10 seed=1 --run-dir runs/short

      posttrain run my.yaml --from rl

      posttrain run --resume s3://bucket/run --run-dir runs/mine
    """
    from posttrain.cli.check import read_pipeline_file
    from posttrain.cli.runs import run_or_plan, run_stored

    if resume is not None:
        run_stored(resume, run_dir, [*([pipeline] if pipeline else []), *(overrides or [])], overwrite=overwrite)
        return
    if not pipeline:
        raise ConfigError("PIPELINE", ["give a pipeline, or --resume URI"])
    raw = read_pipeline_file(pipeline, overrides or [])
    again = ["posttrain", "run", pipeline, *(overrides or [])]
    run_or_plan(raw, run_dir, dry_run, command=again, overwrite=overwrite, start_from=start_from, only=only)


def _run_stage(
    kind: str,
    config: Path,
    overrides: list[str] | None,
    *,
    run_dir: Path | None,
    overwrite: bool,
    dry_run: bool,
    seed: int,
) -> None:
    from posttrain.cli.runs import run_or_plan
    from posttrain.pipeline.config import single_stage

    raw = single_stage(kind, config, overrides or [], seed=seed)
    again = ["posttrain", kind, str(config), *(overrides or []), *(["--seed", str(seed)] if seed else [])]
    run_or_plan(raw, run_dir, dry_run, command=again, overwrite=overwrite)


def _stage_command(kind: str, summary: str, details: str) -> None:
    """Add `posttrain KIND CONFIG.yaml`, which runs a pipeline of that one stage."""

    def command(
        config: ConfigFile,
        overrides: Overrides = None,
        run_dir: RunDirOption = None,
        *,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
        seed: Seed = 0,
    ) -> None:
        _run_stage(kind, config, overrides, run_dir=run_dir, overwrite=overwrite, dry_run=dry_run, seed=seed)

    command.__doc__ = f"{summary}\n\n{details}\n\nThe run is kept in runs/{kind} unless --run-dir says otherwise."
    stages_app.command(name=kind)(command)


_stage_command(
    "filter",
    "Rate every example with a judge model and keep the hardest.",
    "Writes kept.jsonl and dropped.jsonl, each row with its tag and score.\n\n"
    "Example: posttrain filter filter.yaml keep_fraction=0.3",
)
_stage_command(
    "sft",
    "Light supervised fine-tuning on the assistant turns of conversations.",
    "Example: posttrain sft sft.yaml optimizer.learning_rate=1e-5 model.path=models/scout",
)


@stages_app.command()
def rl(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Config of the stage.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    *,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    seed: Seed = 0,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", metavar="RUN_DIR", help="Train again on the batches of this run; no CONFIG.yaml."),
    ] = None,
) -> None:
    """Asynchronous online reinforcement learning on prompts and a reward.

    Sampling and training run at the same time, and new weights reach the engines while they sample. After a crash the
    same command continues from the last commit. A finished run is continued by the same command with more steps. With
    --replay, a trainer without engines trains again on the batches of a run, and its weights are compared with those of
    the run: on a CPU they are equal, bit for bit.

    Examples:

      posttrain rl rl.yaml reward.name=my_rewards.py:exact steps=200

      posttrain rl --replay runs/rl

    The run is kept in runs/rl (a replay in runs/replay) unless --run-dir says otherwise.
    """
    if replay is not None:
        if config is not None:
            raise ConfigError("--replay", [f"got {config} too; a replay takes the config of the run itself"])
        from posttrain.cli.replay import replay_run

        raise typer.Exit(replay_run(replay, run_dir or Path("runs") / "replay"))
    if config is None:
        raise ConfigError("posttrain rl", ["CONFIG.yaml is missing; or give --replay RUN_DIR"])
    _run_stage("rl", config, overrides, run_dir=run_dir, overwrite=overwrite, dry_run=dry_run, seed=seed)


_stage_command(
    "dpo",
    "Light preference optimisation, on given pairs or on pairs mined from an RL stage's rollouts.",
    "Example: posttrain dpo dpo.yaml rollouts=runs/rl/rl/rollouts",
)
_stage_command(
    "eval",
    "Measure a policy: greedy accuracy, pass@1 and pass@k by capability, with 95% intervals.",
    "Writes results.json.\n\nExample: posttrain eval eval.yaml model.path=runs/rl/rl/model",
)
