"""The `posttrain` command. Each command is a thin layer over the package; heavy imports wait until one needs them.

Exit codes: 0 done; 2 the input is wrong; 3 the run failed and can be resumed; 130 interrupted, resumable.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli import prune  # noqa: F401  (adds its commands to data_app)
from posttrain.cli.data import data_app
from posttrain.cli.rewards import rewards_app
from posttrain.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, ConfigError, PosttrainError

# What typer raises for wrong arguments. It carries its own copy of click, so click's class by import is another one.
UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="posttrain",
    help="The post-training recipe behind Llama 4: judge filter, light SFT, asynchronous online RL, light DPO.",
    epilog="First steps: [bold]posttrain doctor[/], then [bold]posttrain run quickstart[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(rewards_app, name="rewards")
app.add_typer(data_app, name="data")
ledger_app = typer.Typer(no_args_is_help=True, help="What became of every prompt group of an RL stage.")
app.add_typer(ledger_app, name="ledger")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Set any field; values are YAML.")
]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run is kept.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and start nothing.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace finished results and unfinished work of another config; else a run asks or refuses.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the run.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Config of the stage.", show_default=False)]


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="A YAML file, or a bundled name: quickstart.")],
    overrides: Overrides = None,
    run_dir: RunDirOption = None,
    *,
    start_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage, and what needs it, again.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Run this stage and no other.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Run a pipeline, or continue an earlier run of it.

    A stage whose config, inputs and code have not changed is skipped, and one with more steps or epochs goes on. Any
    other change of a finished stage asks first. After Ctrl-C or a failure the same command continues the run. In an
    override the first part of the key is the stage's name.

    Examples:

      posttrain run quickstart

      posttrain run quickstart rl.steps=10 seed=1 --run-dir runs/short

      posttrain run my.yaml --from rl
    """
    from posttrain.cli.check import read_pipeline_file
    from posttrain.cli.runs import run_or_plan

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
    app.command(name=kind)(command)


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


@app.command()
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

    Generation and training run at the same time; weights are handed over in flight. After a crash the same command
    goes on from the last commit; after the end, one with more steps does. With --replay the batches of a run are
    trained on again, without an engine, and the weights are compared with the run's own: on a CPU they are equal, bit
    for bit.

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


@app.command()
def validate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A pipeline or a stage's config.", show_default=False)],
    overrides: Overrides = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Kind of a stage's config; guessed if not given.")] = None,
    *,
    run_dir: RunDirOption = None,
) -> None:
    """Check a pipeline or a stage's config, report every problem, and print the resolved plan. Nothing is started.

    Examples:

      posttrain validate quickstart

      posttrain validate sft.yaml --kind sft
    """
    from posttrain.cli.check import read_any
    from posttrain.cli.runs import print_plan

    raw = read_any(file, overrides or [], kind)
    print_plan(raw, run_dir)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="YAML of sizes, config.json, model folder, or a bundled name: llama4-scout."
        ),
    ],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs; the same as parallel.processes=N.")] = None,
    *,
    gpu_gib: Annotated[list[float] | None, typer.Option(help="Memory of a GPU, GiB; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count a model's parameters and the memory that training it takes, from its config alone. No weights are read.

    Prints parameters by part, memory of each GPU by part in one layout, and every layout with whether it fits.
    Bundled models: llama4-scout, llama4-maverick, llama4-behemoth.

    KEY=VALUE: parallel.processes, parallel.expert, parallel.zero, parallel.offload, dtype, tokens (of one forward),
    gradient_checkpointing, kv_sequences, kv_length, reserve (share of a GPU left free).

    Examples:

      posttrain plan llama4-scout --gpus 64 parallel.expert=16 parallel.zero=2

      posttrain plan models/mine/config.json --gpus 8 --gpu-gib 80 tokens=4096

      posttrain plan llama4-behemoth --gpus 1024 parallel.offload=optimizer --json
    """
    import json

    from posttrain.config.base import apply_overrides, validate_config
    from posttrain.planning.config import PlanConfig

    given = [*(overrides or []), *([f"parallel.processes={gpus}"] if gpus else [])]
    asked = validate_config(PlanConfig, apply_overrides(PlanConfig().model_dump(), given), "plan")
    if any(not size > 0 for size in gpu_gib or []):
        raise ConfigError("--gpu-gib", [f"got {gpu_gib}; it must be positive"])
    from posttrain.planning.sizes import count_sizes, find_model, read_config
    from posttrain.planning.text import render, to_json

    sizes = count_sizes(read_config(find_model(model)))
    shown = to_json if as_json else render
    found = shown(model, sizes, asked, gpu_gib=gpu_gib or [80.0, 141.0])
    typer.echo(json.dumps(found, indent=2) if as_json else found)


@app.command()
def schema(stage: Annotated[str, typer.Argument(help="base, filter, sft, rl, dpo, eval, or pipeline.")]) -> None:
    """Print the JSON schema of a stage's config.

    Editors complete and check YAML with it. Example: posttrain schema rl > rl.schema.json
    """
    import json

    from posttrain.cli.check import schema_of

    typer.echo(json.dumps(schema_of(stage).model_json_schema(), indent=2))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Say what is installed, what works on this machine, and how to fix what does not."""
    from posttrain.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json))


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
) -> None:
    """Write report.html of a run again, and print its path. Example: posttrain report runs/quickstart"""
    if not (run_dir / "pipeline.yaml").exists() and not (run_dir / "summary.json").exists():
        raise ConfigError(str(run_dir), ["is not a run directory: it has no pipeline.yaml"])
    from posttrain.report import write_report

    typer.echo(write_report(run_dir))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run, of a stage, or of an evaluation.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The same, of what is compared with it.")],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help="The evaluated stage; given twice: that of A, then that of B."),
    ] = None,
    *,
    shared: Annotated[bool, typer.Option("--shared", help="Compare only the rows that both have.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two evaluations of the same rows, row by row: McNemar's exact test and paired bootstrap intervals.

    Examples:

      posttrain compare runs/mild runs/strong --stage sft

      posttrain compare runs/quickstart runs/quickstart --stage sft --stage rl
    """
    if len(stage or []) > 2:
        raise ConfigError("--stage", [f"got {', '.join(stage or [])}: give it once, or twice for A and B"])
    from posttrain.cli.compare import print_comparison

    print_comparison(run_a, run_b, stage or [], shared=shared, as_json=as_json)


@ledger_app.command("audit")
def ledger_audit(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run or of its RL stage.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that an RL stage lost no prompt group and trained none twice, and print the totals.

    Compares the ledger with the rollouts and the commits with what they name; exits with 3 where something is wrong.

    Example: posttrain ledger audit runs/quickstart
    """
    from posttrain.cli.audit import print_audits

    raise typer.Exit(print_audits(run_dir, as_json))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result: Any = app(arguments, standalone_mode=False, prog_name="posttrain")
        return result if isinstance(result, int) else EXIT_OK
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except UsageError as error:
        error.show(file=sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        if (option := getattr(error, "option_name", None)) is not None:
            from posttrain.cli.hints import override_hint

            print(override_hint(option, sys.argv[1:] if arguments is None else arguments), end="", file=sys.stderr)
        return EXIT_USER
    except PosttrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return EXIT_OK
    except Exception as error:
        traceback = _keep_traceback()
        print(f"posttrain: failed: {type(error).__name__}: {error}; the traceback is in {traceback}", file=sys.stderr)
        return EXIT_FAILED


def _keep_traceback() -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="posttrain-error-", suffix=".log", delete=False) as log:
        traceback.print_exc(file=log)
    return log.name


if __name__ == "__main__":
    sys.exit(main())
