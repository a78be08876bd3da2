"""Routers of a native Llama 4 in a TRL training: their losses, their bias, and their figures for metrics.

TRL computes its losses from hidden states, and its own balance loss does not know Llama 4; so the losses on routers
are taken from the layers' output and added to whatever loss TRL makes.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from posttrain.compat.transformers import sums_over_forwards
from posttrain.model.router_bias import RouterBias, native_layers
from posttrain.model.router_stats import RouterStats

ROUTER_METRICS = {name: name for name in ("router_entropy", "expert_load_max", "dead_experts")}
STATE = "router_bias.json"


class RouterLossTrainer:
    """Mixed into a TRL trainer class, before it: the loss of each forward includes that on its routers."""

    model: Any
    current_gradient_accumulation_steps: int

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        layers = native_layers(self.model)
        taken: list[Any] = []
        hook = layers and layers.register_forward_hook(lambda module, given, output: taken.append(output.router_loss))
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        finally:
            if hook:
                hook.remove()
        losses = [item for item in taken if item is not None]
        if not losses:
            return loss
        # A loss that is divided by the tokens of all forwards of a step is summed over them; ours is a mean of each.
        forwards = self.current_gradient_accumulation_steps if sums_over_forwards(self, num_items_in_batch) else 1
        added = sum(losses) / forwards
        return (loss[0] + added, loss[1]) if return_outputs else loss + added


def with_router_loss(trainer_class: type) -> type:
    """A TRL trainer class whose loss includes that on routers."""
    return type(trainer_class.__name__, (RouterLossTrainer, trainer_class), {})


def figures(stats: RouterStats) -> dict[str, float]:
    """router_entropy: mean over layers, nats. expert_load_max: the largest load of an expert, as a multiple of an even
    one. dead_experts: those of all layers that no token went to."""
    return {
        "router_entropy": float(stats.entropy_L.mean()),
        "expert_load_max": float(stats.load_LE.max() * stats.load_LE.shape[-1]),
        "dead_experts": int(stats.dead_L.sum()),
    }


class RouterCallback(TrainerCallback):
    """Moves the bias after each step, adds figures of the step to what is logged, keeps the bias in checkpoints.

    resumed: the checkpoint that training goes on from, or None.
    """

    def __init__(self, model: Any, rate: float, resumed: Path | None):
        self.bias = RouterBias(model, rate)
        self._figures: dict[str, float] = {}
        if resumed is not None:
            self.bias.load_state(json.loads((resumed / STATE).read_text()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stats = self.bias.update(min(1.0, state.global_step / state.max_steps))
        self._figures = {} if stats is None else figures(stats)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            logs.update(self._figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
            path.write_text(json.dumps(self.bias.state()) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bias.close()
