"""The resolved plan of a pipeline, which `validate` and `run --dry-run` print. Nothing is started.

CPUs and GPUs are what the configs declare. Memory is an estimate for each actor, from the headers of the weight files:
weights, gradients and Adam's two moments for an actor that trains; weights and KV cache for one that serves.
Activations are left out (`posttrain plan` estimates them), and experts count in full, as if expert parallelism did not
divide them. A model that an earlier stage makes has no size until that stage has run.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from posttrain.config.data import FilesConfig
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import (
    ActorResources,
    HostChoice,
    RewardResources,
    RolloutResources,
    TrainerResources,
)
from posttrain.config.training import ParallelConfig
from posttrain.errors import ConfigError
from posttrain.model.adapter import base_folder
from posttrain.model.adapter_start import adapter_note, started_lora
from posttrain.model.folder import read_header
from posttrain.pipeline.decide import Decision
from posttrain.pipeline.doubts import doubts
from posttrain.pipeline.graph import Node, Pipeline, output_path
from posttrain.pipeline.inputs import find_endpoints, find_inputs, images_of, walk
from posttrain.pipeline.references import find_references, has_reference
from posttrain.planning.memory import BYTES, state_bytes
from posttrain.planning.sizes import adapter_parameters

GIB = 1 << 30
_RESOURCES = ActorResources | RewardResources | RolloutResources | TrainerResources


@dataclass(frozen=True, slots=True)
class Actor:
    """The resources for one role of a stage: `workers` actors, each with these CPUs and GPUs, and later up to `most`.

    hosts: which hosts of a cluster they may use, in words; "" for any.
    Example: `Actor("rollout", 2, cpus=0.5, gpus=0.0, memory="0.02 GiB")` is two rollout engines.
    """

    role: str
    workers: int
    cpus: float
    gpus: float
    memory: str
    hosts: str = ""
    most: int = 0  # 0: their number stays

    @property
    def held(self) -> int:
        """The most actors that there may be at a time."""
        return max(self.workers, self.most)


@dataclass(frozen=True, slots=True)
class Step:
    """One stage in the plan.

    inputs, outputs: name to path, or to the reference that stands for it. key: key path of its `resources` section.
    """

    name: str
    kind: str
    key: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    actors: tuple[Actor, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all the actors that it begins with."""
        return sum(actor.workers * actor.cpus for actor in self.actors)

    @property
    def gpus(self) -> float:
        """GPUs of all the actors that it begins with."""
        return sum(actor.workers * actor.gpus for actor in self.actors)

    @property
    def held_cpus(self) -> float:
        """CPUs that it may hold later, when it has as many actors as it may have."""
        return sum(actor.held * actor.cpus for actor in self.actors)

    @property
    def held_gpus(self) -> float:
        """GPUs that it may hold later, when it has as many actors as it may have."""
        return sum(actor.held * actor.gpus for actor in self.actors)


def make_plan(pipeline: Pipeline, run_dir: Path) -> list[Step]:
    """One step for each stage, in the order in which the stages may start."""
    return [_step(node, pipeline, run_dir) for node in pipeline.nodes.values()]


def _step(node: Node, pipeline: Pipeline, run_dir: Path) -> Step:
    inputs: dict[str, str] = {}
    for found in find_inputs(node.config):
        if isinstance(found.value, ServedModelConfig | FilesConfig):
            path = found.value.path
            inputs[found.key] = path if isinstance(path, str) else ", ".join(path)
        else:
            inputs[found.key] = found.value.name
    for key, endpoint in find_endpoints(node.config):
        inputs[key] = f"{endpoint.model} at {endpoint.base_url}"
    for reference in find_references(node.config.model_dump(mode="json")):
        inputs.setdefault(reference.key.removesuffix(".path"), reference.text)
    outputs = {name: str(Path(node.folder) / path) for name, path in node.stage_kind.outputs.items()}
    return Step(
        node.name, node.kind, f"{node.prefix}resources", inputs, outputs, tuple(_actors(node, pipeline, run_dir))
    )


def _actors(node: Node, pipeline: Pipeline, run_dir: Path) -> list[Actor]:
    resources = getattr(node.config, "resources", None)
    declared = {
        key: value for key, value in walk(resources) if isinstance(value, _RESOURCES)
    } if resources is not None else {}  # fmt: skip
    if not declared and node.stage_kind.trains_itself:
        declared = {"trainer": ActorResources(workers=getattr(node.config, "processes", 1))}
    return [
        Actor(
            role,
            _workers(role, node, item),
            item.cpus,
            item.gpus,
            _memory(role, node, pipeline, run_dir=run_dir),
            _hosts(item),
            item.most if isinstance(item, RolloutResources) and item.is_elastic else 0,
        )
        for role, item in declared.items()
    ]


