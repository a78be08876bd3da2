"""Figures for metrics on the routers of a native Llama 4 in one optimizer step."""

from posttrain.model.router_stats import RouterStats


def figures(stats: RouterStats) -> dict[str, float]:
    """The figures of one step.

    router_entropy: mean over layers, nats. expert_load_max: the largest load of any expert in any layer, as a multiple
    of the load that each would have if loads were even. dead_experts: how many experts of all layers no token chose.
    """
    return {
        "router_entropy": float(stats.entropy_L.mean()),
        "expert_load_max": float(stats.load_LE.max() * stats.load_LE.shape[-1]),
        "dead_experts": int(stats.dead_L.sum()),
    }
