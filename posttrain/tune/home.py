"""The folder of a stage of SFT or DPO, as its ranks reach it from any host.

    rank on the home host   ──────────────────────────────────────────► the stage's folder
    rank on another host    reads: model, rows, checkpoints ◄── cache of its host ◄── home host
                            writes: a folder of its own, in place of the stage's
    rank 0 on another host  events, metrics, folders that are complete ──► HomeFiles, an actor ──► the stage's folder

The home host takes folders that are offered to it. The actor ends with the training. So ranks that were replaced while
their host was cut off can write nothing afterwards. Left out: pictures, whose file does not travel, and adapters
as a start, whose base is somewhere else.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.actors.processes import kill_process, place_of_this
from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.files import append_jsonl, keep_lines, read_jsonl, remove
from posttrain.hosts.away import HandedOver, folder_now, host_named, now_away, offered
from posttrain.hosts.folders import FolderOffer, take_folder
from posttrain.hosts.placement import in_cluster, pinned_here, this_node
from posttrain.model.adapter import base_folder
from posttrain.parallel.away import model_here, staying
from posttrain.tune.checkpoints import Sealed, latest, seal

CHECKPOINTS = "checkpoints"  # the folder of checkpoints in that of a stage
ROWS = "tokenized"  # the folder of the rows on disk, from which all ranks read them
EVALUATIONS = "evaluations.jsonl"  # in the folder of checkpoints
ARRIVE_S = 120.0  # without a byte from another host, after which a folder counts as lost
PLACED = "resources.trainer"


class HomeFiles:
    """What rank 0 reads and writes in the folder of a stage. It runs on the home host."""

    def __init__(self, context: StageContext):
        self._context = context
        self._checkpoints = context.dir / CHECKPOINTS

    def place(self) -> tuple[str, int]:
        """Where the actor runs: what `kill_process` takes."""
        return place_of_this()

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """See `StageContext.event`."""
        self._context.event(event, **fields)

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """See `StageContext.metrics`."""
        self._context.metrics(step, values)

    def resume_point(self, fingerprint: str) -> Sealed:
        """The checkpoint from which a training continues. Metrics of later steps are deleted."""
        found = latest(self._checkpoints, fingerprint)
        keep_lines(self._context.dir / "metrics.jsonl", lambda line: found.step > 0 and line["step"] <= found.step)
        return found

    def seal(self, step: int, fingerprint: str, *, tokens: int, kept: int | None) -> Path:
        """See `posttrain.tune.checkpoints.seal`."""
        return seal(self._checkpoints, step, fingerprint, tokens=tokens, kept=kept)

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations that are noted so far."""
        return list(read_jsonl(self._checkpoints / EVALUATIONS))

    def add_evaluation(self, record: Mapping[str, object]) -> None:
        """Note an evaluation."""
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        append_jsonl(self._checkpoints / EVALUATIONS, record)

    def first_loss(self) -> float | None:
        """The loss of the first step of the training, also if it was continued since then; None before that."""
        logged = read_jsonl(self._context.dir / "metrics.jsonl")
        return next((line["loss"] for line in logged if "loss" in line), None)

    def take(self, offer: FolderOffer, name: str) -> None:
        """Take a folder that a rank on another host has written. name: relative to the stage's folder."""
        take_folder(offer, self._context.dir / name, ARRIVE_S)


class HomeFilesAway:
    """`HomeFiles` for a rank on another host: it calls the actor, and waits for each answer."""

    def __init__(self, actor: Any):
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            import ray
            from ray.exceptions import RayTaskError

            try:
                return ray.get(getattr(self._actor, method).remote(*arguments, **named))
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, OSError):
                    what = f"{cause.filename or 'its disk'} cannot be written: {cause.strerror}"
                    cause = StageError(f"home host: {what}")
                raise cause from None

        return call


class ContextAway(StageContext):
    """The context of a rank on another host. The home host writes what it reports, with the home host's clock."""

    def __init__(self, context: StageContext, folder: Path, files: HomeFilesAway):
        super().__init__(context.name, folder, context.events, context.seed, context.warm_engines)
        self._files = files

    def event(self, event: str, **fields: object) -> None:
        """See `StageContext.event`."""
        self._files.event(event, fields)

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """See `StageContext.metrics`."""
        self._files.metrics(step, dict(values))


