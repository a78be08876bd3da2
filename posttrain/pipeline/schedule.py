"""Runs the stages of a pipeline as Ray tasks: each after the stages it needs, and side by side where resources allow.

    ready stages, in order ─► are all declared CPUs and GPUs free? ─► STARTED, Ray task ─► DONE, summary.json ─► next

A stage starts only when all resources that it declares, for itself and for its actors, are free. Otherwise two stages
could each hold half of what the other needs, and wait forever. A running stage counts with all that it may take later.
A stage that is ready but does not fit also holds back the stages behind it, so that a large stage does not wait while
small ones keep starting.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.errors import PosttrainError, StageError, UserError
from posttrain.hosts.placement import pinned_here
from posttrain.pipeline.decide import Decision
from posttrain.pipeline.doubts import doubts
from posttrain.pipeline.graph import Node, Pipeline, output_path
from posttrain.pipeline.plan import Step, trainer_resources
from posttrain.pipeline.ray_session import RaySession
from posttrain.pipeline.replace import delete_kept
from posttrain.pipeline.rundir import RunDir
from posttrain.pipeline.stage_process import StageAnswer, StageJob, run_stage
from posttrain.pipeline.summary import SummaryWriter

POLL_S = 0.2
LOG_TAIL_LINES = 200


@dataclass(frozen=True, slots=True)
class _Running:
    """A stage that is running. started: Unix time."""

    node: Node
    step: Step
    started: float


class Scheduler:
    """Runs the stages that `decide` chose, once. `refresh` is called a few times a second, `save` after each stage."""

    def __init__(
        self,
        pipeline: Pipeline,
        run_dir: RunDir,
        decisions: Mapping[str, Decision],
        *,
        plan: list[Step],
        session: RaySession,
        summary: SummaryWriter,
        save: Callable[[], None],
        refresh: Callable[[], None],
    ):
        self.pipeline = pipeline
        self.run_dir = run_dir
        self.decisions = decisions
        self.steps = {step.name: step for step in plan}
        self.session = session
        self.summary = summary
        self.save = save
        self.refresh = refresh
        self.running: dict[Any, _Running] = {}
        self.finished = {name for name, decision in decisions.items() if decision.action in ("skip", "leave out")}
        self.failures: list[PosttrainError] = []

    def run(self) -> None:
        """Run all stages. If one fails, the running ones are completed, and then the first failure is raised."""
        try:
            self._loop()
        except BaseException:
            for running in self.running.values():
                self._record(
                    running.node, "interrupted", time.time() - running.started, record={}, event="stage_interrupted"
                )
            raise
        if self.failures:
            raise self.failures[0]

    def _loop(self) -> None:
        """Start the stages that fit, wait for a task to end, record it; until no stage is left or none may start."""
        import ray

        waiting = [node for name, node in self.pipeline.nodes.items() if name not in self.finished]
        # Stages start before evaluations: the chain of stages decides how long the run takes; evaluations fill the
        # gaps.
        waiting.sort(key=lambda node: bool(node.of))
        while waiting or self.running:
            while not self.failures and (node := self._next(waiting)):
                waiting.remove(node)
                self._launch(node)
            if not self.running:
                return
            done, _ = ray.wait(list(self.running), timeout=POLL_S)
            for task in done:
                self._end(task)
            self.refresh()

    def _next(self, waiting: list[Node]) -> Node | None:
        """The first waiting stage whose needed stages are finished, if enough resources are free for it; else None."""
        node = next((node for node in waiting if self.finished.issuperset(node.needs)), None)
        if node is None:
            return None
        step = self.steps[node.name]
        used = [running.step for running in self.running.values()]
        fits = (
            step.cpus <= self.session.cpus - sum(other.held_cpus for other in used) + 1e-9
            and step.gpus <= self.session.gpus - sum(other.held_gpus for other in used) + 1e-9
        )
        return node if fits else None

    def _launch(self, node: Node) -> None:
        """Write STARTED and submit the Ray task of one stage."""
        import ray

        decision = self.decisions[node.name]
        self._make_room(self.steps[node.name])
        job = make_job(node, self.pipeline, self.run_dir)
        resumed = decision.action == "continue"
        self.run_dir.begin(node, decision.input_hash, job.config, basis=decision.basis, resume=resumed)
        self._event(node, "stage_start", kind=node.kind, resumed=resumed)
        for line in doubts(node.config):
            self._event(node, "doubtful", reason=line)
        cpus, gpus = trainer_resources(node)
        # max_calls=1 gives each stage a fresh process, so that no stage inherits imports or memory of the one before.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 1, "max_retries": 0, **pinned_here()}
        task: Any = ray.remote(**options)(run_stage)
        self.running[task.options(name=node.name).remote(job)] = _Running(node, self.steps[node.name], time.time())

    def _make_room(self, step: Step) -> None:
        """End idle warm engines where `step` needs their CPUs and GPUs.

        Warm engines hold resources while they are idle. They may keep resources that no stage needs, and engines that
        `step` will lease. If they kept more, the other actors of `step` would wait forever.
        """
        used = [running.step for running in self.running.values()]
        free_cpus = self.session.cpus - sum(other.held_cpus for other in used) - step.cpus
        free_gpus = self.session.gpus - sum(other.held_gpus for other in used) - step.gpus
        serving = [actor for actor in step.actors if actor.role != "trainer"]
        cpus = free_cpus + sum(actor.workers * actor.cpus for actor in serving)
        gpus = free_gpus + sum(actor.workers * actor.gpus for actor in serving)
        _quietly_call("trim_idle", cpus, gpus)

    def _end(self, task: object) -> None:
        """Record how a Ray task ended: DONE and the summary, or the failure."""
        running = self.running.pop(task)
        node, wall_s = running.node, time.time() - running.started
        answer = self._answer(task, wall_s)
        _quietly_call("release_stage", node.name)
        error = answer.error or self._missing_output(node)
        if error:
            self._keep_worker_logs(node, running.started)
            self.failures.append(self._failure(node, error, answer.user))
            self._record(node, "failed", wall_s, record={"error": error}, event="stage_failed")
        else:
            stats = {key: value for key, value in answer.result.items() if key not in node.stage_kind.outputs}
            record = {"outputs": self._outputs(node), "stats": stats.get("stats", stats)}
            done = {"input_hash": self.decisions[node.name].input_hash, "wall_s": round(wall_s, 3), **record}
            self.run_dir.finish(node, done)
            self.finished.add(node.name)
            self._record(node, "done", wall_s, record=record, event="stage_done")
            for path in delete_kept(self.run_dir, node):
                self._event(node, "earlier_deleted", path=str(path))
        self.save()

    def _answer(self, task: Any, wall_s: float) -> StageAnswer:
        """The stage's answer, or one made here if the stage's process died without an answer."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(task)
        except RayError as error:
            reason = str(error).strip().splitlines()
            what = reason[0] if reason else type(error).__name__
            return StageAnswer({}, wall_s, f"its process ended without an answer (killed, or out of memory?): {what}")

    def _failure(self, node: Node, error: str, user: bool) -> PosttrainError:
        """The exception for a stage that failed: UserError if the user's input was at fault, else StageError."""
        if user:
            return UserError("\n".join(f"stage {node.name}: {line}" for line in error.splitlines()))
        return StageError(f"stage {node.name} failed: {error}\n  log: {self.run_dir.folder(node) / 'log.txt'}")

    def _record(self, node: Node, status: str, wall_s: float, *, record: Mapping[str, object], event: str) -> None:
        """Add a stage to the summary and write its event."""
        digest = self.decisions[node.name].input_hash
        self.summary.add(node, status, {"wall_s": round(wall_s, 3), "input_hash": digest, "outputs": {}, **record})
        error = {"error": record["error"]} if "error" in record else {}
        self._event(node, event, kind=node.kind, wall_s=round(wall_s, 3), **error)

    def _event(self, node: Node, event: str, **fields: object) -> None:
        """Write an event. On a full disk that fails, and is ignored: the stage's own failure matters more."""
        try:
            StageContext(node.name, self.run_dir.folder(node), self.run_dir.events).event(event, **fields)
        except OSError:
            if event == "stage_start":
                raise

    def _outputs(self, node: Node) -> dict[str, str]:
        """The outputs that exist, by name, as paths relative to the run directory."""
        paths = {name: output_path(node, name, self.run_dir.path) for name in node.stage_kind.outputs}
        return {name: str(path.relative_to(self.run_dir.path)) for name, path in paths.items() if path.exists()}

    def _missing_output(self, node: Node) -> str:
        """An error if the stage's first output, or one that another stage refers to, was not written; else ""."""
        from posttrain.pipeline.references import find_references

        references = [
            reference
            for other in self.pipeline.nodes.values()
            for reference in find_references(other.config.model_dump(mode="json"))
        ]
        wanted = {next(iter(node.stage_kind.outputs))}
        wanted |= {reference.output for reference in references if reference.stage == node.name and not node.of}
        missing = [name for name in wanted if not output_path(node, name, self.run_dir.path).exists()]
        return f"it ended without writing {', '.join(sorted(missing))}" if missing else ""

    def _keep_worker_logs(self, node: Node, since: float) -> None:
        """Append the last output of the stage's actors to its log.txt, because Ray's log folder is deleted at the
        end.
        """
        for path in self.session.worker_logs(since):
            try:
                tail = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
                if all(line.startswith(":") or not line for line in tail):
                    continue  # the file has only Ray's own marker lines: the actor printed nothing
                with (self.run_dir.folder(node) / "log.txt").open("a", encoding="utf-8") as log:
                    log.write(f"\n--- {path.name} ---\n" + "\n".join(tail) + "\n")
            except OSError:
                return


def make_job(node: Node, pipeline: Pipeline, run_dir: RunDir) -> StageJob:
    """The job for a stage's process. Its config has the paths of earlier outputs in place of references."""
    return StageJob(
        node.name,
        node.stage_kind,
        node.resolved(run_dir.path, pipeline.nodes).model_dump(mode="json"),
        run_dir.folder(node),
        run_dir.events,
        pipeline.seed,
        pipeline.warm_engines,
        str(Path.cwd()),
    )


def _quietly_call(function: str, *arguments: Any) -> None:
    """Call a function of the engine registry and ignore its errors.

    All engines end with the Ray session, so an error in the registry must not make a stage fail.
    """
    from posttrain.sampling import registry

    with contextlib.suppress(Exception):
        getattr(registry, function)(*arguments)
