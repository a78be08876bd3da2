"""Leases vLLM engines to the stages of a run, and keeps them warm in between: starting one takes many seconds.

The registry is a Ray actor that the run owns. It makes the engine actors, so that they end with the run whatever
happens to the stage that leased them. An idle engine serves a later stage if the model's architecture, the engine's
settings and its resources are equal; its weights are then replaced, which gives exactly what a fresh load would. Idle
engines of another kind are ended before new ones start, since they hold memory that the new ones may need.
"""

import asyncio
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from posttrain.actors.processes import kill_process
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.hosts.directory import directory
from posttrain.hosts.placement import chosen, name_in_run, pinned_here
from posttrain.sampling.arguments import read_model_config
from posttrain.sampling.engine import EngineActor

REGISTRY_NAME = "engine-registry"
NAMESPACE = "posttrain"
WHERE_S = 0.2
PACK_S = 20.0  # that an engine which is to be beside others waits for their places


# Ray ends an actor when the last handle of its owner is gone, so the process that started the registry keeps one.
_registry: Any = None


@dataclass
class _Held:
    name: str
    signature: str
    actor: Any
    where: Any  # Ray reference of (node id, process id), which resolves once the process has started
    stage: str | None  # None while idle
    model: dict[str, Any]
    engine: dict[str, Any]
    resources: ActorResources

    @property
    def cpus(self) -> float:
        return self.resources.cpus

    @property
    def gpus(self) -> float:
        return self.resources.gpus


