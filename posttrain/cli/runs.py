"""What all commands that run stages share: the plan, the question before a result is replaced, the final lines."""

import shlex
import sys
from pathlib import Path

import typer

from posttrain.errors import ConfigError
from posttrain.pipeline.config import RawPipeline


def run_or_plan(
    raw: RawPipeline,
    run_dir: Path | None,
    dry_run: bool,
    *,
    command: list[str],
    overwrite: bool,
    start_from: str | None = None,
    only: str | None = None,
) -> None:
    """Run a pipeline and write its report. With `dry_run`, only print its plan.

    command: the words that the user typed, without options; they are shown as the command that continues the run. The
    other arguments are those of `run_pipeline`.
    """
    if dry_run:
        print_plan(raw, run_dir, start_from=start_from, only=only)
        return
    from posttrain.cli.display import make_display
    from posttrain.pipeline.run import run_pipeline

    place = (run_dir or Path("runs") / raw.config.name).expanduser()
    again = shlex.join([*command, *(["--run-dir", str(place)] if run_dir else [])])
    try:
        summary = run_pipeline(
            raw,
            place,
            start_from=start_from,
            only=only,
            overwrite=overwrite,
            ask=_ask if sys.stdin.isatty() and sys.stderr.isatty() else None,
            display=make_display(),
            report=_write_report,
            command=again,
        )
    except KeyboardInterrupt as error:
        _say("\n".join(["interrupted. Finished stages are kept. To continue: " + again, *map(str, error.args)]))
        raise
    skipped = sum(stage["status"] == "skipped" for stage in summary.stages)
    note = f" ({skipped} of {len(summary.stages)} stages skipped: nothing had changed)" if skipped else ""
    typer.echo(f"done in {summary.wall_s:.0f} s{note}, peak memory {summary.peak_rss_gib:.1f} GiB: {place}")
    if (place / "report.html").exists():
        typer.echo(place / "report.html")


def run_stored(uri: str, run_dir: Path | None, overrides: list[str], *, overwrite: bool) -> None:
    """Bring a run here that was stored at a URI, and continue it."""
    from posttrain.pipeline.config import read_pipeline
    from posttrain.pipeline.storing import resume_run

    if any("=" not in item for item in overrides):
        raise ConfigError("--resume", [f"got {overrides[0]!r} too; the stored run has its pipeline, so give none"])
    if "://" not in uri:
        uri = str(Path(uri).expanduser().absolute())  # the current directory becomes that of the run
    place = resume_run(uri, run_dir)
    _say(f"the run is in {place} now")
    raw = read_pipeline(place / "pipeline.yaml", [*overrides, f"storage={uri}"])
    again = ["posttrain", "run", str(place / "pipeline.yaml"), *overrides]
    run_or_plan(raw, place, False, command=again, overwrite=overwrite)


def _write_report(run_dir: Path) -> None:
    """Write the report of a run directory.

    An error in the report must not hide how the run ended, so it is only printed.
    """
    if not (run_dir / "summary.json").exists() or isinstance(sys.exc_info()[1], KeyboardInterrupt | ConfigError):
        return
    try:
        from posttrain.report import write_report

        write_report(run_dir)
    except Exception as error:
        _say(f"the report could not be written: {type(error).__name__}: {error}")


def _ask(question: str) -> bool:
    return typer.confirm(question, err=True)


def print_plan(
    raw: RawPipeline, run_dir: Path | None, *, start_from: str | None = None, only: str | None = None
) -> None:
    """Print the resolved plan, and what would happen to each stage in the run directory."""
    from posttrain.pipeline.decide import decide
    from posttrain.pipeline.graph import load_pipeline
    from posttrain.pipeline.plan import check_fits, local_cpus, local_gpus, make_plan, render_plan
    from posttrain.pipeline.ray_session import joins_cluster
    from posttrain.pipeline.references import find_references
    from posttrain.pipeline.rendering import check_rendering
    from posttrain.pipeline.run_place import check_place
    from posttrain.pipeline.rundir import RunDir

    pipeline = load_pipeline(raw)
    place = RunDir(run_dir or Path("runs") / pipeline.name)
    plan = make_plan(pipeline, place.path)
    if not joins_cluster():
        check_fits(plan, pipeline.source, cpus=local_cpus(), gpus=local_gpus())
    check_place(place, pipeline)
    check_rendering(pipeline)
    refers = any(any(find_references(node.config.model_dump())) for node in pipeline.nodes.values())
    decisions = None  # unknown for a stage's file that refers to other stages of a pipeline, which are not read
    if not (raw.open_references and refers):
        decisions = decide(pipeline, place, start_from=start_from, only=only)
    typer.echo(render_plan(pipeline, plan, decisions, run_dir=place.path))


def _say(message: str) -> None:
    print(f"posttrain: {message}", file=sys.stderr)
