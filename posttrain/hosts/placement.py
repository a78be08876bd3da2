"""Where actors are placed on the hosts of a cluster.

The home host is the driver's. The driver, the stages, the engine registry, the rewards and all files of a run are
there. Engines and the judge are placed by their `resources`, on any host. In a local session nothing is said to Ray,
since there is one host.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from posttrain.config.resources import ActorResources, HostChoice, RolloutResources
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


def pinned(node: str) -> dict[str, Any]:
    """Options of an actor or task that runs on this node or not at all."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def pinned_here() -> dict[str, Any]:
    """Options of an actor or task that must run on the host of the caller; none in a local session."""
    return pinned(this_node()) if in_cluster() else {}


def near_home() -> dict[str, Any]:
    """Options of an actor that runs on the caller's host if that host has in all what the actor asks for."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(this_node(), soft=True)} if in_cluster() else {}


def chosen(choice: HostChoice, avoided: Collection[str] = ()) -> dict[str, Any]:
    """Options of an actor that may run on any host that `choice` allows. avoided: ids of nodes that it must not use.

    Raises ConfigError if no host is allowed.
    """
    if not in_cluster():
        return {}
    selector = dict(choice.labels)
    if choice.nodes:
        selector[NODE_LABEL] = f"in({','.join(sorted(set(nodes_named(choice.nodes)) - set(avoided)) or ['none'])})"
    elif avoided:
        selector[NODE_LABEL] = f"!in({','.join(sorted(avoided))})"
    options: dict[str, Any] = {"label_selector": selector} if selector else {}
    return {**options, "scheduling_strategy": "SPREAD"} if choice.spread else options


def nodes_named(names: Collection[str]) -> list[str]:
    """The ids of the nodes on hosts with these names or addresses."""
    import ray

    return [
        node["NodeID"] for node in ray.nodes() if {node["NodeManagerAddress"], node["NodeManagerHostname"]} & set(names)
    ]


def check_choices(choices: Mapping[str, HostChoice]) -> None:
    """Raise ConfigError for a host or a label that the cluster does not have, and for actors that no host has room for.

    choices: by key path. Each of them may have all that its hosts have; other roles are not counted.
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
        if isinstance(choice, ActorResources | RolloutResources):
            _check_room(key, choice, [node for node in alive if _allows(choice, node)])


def _allows(choice: HostChoice, node: Mapping[str, Any]) -> bool:
    names = {node["NodeManagerAddress"], node["NodeManagerHostname"]}
    return (not choice.nodes or bool(names & set(choice.nodes))) and choice.labels.items() <= node["Labels"].items()


def _check_room(key: str, choice: ActorResources | RolloutResources, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError if these hosts together have too little for the actors, each of which is on one host."""
    asked = {"CPU": choice.cpus, "GPU": choice.gpus}
    workers = choice.least if isinstance(choice, RolloutResources) else choice.workers

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
    lower = f"{room} would fit: lower workers" if room else "none would fit: lower what each asks for"
    raise ConfigError(
        key, [f"asks for {workers} × ({each}), each on one host, and of the hosts that it may use {have}; {lower}"]
    )
