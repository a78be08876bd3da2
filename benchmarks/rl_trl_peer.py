"""TRL's side of rl_trl.py: GRPOTrainer in a process of its own, or in several under torchrun.

    python benchmarks/rl_trl_peer.py SPEC.json

The keys of the spec: model, prompts, out, seed, seconds (of training, after which it stops), every (steps between two
saved policies), threads, settings (of GRPOConfig).

It writes into `out`: began.json (the Unix time at which training began), steps.jsonl (one line for each step: step,
seconds of training, reply tokens so far, mean reward of the replies if there are new ones) and step_N/ (policies). The
seconds do not include the time for writing policies.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from posttrain.config.data import DataConfig
from posttrain.data.messages import messages_to_json
from posttrain.data.rows import load_rows
from posttrain.records import FinishReason, Prompt, Rollout, Segment
from posttrain.scoring.plugins.lookup import load_reward


class Clock(TrainerCallback):
    """Records the time of each step, saves policies, and ends the training when its time is up."""

    def __init__(self, spec: dict[str, Any]):
        self._spec = spec
        self._out = Path(spec["out"])
        self._began = 0.0
        self._aside_s = 0.0
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.is_world_process_zero:
            (self._out / "began.json").write_text(json.dumps({"time": time.time()}))
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        over = torch.tensor(float(self._seconds() > self._spec["seconds"]))
        if args.world_size > 1:
            torch.distributed.all_reduce(over)  # all stop at the same step
        control.should_training_stop |= bool(over)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **objects: Any) -> None:
        """After each step. After a step that generated, the logs describe the replies of all processes."""
        if "loss" not in logs:
            return
        seconds, now = self._seconds(), time.perf_counter()
        self._tokens += logs.get("completions/mean_length", 0.0) * args.generation_batch_size
        if state.is_world_process_zero:
            step = state.global_step
            if step % self._spec["every"] == 0:
                objects["model"].save_pretrained(self._out / f"step_{step}")
                objects["processing_class"].save_pretrained(self._out / f"step_{step}")
            line = {"step": step, "seconds": seconds, "tokens": self._tokens, "reward": logs.get("reward")}
            with (self._out / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._aside_s += time.perf_counter() - now

    def _seconds(self) -> float:
        return time.perf_counter() - self._began - self._aside_s


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    rows = {row.id: row for row in load_rows(DataConfig(path=spec["prompts"]), kind="prompt")}
    data = Dataset.from_list([{"prompt": messages_to_json(row.messages), "row": name} for name, row in rows.items()])
    ends = set(model.generation_config.eos_token_id)
    puzzles: Any = load_reward("puzzles")

    def reward(completions: list[Any], completion_ids: list[list[int]], row: list[str], **_: Any) -> list[float | None]:
        """Score each reply with our scorer, which is also told how the reply ended."""
        return [
            puzzles(_rollout(name, reply[0]["content"], ids, has_ended=ids[-1] in ends), rows[name]).value
            for name, reply, ids in zip(row, completions, completion_ids, strict=True)
        ]

    arguments = GRPOConfig(
        output_dir=spec["out"], seed=spec["seed"], use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_steps=1, max_steps=1_000_000, **spec["settings"],
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer,
        callbacks=[Clock(spec)],
    )  # fmt: skip
    trainer.train()


def _rollout(row_id: str, text: str, ids: list[int], *, has_ended: bool) -> Rollout:
    """A reply of TRL as the rollout that our scorer takes."""
    reason = FinishReason.STOP if has_ended else FinishReason.LENGTH
    return Rollout(row_id, row_id, 0, Prompt((), ()), (Segment(tuple(ids), True, ()),), text, reason)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
