"""A plan as text and as JSON."""

from collections.abc import Sequence
from typing import Any

from posttrain.config.training import ParallelConfig
from posttrain.planning.config import PlanConfig
from posttrain.planning.layouts import Need, fewest, fits, layouts, need
from posttrain.planning.sizes import Sizes

GIB = 1 << 30


def render(name: str, sizes: Sizes, plan: PlanConfig, *, gpu_gib: Sequence[float]) -> str:
    """The plan as text: parameters, the memory of one layout by part, and a table of all layouts."""
    lines = [f"{name}: {sizes.total / 1e9:.2f}B parameters, {sizes.active / 1e9:.2f}B active per token", ""]
    lines += [f"  {part:<14} {count / 1e9:>10.3f}B" for part, count in sizes.parts.items()]
    if sizes.adapters:
        lines += [f"  {'adapters':<14} {sizes.adapters / 1e9:>10.3f}B   (only these are trained)"]
    own = need(sizes, plan)
    kept = {"none": "all kept", "full": "layer inputs kept", "selective": "products kept"}[plan.gradient_checkpointing]
    lines += [
        "",
        f"memory of each GPU, GiB: {_name(own.parallel)}, {plan.dtype}, {plan.tokens} tokens a forward, {kept}",
    ]
    for part, size in _parts(own).items():
        lines.append(f"  {part:<14} {'not estimated' if size is None else f'{size / GIB:10.2f}'}")
    lines += [f"  {'total':<14} {own.total / GIB:10.2f}   (the larger of backward pass and step)"]
    if own.state.host:
        lines += [f"  {'on the host':<14} {own.state.host / GIB:10.2f}   (CPU memory of each rank)"]
    gpus = plan.parallel.processes
    sizes_shown = [f"{size:g}" for size in gpu_gib]
    lines += ["", f"layouts on {gpus} GPUs, GiB each; fits with {plan.reserve:.0%} of the GPU left free:"]
    lines += [f"  {'zero':>4} {'expert':>6} {'total':>10}" + "".join(f"{size:>6}" for size in sizes_shown)]
    for layout in layouts(sizes, gpus, plan):
        item = need(sizes, plan, layout)
        marks = "".join(f"{'yes' if fits(item, plan, size) else '-':>6}" for size in gpu_gib)
        lines.append(f"  {layout.zero:>4} {layout.expert:>6} {item.total / GIB:>10.1f}{marks}")
    lines.append("")
    for size in gpu_gib:
        best = fewest(sizes, plan, size)
        found = "no layout fits" if best is None else f"{_name(best.parallel)}, {best.total / GIB:.1f} GiB"
        lines.append(f"fewest GPUs of {size:g} GiB (powers of two): {found}")
    return "\n".join(lines)


def to_json(name: str, sizes: Sizes, plan: PlanConfig, *, gpu_gib: Sequence[float]) -> dict[str, Any]:
    """The same plan as a JSON object, with sizes in bytes."""
    own = need(sizes, plan)
    rows = [need(sizes, plan, layout) for layout in layouts(sizes, plan.parallel.processes, plan)]
    best = {f"{size:g}": fewest(sizes, plan, size) for size in gpu_gib}
    return {
        "model": name,
        "parameters": {**sizes.parts, "total": sizes.total, "active": sizes.active, "adapters": sizes.adapters},
        "plan": plan.model_dump(),
        "memory": {**_parts(own), "total": own.total, "host": own.state.host},
        "layouts": [
            {**item.parallel.model_dump(), "total": item.total,
             "fits": {f"{size:g}": fits(item, plan, size) for size in gpu_gib}}
            for item in rows
        ],
        "fewest": {
            size: None if item is None else {**item.parallel.model_dump(), "total": item.total}
            for size, item in best.items()
        },
    }  # fmt: skip


def _parts(item: Need) -> dict[str, int | None]:
    state = item.state
    return {
        "weights": state.weights,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "buffers": state.buffers,
        "activations": item.activations,
        "KV cache": item.kv,
        "step": state.step,
    }


def _name(parallel: ParallelConfig) -> str:
    offload = ", optimizer offloaded" if parallel.offload != "none" else ""
    return f"{parallel.processes} GPUs, zero {parallel.zero}, expert {parallel.expert}{offload}"
