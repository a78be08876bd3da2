"""The routers of a native Llama 4 in a training with TRL: the bias that balances experts, and figures for metrics."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.files import write_json
from posttrain.model.router_balance import RouterBalance
from posttrain.train.routers import figures

ROUTER_METRICS = {name: name for name in ("router_entropy", "expert_load_max", "dead_experts")}
STATE = "router_balance.json"


class RouterCallback(TrainerCallback):
    """Updates the `RouterBalance` after each step, logs its figures, and saves it in checkpoints.

    resumed: the checkpoint from which training continues, or None.
    """

    def __init__(self, model: Any, bias_rate: float, resumed: Path | None):
        self.balance = RouterBalance(model, bias_rate)
        self._figures: dict[str, float] = {}
        if resumed is not None:
            self.balance.load_state(json.loads((resumed / STATE).read_text()))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        stats = self.balance.update(min(1.0, state.global_step / state.max_steps))
        self._figures = {} if stats is None else figures(stats)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: object) -> None:
        if logs and "loss" in logs:
            logs.update(self._figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE, self.balance.state())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.balance.close()
