"""Runs a pipeline: checks it, decides which stages to run, runs them on Ray, and leaves a resumable run directory.

    load_pipeline ─► decide (what changed) ─► consent ─► Ray ─► Scheduler ─► summary.json ─► report.html

Every mistake that the user can correct is found before Ray starts. There are no automatic retries of a stage: the same
command starts a failed stage again, and it continues from its last checkpoint.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from posttrain.config.resources import HostChoice
from posttrain.context import StageContext
from posttrain.errors import ConfigError, PosttrainError, StageError, UserError
from posttrain.files import OUT_OF_SPACE
from posttrain.hosts.placement import check_choices
from posttrain.pipeline.config import RawPipeline
from posttrain.pipeline.decide import Decision, decide, default_run_dir
from posttrain.pipeline.graph import Pipeline, load_pipeline
from posttrain.pipeline.inputs import find_endpoints, walk
from posttrain.pipeline.memory import MemorySampler
from posttrain.pipeline.packages import needed_packages
from posttrain.pipeline.plan import check_fits, local_cpus, local_gpus, make_plan
from posttrain.pipeline.ray_session import joins_cluster, ray_session
from posttrain.pipeline.rendering import check_rendering
from posttrain.pipeline.replace import Ask, delete_kept, kept, kept_text, move_aside, require_consent
from posttrain.pipeline.run_place import check_place
from posttrain.pipeline.rundir import RunDir
from posttrain.pipeline.schedule import Scheduler
from posttrain.pipeline.storing import Storing, stored
from posttrain.pipeline.summary import Summary, SummaryWriter


class Display(Protocol):
    """Shows a run while it is running. It reads everything that it shows from events.jsonl."""

    def start(self, nodes: Sequence[tuple[str, str]], events: Path) -> None:
        """Begin to show these nodes, given as (name, kind), and to follow the file of events from its present end."""

    def refresh(self) -> None:
        """Show the new events. Called a few times a second."""

    def stop(self) -> None:
        """Show the last events and end."""


class _Silent:
    """Shows nothing."""

    def start(self, nodes: Sequence[tuple[str, str]], events: Path) -> None: ...
    def refresh(self) -> None: ...
    def stop(self) -> None: ...


class _Checked:
    """A display that also looks whether the run may go on, as often as it is refreshed."""

    def __init__(self, display: Display, storing: Storing | None):
        self._display = display
        self._storing = storing
        self.start, self.stop = display.start, display.stop

    def refresh(self) -> None:
        """Raises StageError if the run is held by another host."""
        if self._storing is not None:
            self._storing.check()
        self._display.refresh()


def run_pipeline(
    source: str | Path | Mapping[str, object] | RawPipeline,
    run_dir: str | Path | None = None,
    *,
    start_from: str | None = None,
    only: str | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    ask: Ask | None = None,
    display: Display | None = None,
    report: Callable[[Path], None] | None = None,
    command: str = "",
) -> Summary:
    """Run a pipeline to its end. Returns the content of its summary.json.

    source: a YAML file, the name of a bundled pipeline, a mapping with the keys of a pipeline's YAML, or the result of
    `single_stage`. run_dir: None for runs/NAME. start_from: run this stage again, and all stages that need it. only:
    run no other stage. overrides: such as "rl.steps=50". overwrite: allow that finished results, and unfinished work
    of another config, are replaced; otherwise `ask` asks the user, and without `ask` such a run is refused. report: is
    called at the end with the run directory, before that is copied to the storage for the last time. command: the
    command with which the user can continue this run, for error messages.

    Raises UserError (exit code 2) before anything starts, or if a stage finds a wrong row or plug-in; StageError (3) if
    a stage failed; KeyboardInterrupt (130). After an error of a stage or an interrupt, the same call continues the run.
    """
    pipeline = load_pipeline(source, overrides)
    place = RunDir(run_dir or default_run_dir(pipeline))
    command = command or shlex.join(["posttrain", "run", pipeline.source, "--run-dir", str(place.path), *overrides])
    plan = make_plan(pipeline, place.path)
    if not joins_cluster():
        check_fits(plan, pipeline.source, cpus=local_cpus(), gpus=local_gpus())
    try:
        check_place(place, pipeline)
        decisions = decide(pipeline, place, start_from=start_from, only=only)
        require_consent(place, decisions, overwrite=overwrite, ask=ask)
        _check_endpoints(pipeline, decisions)
        _check_later_stages(pipeline, decisions)
        with place.open(pipeline), stored(pipeline, place) as storing:
            shown = _Checked(display or _Silent(), storing)
            try:
                return _run(pipeline, place, decisions, display=shown, command=command)
            finally:
                if report is not None:
                    report(place.path)
    except OSError as error:
        raise StageError(f"{_os_error(error)}\n{_resume(command)}{kept_text(pipeline, place)}") from error


def _check_later_stages(pipeline: Pipeline, decisions: Mapping[str, Decision]) -> None:
    """Check that stages which wait for others can render their rows. A stage that starts at once checks that itself."""
    todo = [node for name, node in pipeline.nodes.items() if decisions[name].to_do]
    check_rendering(pipeline, [node for node in todo if any(decisions[name].to_do for name in node.needs)])


def _check_endpoints(pipeline: Pipeline, decisions: Mapping[str, Decision]) -> None:
    """Check that the judges at endpoints answer, before stages run for hours. Raises ConfigError if one does not."""
    found = [
        (node, endpoint)
        for name, node in pipeline.nodes.items()
        if decisions[name].to_do
        for _, endpoint in find_endpoints(node.config)
    ]
    if not found:
        return
    from posttrain.judging.preflight import check_server

    for node, endpoint in found:
        try:
            check_server(endpoint)
        except UserError as error:
            raise ConfigError(pipeline.source, [f"{node.prefix}{error}"]) from None


def _run(
    pipeline: Pipeline, place: RunDir, decisions: Mapping[str, Decision], *, display: Display, command: str
) -> Summary:
    summary = SummaryWriter(pipeline, place, command)
    todo = [pipeline.nodes[name] for name, item in decisions.items() if item.to_do]
    moved = move_aside(pipeline, place, decisions)
    place.forget_events({node.name for node in todo if decisions[node.name].action == "run"})
    display.start([(name, node.kind) for name, node in pipeline.nodes.items()], place.events)
    sampler = MemorySampler()
    status = "failed"
    try:
        with sampler:
            _note_moved(pipeline, place, moved)
            _note_skipped(pipeline, place, decisions, summary=summary)
            display.refresh()
            summary.write("interrupted", sampler.peak_gib)
            if todo:
                _execute(pipeline, place, decisions, summary=summary, sampler=sampler, display=display)
        status = "done"
    except KeyboardInterrupt as error:
        status = "interrupted"
        error.args = tuple(filter(None, [kept_text(pipeline, place).lstrip("\n")]))
        raise
    except PosttrainError as error:
        end = kept_text(pipeline, place)
        error.args = (f"{error}\n{_resume(command)}{end}",) if not isinstance(error, ConfigError) else error.args
        raise
    finally:
        result = _write_last(summary, status, sampler.peak_gib)
        _note_end(place, status)
        display.stop()
    if result is None:
        end = f"{_resume(command)}{kept_text(pipeline, place)}"
        raise StageError(f"{place.summary} could not be written (is the disk full?)\n{end}")
    return result


def _execute(
    pipeline: Pipeline,
    place: RunDir,
    decisions: Mapping[str, Decision],
    *,
    summary: SummaryWriter,
    sampler: MemorySampler,
    display: Display,
) -> None:
    plan = make_plan(pipeline, place.path)
    with ray_session() as session:
        check_fits(plan, pipeline.source, cpus=session.cpus, gpus=session.gpus)
        todo = [node for name, node in pipeline.nodes.items() if decisions[name].to_do]
        if not session.local:
            check_choices(
                {f"{node.prefix}{key}": section for node in todo for key, section in walk(node.config)
                 if isinstance(section, HostChoice)},
                {f"{step.key}.trainer": actor.workers for step in plan for actor in step.actors
                 if actor.role == "trainer"},
            )  # fmt: skip
        if any("vllm" in needed_packages(node.config, node.stage_kind) for node in todo):
            from posttrain.sampling.registry import start_registry

            start_registry()

        def save() -> None:
            summary.write("interrupted", sampler.peak_gib)

        Scheduler(
            pipeline, place, decisions, plan=plan, session=session, summary=summary, save=save, refresh=display.refresh
        ).run()


def _note_moved(pipeline: Pipeline, place: RunDir, moved: Mapping[str, Path]) -> None:
    """Emit an event for each earlier result that is kept: moved by this run, or by a run that ended early."""
    for node in pipeline.nodes.values():
        for path in kept(place, node):
            context = StageContext(node.name, place.folder(node), place.events)
            context.event("earlier_kept", path=str(path), moved=moved.get(node.name) == path)


def _note_skipped(
    pipeline: Pipeline, place: RunDir, decisions: Mapping[str, Decision], *, summary: SummaryWriter
) -> None:
    for name, decision in decisions.items():
        node = pipeline.nodes[name]
        if decision.action == "skip":
            if decision.basis is not None:  # fields that do not change the result may have new values
                place.write_config(node, node.resolved(place.path, pipeline.nodes).model_dump(mode="json"))
            delete_kept(place, node)  # an earlier run may have been killed just before it deleted them
            record = place.done(node) or {}
            kept = {key: record.get(key) for key in ("wall_s", "outputs", "stats")}
            summary.add(node, "skipped", {**kept, "input_hash": decision.input_hash, "why": decision.why})
            context = StageContext(name, place.folder(node), place.events)
            context.event("stage_skipped", kind=node.kind, why=decision.why)


def _write_last(summary: SummaryWriter, status: str, peak_gib: float) -> Summary | None:
    """Write the final summary; None if it cannot be written, so that a full disk does not hide why the run ended."""
    try:
        return summary.write(status, peak_gib)
    except OSError:
        return None


def _note_end(place: RunDir, status: str) -> None:
    """Write the event `run_end`, if the disk has room for it."""
    try:
        StageContext("", place.path, place.events).event("run_end", status=status)
    except OSError:
        return


def _resume(command: str) -> str:
    return f"  Finished stages are kept. To continue: {command}"


def _os_error(error: OSError) -> str:
    what = "the disk is full, or a limit was reached" if error.errno in OUT_OF_SPACE else "cannot be written"
    return f"{error.filename or 'the run directory'}: {what}: {error.strerror}"
