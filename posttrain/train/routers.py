"""What the routers of a native Llama 4 did in one optimizer step, as figures for metrics."""

from posttrain.model.router_stats import RouterStats


def figures(stats: RouterStats) -> dict[str, float]:
    """Figures of one step over all layers.

    router_entropy: mean over layers, nats. expert_load_max: the largest load of an expert, as a multiple of an even
    load. dead_experts: how many experts of all layers no token went to.
    """
    return {
        "router_entropy": float(stats.entropy_L.mean()),
        "expert_load_max": float(stats.load_LE.max() * stats.load_LE.shape[-1]),
        "dead_experts": int(stats.dead_L.sum()),
    }