class StageHere:
    """A stage as a rank of it finds it on its host.

    config: with the model folder as this host has it. context: with a folder of this host. files: called by rank 0.
    base: the model folder on the home host.
    """

    def __init__(self, config: Any, context: StageContext):
        self.config = config
        self.context = context
        self.files: Any = HomeFiles(context)
        self.base = base_folder(config.model.path)
        self._home = context.dir
        self._rows: Path | None = None

    def rows(self, records: Any) -> Any:
        """The `Stored` records whose file lies in the folder of the rows."""
        return records if self._rows is None or not hasattr(records, "moved") else records.moved(self._rows)

    def checkpoint(self, path: Path) -> Path:
        """Where this rank reads a checkpoint of the home host."""
        return path

    def kept_checkpoint(self, step: int) -> Path:
        """Where this rank reads the sealed checkpoint of a step."""
        return self.checkpoint(self._home / CHECKPOINTS / f"step_{step}")

    def give(self, path: Path) -> None:
        """Bring a complete folder below `context.dir` to its place on the home host. Rank 0 calls it."""


class StageAway(StageHere):
    """A stage as a rank on another host than the home host finds it. What was given to the home host is deleted here.

    handed: of the folder that stands in for the stage's.
    """

    def __init__(self, config: Any, context: StageContext, actor: Any, *, handed: HandedOver):
        super().__init__(config, context)
        if getattr(config, "images", None) is not None:
            raise staying(PLACED, "pictures do not travel")
        model = config.model.model_copy(update={"path": model_here(config.model.path, PLACED, ARRIVE_S)})
        self.config = config.model_copy(update={"model": model})
        self._rows = Path(folder_now(str(context.dir / ROWS), ARRIVE_S))
        folder = handed.begin(context.name)
        folder.mkdir()
        self.files = HomeFilesAway(actor)
        self.context = ContextAway(context, folder, self.files)

    def checkpoint(self, path: Path) -> Path:
        """See `StageHere.checkpoint`."""
        return Path(folder_now(str(path), ARRIVE_S))

    def give(self, path: Path) -> None:
        """See `StageHere.give`."""
        with offered(path) as offer:
            self.files.take(offer, str(path.relative_to(self.context.dir)))
        remove(path)


@contextlib.contextmanager
def stage_here(config: Any, context: StageContext, actor: Any) -> Iterator[StageHere]:
    """The stage on the host of this rank. Collective. actor: `HomeFiles` on the home host; None in a local session."""
    if actor is None or not now_away():
        here = StageHere(config, context)
        _wait_for_all()
        yield here
        return
    with host_named(), contextlib.closing(HandedOver()) as handed:
        here = StageAway(config, context, actor, handed=handed)
        _wait_for_all()
        yield here


def _wait_for_all() -> None:
    """Nobody writes to the folder of the rows before all have read it."""
    from posttrain.parallel.export import barrier

    barrier()


@contextlib.contextmanager
def home_files(context: StageContext) -> Iterator[Any]:
    """The actor that writes for ranks on other hosts; None in a local session, which has none."""
    if not in_cluster():
        yield None
        return
    import ray

    actor: Any = ray.remote(HomeFiles).options(num_cpus=0, **pinned_here()).remote(context)
    place = actor.place.remote()
    try:
        yield actor
    finally:
        ray.kill(actor)
        for started in ray.wait([place], timeout=0)[0]:  # else it has done nothing
            kill_process(*ray.get(started))  # returns when it is gone, and `ray.kill` before


def absolute(config: Any, context: StageContext) -> tuple[Any, StageContext]:
    """In a cluster, the config and the context with absolute paths: other hosts have other working directories."""
    if not in_cluster():
        return config, context
    model = config.model.model_copy(update={"path": os.path.abspath(Path(config.model.path).expanduser())})
    placed = replace(context, dir=context.dir.absolute(), events=context.events.absolute())
    return config.model_copy(update={"model": model}), placed


def folder_of_host(own: Path) -> tuple[Path, bool]:
    """(the folder of the first rank on this host, whether this is that rank). Collective. own: that of this rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return own, True
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (this_node(), str(own)))
    node, _ = every[dist.get_rank()]
    first = next(rank for rank, (other, _) in enumerate(every) if other == node)
    return Path(every[first][1]), first == dist.get_rank()
