"""Where actors are placed on the hosts of a cluster.

The home host is the driver's. The driver, the stages, the engine registry, the rewards and all files of a run are
there. Engines, the judge, and ranks are placed by their `resources`, on any host. In a local session nothing is said to
Ray, since there is one host.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from posttrain.compat.ray import free_resources
from posttrain.config.resources import ActorResources, HostChoice, RolloutResources, TrainerResources
from posttrain.errors import ConfigError

CLUSTER_VARIABLE = "POSTTRAIN_CLUSTER"  # "1" in every process of a run that has joined a cluster
NODE_LABEL = "ray.io/node-id"  # the label that Ray itself gives to each node


def in_cluster() -> bool:
    """Whether this process belongs to a run that has joined a cluster."""
    return os.environ.get(CLUSTER_VARIABLE) == "1"


def name_in_run(name: str) -> str:
    """The name of an actor that each run has once. Several runs may use the same cluster."""
    return f"{name}-{os.environ.get('POSTTRAIN_SESSION', '')}" if in_cluster() else name


def this_node() -> str:
    """The id of this host's node in Ray."""
    import ray

    return ray.get_runtime_context().get_node_id()


def this_address() -> str:
    """The address under which other hosts of the cluster reach this one."""
    import ray

    return ray.util.get_node_ip_address()


def this_interface() -> str | None:
    """The network interface that has `this_address`; None if none has it."""
    import psutil

    found = psutil.net_if_addrs().items()
    return next((name for name, own in found if any(each.address == this_address() for each in own)), None)


def pinned(node: str) -> dict[str, Any]:
    """Options of an actor or task that runs on this node or not at all."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def pinned_here() -> dict[str, Any]:
    """Options of an actor or task that must run on the host of the caller; none in a local session."""
    return pinned(this_node()) if in_cluster() else {}


class RankPlaces:
    """Where the ranks of one training are placed: the options of each, in `options`.

    They are on the home host if that has in all what they ask for, and the resources do not say where; else on any
    hosts that those allow, but for the `avoided`. `spread` and `pack` are a placement group of Ray: all ranks get their
    places at once, or none does. close: gives them back.
    """

    def __init__(self, resources: TrainerResources, number: int, avoided: Collection[str] = ()):
        self.options: list[dict[str, Any]] = [{}] * number
        self.close: Callable[[], None] = lambda: None
        asked = {name: value for name, value in (("CPU", resources.cpus), ("GPU", resources.gpus)) if value}
        if not in_cluster():
            return
        if not resources.says_where and _home_has({name: number * value for name, value in asked.items()}):
            self.options = [pinned_here()] * number
        elif asked and (resources.spread or resources.pack):
            self._group(resources, asked, number, avoided=avoided)
        else:
            self.options = [chosen(resources, avoided)] * number

    def _group(
        self, resources: TrainerResources, asked: Mapping[str, float], number: int, *, avoided: Collection[str]
    ) -> None:
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [dict(asked) for _ in range(number)]
        selectors = [_selector(resources, avoided) for _ in bundles]
        strategy = "SPREAD" if resources.spread else "PACK"
        group = placement_group(bundles, strategy, bundle_label_selector=selectors)
        self.options = [
            {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}
            for index in range(number)
        ]
        self.close = lambda: remove_placement_group(group)


def _home_has(asked: Mapping[str, float]) -> bool:
    """Whether the caller's host has in all so much, free or not."""
    import ray

    home = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == this_node()), {})
    return all(home.get(name, 0.0) >= value - 1e-9 for name, value in asked.items())


def chosen(choice: HostChoice, avoided: Collection[str] = (), beside: Collection[str] = ()) -> dict[str, Any]:
    """Options of an actor that may run on any host that `choice` allows. avoided: ids of nodes that it must not use.

    beside: ids of nodes that have actors of the same role, which `pack` prefers. Raises ConfigError if no host is
    allowed.
    """
    if not in_cluster():
        return {}
    selector = _selector(choice, avoided)
    options: dict[str, Any] = {"label_selector": selector} if selector else {}
    if choice.pack and (near := set(beside) - set(avoided)):
        preferred = {**selector, NODE_LABEL: f"in({','.join(sorted(near))})"}
        return {"label_selector": preferred, "fallback_strategy": [{"label_selector": selector}]}
    return {**options, "scheduling_strategy": "SPREAD"} if choice.spread else options