def _hosts(item: _RESOURCES) -> str:
    if not isinstance(item, HostChoice):
        return ""
    labels = [f"{name}={value}" for name, value in item.labels.items()]
    parts = [
        ", ".join(item.nodes),
        f"hosts with {', '.join(labels)}" if labels else "",
        "spread" if item.spread else "packed" if item.pack else "",
    ]
    return ", ".join(filter(None, parts))


def _workers(role: str, node: Node, item: _RESOURCES) -> int:
    """Number of actors that a section of `resources` asks for. A trainer has `parallel.processes` of them."""
    if isinstance(item, ActorResources):
        return item.workers
    if isinstance(item, RolloutResources):
        return item.least
    if role != "trainer":
        return 1
    parallel = getattr(node.config, "parallel", None)
    return parallel.processes if isinstance(parallel, ParallelConfig) else 1


def trainer_resources(node: Node) -> tuple[float, float]:
    """(CPUs, GPUs) of the stage's own process. A stage that only directs actors asks for none itself."""
    if not node.stage_kind.trains_itself:
        return 0.0, 0.0
    trainer = getattr(getattr(node.config, "resources", None), "trainer", None)
    if isinstance(trainer, ActorResources | TrainerResources):
        workers = _workers("trainer", node, trainer)
        return workers * trainer.cpus, workers * trainer.gpus
    return float(getattr(node.config, "processes", 1)), 0.0


def check_fits(plan: list[Step], source: str, *, cpus: float, gpus: float) -> None:
    """Raise ConfigError if a stage asks for more CPUs or GPUs than there are in total."""
    problems = [
        f"{step.key}: asks for {need:g} {unit}s ({_sum(step, unit)}), but there are {have:g}"
        + _fitting(step, unit, have)
        for step in plan
        for need, have, unit in ((step.cpus, cpus, "CPU"), (step.gpus, gpus, "GPU"))
        if need > have
    ]
    if problems:
        raise ConfigError(source, [f"{problem}; lower resources or join a larger cluster" for problem in problems])


def local_cpus() -> int:
    """The number of CPUs for a local Ray: those of this machine, but at least 2, for a trainer beside an engine."""
    return max(os.cpu_count() or 1, 2)


def local_gpus() -> int:
    """Number of GPUs of this machine, counted by their device files, so that no library has to be imported."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    return found if visible is None else min(found, len([item for item in visible.split(",") if item.strip()]))


def _sum(step: Step, unit: str) -> str:
    parts = []
    for actor in step.actors:
        each = actor.cpus if unit == "CPU" else actor.gpus
        if each:
            parts.append(f"{actor.role} {actor.workers} × {each:g}")
    return ", ".join(parts)


def _fitting(step: Step, unit: str, have: float) -> str:
    """The largest number of engines of one role with which the stage would fit, in words; "" if there is none."""
    asked = {actor.role: actor.cpus if unit == "CPU" else actor.gpus for actor in step.actors}
    whole = sum(actor.workers * asked[actor.role] for actor in step.actors)
    for actor in step.actors:
        each = asked[actor.role]
        left = have - whole + actor.workers * each
        if actor.role in ("rollout", "judge") and each and (number := int(left / each + 1e-9)) >= 1:
            return f"; {actor.role}.workers: {number} would fit"
    return ""


# --- memory ---


def _memory(role: str, node: Node, pipeline: Pipeline, *, run_dir: Path) -> str:
    """An estimate for one actor of a role, such as `0.02 GiB`, or `after sft`."""
    model = _model_of(role, node)
    if model is None or role == "reward":  # a reward may load a model, but its config does not name one
        return "-"
    path, after = _model_folder(model, pipeline, run_dir)
    size = count_parameters(path) if path else None
    if size is None:
        return f"after {after}" if after else "-"
    weights = size * BYTES[model.dtype]
    if role == "trainer":
        parallel = getattr(node.config, "parallel", None) or ParallelConfig(zero=0)
        state = state_bytes(size, 0, parallel, dtype=model.dtype, adapters=_adapters(node, model, path))
        total = state.weights + state.gradients + state.optimizer
    elif role == "reference":
        total = weights
    else:
        engine = _engine_of(role, node)
        cache = engine.kv_cache_gib if engine and engine.kv_cache_gib else 0.0
        total = weights + cache * GIB
    return f"{total / GIB:.2f} GiB"


def _adapters(node: Node, model: ServedModelConfig, base: Path | None) -> int:
    """Number of parameters of the adapters that a stage trains; 0 if it trains all weights."""
    lora = started_lora(model, getattr(node.config, "lora", None), images_of(node.config))
    return adapter_parameters(_shapes(base) or {}, lora) if lora is not None and base is not None else 0


def _model_of(role: str, node: Node) -> ServedModelConfig | None:
    """The model of a role: the one in the section named after the role, else the stage's first model."""
    models = {item.key: item.value for item in find_inputs(node.config) if isinstance(item.value, ServedModelConfig)}
    own = (value for key, value in models.items() if key.split(".")[0] == role)
    return next(own, next(iter(models.values()), None))


