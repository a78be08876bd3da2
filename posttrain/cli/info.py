"""The commands that only read, and start no stage: they describe a config, a model, this machine or a run."""

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.stages import Overrides, RunDirOption
from posttrain.errors import ConfigError

info_app = typer.Typer()
ledger_app = typer.Typer(no_args_is_help=True, help="What became of every prompt group of an RL stage.")


@info_app.command()
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


@info_app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PIPELINE",
            help="YAML of sizes, config.json, model folder, or a bundled name: llama4-scout. With --cluster: a "
            "pipeline with an RL stage, or its config.",
        ),
    ],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs; the same as parallel.processes=N.")] = None,
    *,
    gpu_gib: Annotated[list[float] | None, typer.Option(help="Memory of a GPU, GiB; may be repeated.")] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Forecast how fast RL runs on the cluster of this file.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="With --cluster: take costs and replies from a run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count a model's parameters and the memory that training it takes, from its config alone. No weights are read.

    Prints parameters by part, memory of each GPU by part in one layout, and every layout with whether it fits.
    Bundled models: llama4-scout, llama4-maverick, llama4-behemoth.

    KEY=VALUE: parallel.processes, parallel.expert, parallel.zero, parallel.offload, lora, dtype, tokens (of one
    forward), gradient_checkpointing, kv_sequences, kv_length, reserve (share of a GPU left free).

    Examples:

      posttrain plan llama4-scout --gpus 64 parallel.expert=16 parallel.zero=2

      posttrain plan llama4-scout --gpus 8 parallel.expert=8 'lora={rank: 16}'

      posttrain plan models/mine/config.json --gpus 8 --gpu-gib 80 tokens=4096

      posttrain plan llama4-behemoth --gpus 1024 parallel.offload=optimizer --json

    With --cluster it simulates an RL stage on a cluster, asynchronous and with models that take turns: seconds of a
    step, tokens/s and idle share of each model, staleness, memory, cost, the bottleneck, and what would help. KEY=VALUE
    are those of `posttrain run`.

      posttrain plan scale/scout-8/rl --cluster scale/scout-8/cluster

      posttrain plan quickstart --cluster mine.yaml --calibrate runs/quickstart
    """
    import json

    if cluster is not None:
        from posttrain.cli.forecast import print_forecast

        print_forecast(model, overrides or [], cluster, calibrate=calibrate, as_json=as_json)
        return
    if calibrate is not None:
        raise ConfigError("--calibrate", ["needs --cluster FILE: it replaces the costs of a forecast"])

    from posttrain.config.base import apply_overrides, validate_config
    from posttrain.planning.config import PlanConfig

    given = [*(overrides or []), *([f"parallel.processes={gpus}"] if gpus else [])]
    asked = validate_config(PlanConfig, apply_overrides(PlanConfig().model_dump(), given), "plan")
    if any(not size > 0 for size in gpu_gib or []):
        raise ConfigError("--gpu-gib", [f"got {gpu_gib}; it must be positive"])
    from posttrain.planning.sizes import count_sizes, find_model, read_config
    from posttrain.planning.text import render, to_json

    sizes = count_sizes(read_config(find_model(model)), asked.lora)
    shown = to_json if as_json else render
    found = shown(model, sizes, asked, gpu_gib=gpu_gib or [80.0, 141.0])
    typer.echo(json.dumps(found, indent=2) if as_json else found)


@info_app.command()
def schema(stage: Annotated[str, typer.Argument(help="base, filter, sft, rl, dpo, eval, or pipeline.")]) -> None:
    """Print the JSON schema of a stage's config, with which editors complete and check YAML.

    Example: posttrain schema rl > rl.schema.json
    """
    import json

    from posttrain.cli.check import schema_of

    typer.echo(json.dumps(schema_of(stage).model_json_schema(), indent=2))


@info_app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Check what is installed and what works on this machine, and say how to fix the rest."""
    from posttrain.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json))


@info_app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)],
) -> None:
    """Write report.html of a run again, and print its path. Example: posttrain report runs/quickstart"""
    if not (run_dir / "pipeline.yaml").exists() and not (run_dir / "summary.json").exists():
        raise ConfigError(str(run_dir), ["is not a run directory: it has no pipeline.yaml"])
    from posttrain.report import write_report

    typer.echo(write_report(run_dir))


@info_app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run, of a stage, or of an evaluation.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The same, for the evaluation to compare with.")],
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="NAME", help="The evaluated stage. If given twice: of A, then of B."),
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

    Compares the ledger with the archived rollouts, and each commit with its checkpoint. Exits with 3 if they disagree.

    Example: posttrain ledger audit runs/quickstart
    """
    from posttrain.cli.audit import print_audits

    raise typer.Exit(print_audits(run_dir, as_json))