def _selector(choice: HostChoice, avoided: Collection[str]) -> dict[str, str]:
    """The labels that a host must have, and the nodes that it may be."""
    selector = dict(choice.labels)
    if choice.nodes:
        selector[NODE_LABEL] = f"in({','.join(sorted(set(nodes_named(choice.nodes)) - set(avoided)) or ['none'])})"
    elif avoided:
        selector[NODE_LABEL] = f"!in({','.join(sorted(avoided))})"
    return selector


def nodes_named(names: Collection[str]) -> list[str]:
    """The ids of the nodes on hosts with these names or addresses."""
    import ray

    return [
        node["NodeID"] for node in ray.nodes() if {node["NodeManagerAddress"], node["NodeManagerHostname"]} & set(names)
    ]


def check_choices(choices: Mapping[str, HostChoice], ranks: Mapping[str, int] | None = None) -> None:
    """Raise ConfigError for a host or a label that the cluster does not have, and for actors that no host has room for.

    choices: by key path. ranks: how many ranks a trainer has, by its key path; 1 where it is not given. Each of them
    may have all that its hosts have; other roles are not counted.
    """
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    names = sorted({node["NodeManagerHostname"] for node in alive})
    known = {name for node in alive for name in (node["NodeManagerAddress"], node["NodeManagerHostname"])}
    problems = []
    for key, choice in choices.items():
        problems += [
            f"nodes: got {name!r}, which is no host of the cluster; it has {', '.join(names)}"
            for name in choice.nodes if name not in known
        ]  # fmt: skip
        if choice.labels and not any(choice.labels.items() <= node["Labels"].items() for node in alive):
            said = ", ".join(f"{label}={value}" for label, value in choice.labels.items())
            problems.append(f"labels: no host has {said}; labels are given to a host by `ray start --labels`")
        if problems:
            raise ConfigError(key, problems)
        if isinstance(choice, ActorResources | RolloutResources | TrainerResources):
            number = _number(choice, (ranks or {}).get(key, 1))
            _check_room(key, choice, [node for node in alive if _allows(choice, node)], workers=number)


def room(
    choice: ActorResources, most: int, avoided: Collection[str] = (), *, idle: Collection[tuple[str, float, float]] = ()
) -> int:
    """How many more actors, at most `most`, hosts have free CPUs and GPUs for: each on one host that `choice` allows.

    avoided: ids of nodes that are left out. idle: (node, CPUs, GPUs) that count as free.
    """
    import ray

    free = free_resources()
    for node, cpus, gpus in idle:
        held = free.setdefault(node, {})
        held["CPU"], held["GPU"] = held.get("CPU", 0.0) + cpus, held.get("GPU", 0.0) + gpus
    asked = {name: number for name, number in (("CPU", choice.cpus), ("GPU", choice.gpus)) if number}
    names = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in avoided and (not in_cluster() or _allows(choice, node))
    ]
    return min(
        most,
        sum(
            min([most, *(int(free.get(name, {}).get(key, 0.0) / each + 1e-6) for key, each in asked.items())])
            for name in names
        ),
    )


def _number(choice: ActorResources | RolloutResources | TrainerResources, ranks: int) -> int:
    if isinstance(choice, TrainerResources):
        return ranks
    return choice.least if isinstance(choice, RolloutResources) else choice.workers


def _allows(choice: HostChoice, node: Mapping[str, Any]) -> bool:
    names = {node["NodeManagerAddress"], node["NodeManagerHostname"]}
    return (not choice.nodes or bool(names & set(choice.nodes))) and choice.labels.items() <= node["Labels"].items()


def _check_room(
    key: str,
    choice: ActorResources | RolloutResources | TrainerResources,
    nodes: Sequence[Mapping[str, Any]],
    *,
    workers: int,
) -> None:
    """Raise ConfigError if these hosts together have too little for the actors, each of which is on one host."""
    asked = {"CPU": choice.cpus, "GPU": choice.gpus}

    def fitting(node: Mapping[str, Any]) -> int:
        fits = [int(node["Resources"].get(name, 0.0) / each + 1e-9) for name, each in asked.items() if each]
        return min([workers, *fits])

    if (room := sum(map(fitting, nodes))) >= workers:
        return
    each = ", ".join(f"{number:g} {name}" for name, number in asked.items() if number)
    have = "; ".join(
        f"{node['NodeManagerHostname']} has "
        + ", ".join(f"{node['Resources'].get(name, 0.0):g} {name}" for name, number in asked.items() if number)
        for node in nodes
    )
    what = "parallel.processes" if isinstance(choice, TrainerResources) else "workers"
    lower = f"{room} would fit: lower {what}" if room else "none would fit: lower what each asks for"
    raise ConfigError(
        key, [f"asks for {workers} × ({each}), each on one host, and of the hosts that it may use {have}; {lower}"]
    )