def _engine_of(role: str, node: Node) -> EngineConfig | None:
    """The settings of a role's engines: the section named after the role, else the stage's own."""
    engines = {key: value for key, value in walk(node.config) if isinstance(value, EngineConfig)}
    return engines.get(f"{role}.engine", engines.get("engine"))


def _model_folder(model: ServedModelConfig, pipeline: Pipeline, run_dir: Path) -> tuple[Path | None, str]:
    """(the model's folder if it exists, the name of the stage that makes it or "")."""
    reference = next(find_references(model.path), None)
    if reference is None:
        return base_folder(model.path), ""
    if reference.stage not in pipeline.nodes:
        return None, reference.stage
    return output_path(pipeline.nodes[reference.stage], reference.output, run_dir), reference.stage


def count_parameters(folder: Path) -> int | None:
    """Number of parameters in a folder's safetensors files, from their headers; None if none can be read."""
    return sum(map(prod, (_shapes(folder) or {}).values())) or None


def _shapes(folder: Path) -> dict[str, list[int]] | None:
    """The shapes of the tensors in a folder's safetensors files, by name; None if one cannot be read."""
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            found |= {name: item["shape"] for name, item in read_header(file).items()}
        except (OSError, ValueError):
            return None
    return found


# --- as text ---


def render_plan(
    pipeline: Pipeline,
    plan: list[Step],
    decisions: Mapping[str, Decision] | None = None,
    *,
    run_dir: Path | None = None,
) -> str:
    """The plan as plain text. decisions: what would happen to each stage in the run directory `run_dir`, by name."""
    lines = [f"pipeline {pipeline.name} · seed {pipeline.seed} · {len(pipeline.stages)} stages · {pipeline.source}"]
    for step in plan:
        decision = (decisions or {}).get(step.name)
        lines.append(f"\n{step.name} ({step.kind})" + (f"  [{decision.text}]" if decision else ""))
        if decision and decision.replaces:
            lines.append(f"  replaces  {decision.replaces} in {(run_dir or Path()) / pipeline.nodes[step.name].folder}")
        lines += [f"  in   {name} = {value}" for name, value in step.inputs.items()]
        lines += [f"  out  {name} = {value}" for name, value in step.outputs.items()]
        lines += [f"  use  {_render_actor(actor)}" for actor in step.actors]
        lines += [f"  note {line}" for line in _adapter_notes(pipeline.nodes[step.name])]
        lines += [f"  doubtful  {line}" for line in doubts(pipeline.nodes[step.name].config)]
    return "\n".join(lines)


def _adapter_notes(node: Node) -> list[str]:
    """A sentence about each folder of adapters that a stage reads."""
    models = ((key, section) for key, section in walk(node.config) if isinstance(section, ServedModelConfig))
    notes = (adapter_note(key, section) for key, section in models if not has_reference(section.path))
    return [note for note in notes if note is not None]


def _render_actor(actor: Actor) -> str:
    gpus = f", {actor.gpus:g} GPU" if actor.gpus else ""
    memory = f", memory {actor.memory}" if actor.memory != "-" else ""
    hosts = f" on {actor.hosts}" if actor.hosts else ""
    number = f"{actor.workers} to {actor.most}" if actor.most else actor.workers
    return f"{actor.role}: {number} × ({actor.cpus:g} CPU{gpus}{memory}){hosts}"
