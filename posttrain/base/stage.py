"""The stage `base`: train the quick start's model from random weights, and write its datasets.

The result depends on the config and the seed alone. A base that was trained before is taken from the cache, and a
training that was cut goes on from its checkpoint. The datasets take no time, and are always written.
"""

import time
from collections.abc import Mapping
from typing import Any

from posttrain.base.cache import cache_key, fetch, store
from posttrain.base.config import StageConfig
from posttrain.base.courses import COURSES
from posttrain.base.sets import draw_sets, write_sets
from posttrain.base.train import train_base
from posttrain.context import StageContext
from posttrain.files import keep_lines, remove, replacing

_METRICS_EVERY = 10


def run(config: StageConfig, context: StageContext) -> dict[str, Any]:
    """Write `model/` and `data/*.jsonl` into the stage's folder.

    Returns paths: model, sft_data, prompts, heldout, tune. Raises `StageError` if training fails.
    """
    course = COURSES[config.puzzles]
    sets = draw_sets(context.seed, config.sets, course.puzzles)
    data = write_sets(
        sets, context.dir / "data", context.seed, puzzles=course.puzzles, with_systems=course.with_systems
    )
    model = context.dir / "model"
    remove(model)
    key = _cache_entry(config, context.seed)
    if key and fetch(key, model):
        context.event("cached", key=key)
        context.progress(config.steps, config.steps, "steps")
    else:
        _train(config, context)
        if key:
            store(key, model)
    return {
        "model": str(model),
        "sft_data": str(data["sft"]),
        "prompts": str(data["prompts"]),
        "heldout": str(data["heldout"]),
        "tune": str(data["tune"]),
    }


def _cache_entry(config: StageConfig, seed: int) -> str:
    """The key of the base in the cache; empty if the config does not use the cache."""
    return cache_key(config, seed) if config.cache else ""


def _train(config: StageConfig, context: StageContext) -> None:
    scratch, checkpoints = context.dir / "scratch", context.dir / "checkpoints"
    remove(scratch)
    scratch.mkdir(parents=True)
    started = time.time()
    reporter = _Reporter(config, context)
    with replacing(context.dir / "model") as aside:
        train_base(config, context.seed, aside, scratch=scratch, checkpoints=checkpoints, on_step=reporter.on_step)
    ended = time.time()
    for rank in range(config.processes):
        context.busy(f"trainer-{rank}", "base training", start=started, end=ended)
    remove(scratch)
    remove(checkpoints)


class _Reporter:
    """Reports the line of each step as progress, and means over `_METRICS_EVERY` steps as metrics.

    The first line tells where the training begins. Metrics of later steps, from before it was cut, are removed.
    """

    def __init__(self, config: StageConfig, context: StageContext):
        self._steps = config.steps
        self._context = context
        self._window: list[Mapping[str, Any]] = []
        self._has_begun = False

    def on_step(self, values: Mapping[str, Any]) -> None:
        step = int(values["step"])
        if not self._has_begun:
            self._has_begun = True
            self._begin(step - 1)
        self._window.append(values)
        self._context.progress(step, self._steps, "steps", values={"loss": round(values["loss"], 3)})
        if step % _METRICS_EVERY and step < self._steps:
            return
        reply_tokens = sum(line["reply_tokens"] for line in self._window)
        metrics = {
            "loss": sum(line["loss"] * line["reply_tokens"] for line in self._window) / reply_tokens,
            "tokens_per_s": sum(line["tokens"] for line in self._window) / sum(line["step_s"] for line in self._window),
            "reply_tokens": reply_tokens,
            "lr_scale": values["lr_scale"],
        }
        self._context.metrics(step, metrics)
        self._window.clear()

    def _begin(self, done: int) -> None:
        keep_lines(self._context.dir / "metrics.jsonl", lambda line: line["step"] <= done)
        if done:
            self._context.event("resumed", step=done)