def engine_signature(model: ServedModelConfig, engine: EngineConfig, resources: ActorResources) -> str:
    """A text that is equal for engines which differ in nothing but their weights."""
    asked = resources.model_dump(exclude={"workers"})
    parts = [read_model_config(model.path), model.dtype, engine.model_dump(), asked]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class EngineRegistry:
    """Leases engines to stages; runs as a Ray actor. The module's docstring explains it."""

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._made = 0
        self._successors: dict[str, str] = {}
        # Two stages that run side by side call at the same time, and ending an engine takes a moment. Without the lock
        # the second call would see what the first has only half changed, and lease the same warm engine again.
        self._changing = asyncio.Lock()

    async def acquire(
        self, stage: str, model: dict[str, Any], engine: dict[str, Any], *, resources: dict[str, Any]
    ) -> list[tuple[str, Any, bool]]:
        """Lease `resources.workers` engines: (name, actor, is_new). The caller starts new ones and loads warm ones."""
        wanted = ActorResources(**resources)
        signature = engine_signature(ServedModelConfig(**model), EngineConfig(**engine), wanted)
        async with self._changing:
            warm = [held for held in self._held if held.stage is None and held.signature == signature]
            leased = [(held.name, held.actor, False) for held in warm[: wanted.workers]]
            for held in warm[: wanted.workers]:
                held.stage = stage
            if len(leased) < wanted.workers:
                await self._end([held for held in self._held if held.stage is None])
            for _ in range(wanted.workers - len(leased)):
                held = await self._make(signature, stage, model, engine=engine, resources=wanted)
                leased.append((held.name, held.actor, True))
            return leased

    async def replace(self, name: str) -> tuple[str, Any]:
        """End a lost engine, whatever state its process is in, and return another of its kind that is not started
        yet.
        """
        async with self._changing:
            name = self._latest(name)
            old = next(held for held in self._held if held.name == name)
            await self._await_host_of(old)
            held = await self._make(old.signature, old.stage, old.model, engine=old.engine, resources=old.resources)
            self._successors[name] = held.name
            await self._end([old])
            return held.name, held.actor

    async def _await_host_of(self, held: _Held) -> None:
        """Wait until it is known whether the host of a lost engine is lost too."""
        if (hosts := directory()) is None:
            return
        where = asyncio.ensure_future(held.where)
        placed, _ = await asyncio.wait({where}, timeout=WHERE_S)
        if placed and where.exception() is None:
            await hosts.decided.remote(where.result()[0])
        where.cancel()

    def _latest(self, name: str) -> str:
        """Follow replacements: the caller that had an engine replaced may have died before it learned the new name."""
        while name in self._successors:
            name = self._successors[name]
        return name

    async def _make(
        self,
        signature: str,
        stage: str | None,
        model: dict[str, Any],
        *,
        engine: dict[str, Any],
        resources: ActorResources,
    ) -> _Held:
        """A new engine, on no host that is suspected."""
        import ray

        name = f"engine-{self._made}"
        self._made += 1
        hosts = directory()
        avoided = await hosts.avoided.remote() if hosts is not None else ()
        beside = await self._nodes_of(stage, signature) if hosts is not None and resources.pack else ()
        options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": 10_000}
        options |= chosen(resources, avoided, beside)
        actor: Any = ray.remote(EngineActor).options(**options).remote(name, model, engine)
        held = _Held(name, signature, actor, actor.where.remote(), stage, model, engine, resources)
        self._held.append(held)
        return held

    async def _nodes_of(self, stage: str | None, signature: str) -> set[str]:
        """The nodes of the engines of this kind that a stage has. One that has no place yet is waited for."""
        wheres = [
            asyncio.ensure_future(held.where)
            for held in self._held
            if held.stage == stage and held.signature == signature
        ]
        if not wheres:
            return set()
        there, missing = await asyncio.wait(wheres, timeout=PACK_S)
        for where in missing:
            where.cancel()
        return {where.result()[0] for where in there if where.exception() is None}

    async def release(self, names: list[str], keep: bool) -> None:
        """Give engines back: `keep` leaves them warm for a later stage, otherwise they are ended.

        On a cluster none is kept while an engine of another stage waits for a place: the CPUs and GPUs of all hosts may
        be enough for both, and those of the hosts that it may use not.
        """
        async with self._changing:
            strays = {self._latest(name) for name in names} - set(names)
            await self._end([held for held in self._held if held.name in strays])
            released = [held for held in self._held if held.name in names]
            for held in released:
                held.stage = None
            if not keep or await self._is_one_waiting():
                await self._end(released)

    async def _is_one_waiting(self) -> bool:
        """Whether Ray has no place yet for an engine. Not so in a local session, where stages have what they count."""
        leased = [asyncio.ensure_future(held.where) for held in self._held if held.stage is not None]
        if directory() is None or not leased:
            return False
        _, missing = await asyncio.wait(leased, timeout=WHERE_S)
        for where in missing:
            where.cancel()
        return bool(missing)

    async def idle(self) -> list[tuple[str, float, float]]:
        """(node, CPUs, GPUs) of each idle engine."""
        found = [held for held in self._held if held.stage is None]
        nodes = await asyncio.gather(*(held.where for held in found), return_exceptions=True)
        there = zip(found, nodes, strict=True)
        return [(node[0], held.cpus, held.gpus) for held, node in there if not isinstance(node, BaseException)]

    async def trim_idle(self, cpus: float, gpus: float) -> None:
        """End idle engines, oldest first, until the idle ones hold no more than these CPUs and GPUs."""
        async with self._changing:
            idle = [held for held in self._held if held.stage is None]
            while idle and (sum(h.cpus for h in idle) > cpus + 1e-9 or sum(h.gpus for h in idle) > gpus + 1e-9):
                await self._end([idle.pop(0)])

    async def end_stage(self, stage: str) -> None:
        """End the engines that a failed stage still holds, because their state is unknown."""
        async with self._changing:
            await self._end([held for held in self._held if held.stage == stage])

    async def end_all(self) -> None:
        """End every engine."""
        async with self._changing:
            await self._end(list(self._held))

    async def _end(self, ended: list[_Held]) -> None:
        import ray

        for held in ended:
            self._held.remove(held)
            ray.kill(held.actor)
        # ray.kill does not end a process that was stopped by SIGSTOP: it is sent SIGKILL by its process id, which an
        # actor that has not started yet does not have.
        wheres = [asyncio.ensure_future(held.where) for held in ended]
        if not wheres:
            return
        there, missing = await asyncio.wait(wheres, timeout=WHERE_S)
        for where in missing:
            where.cancel()
        places = [where.result() for where in there if where.exception() is None]
        hosts = directory()
        if hosts is None:
            await asyncio.gather(*(asyncio.to_thread(kill_process, *place) for place in places))
        else:
            await asyncio.gather(*(hosts.fence.remote(*place) for place in places))


def start_registry() -> Any:
    """The registry of this Ray session. The first process that asks starts it, and owns it from then on."""
    import ray

    global _registry
    name = name_in_run(REGISTRY_NAME)
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 64, **pinned_here()}
        _registry = ray.remote(EngineRegistry).options(**options, get_if_exists=True).remote()
        return _registry


def release_stage(stage: str) -> None:
    """End the engines that `stage` still holds, if a registry is running."""
    import ray

    try:
        registry = ray.get_actor(name_in_run(REGISTRY_NAME), namespace=NAMESPACE)
    except ValueError:
        return
    ray.get(registry.end_stage.remote(stage))


def trim_idle(cpus: float, gpus: float) -> None:
    """Let idle engines hold at most these CPUs and GPUs, so that the next stage finds its own free."""
    import ray

    try:
        registry = ray.get_actor(name_in_run(REGISTRY_NAME), namespace=NAMESPACE)
    except ValueError:
        return
    ray.get(registry.trim_idle.remote(cpus, gpus))


def stop_registry() -> None:
    """End every engine and the registry."""
    import ray

    try:
        registry = ray.get_actor(name_in_run(REGISTRY_NAME), namespace=NAMESPACE)
    except ValueError:
        return
    ray.get(registry.end_all.remote())
    ray.kill(registry)
