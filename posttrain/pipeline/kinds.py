"""The table of the kinds of stage: for each kind its config schema, the function that runs it, and its files.

A new kind is one more line here; nothing is registered elsewhere. Modules are named as text and imported when a stage
of that kind is used, so reading the table imports nothing heavy.
"""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.config.base import Config

Rows = Literal["supervised", "prompt", "pairs", "any"]


@dataclass(frozen=True, slots=True)
class StageKind:
    """What the pipeline knows about one kind of stage.

    schema: `module:Class` of its config, which must not import torch.
    run: `module:function`, called as `run(config, context, **joined)`.
    outputs: the name in `${stage.name}` to a path below the stage's folder. The first output exists after every run.
    data: key path of a dataset in the config to the kind of rows that it must hold.
    paths: key paths of other files and folders that the stage reads.
    packages: import names of the packages that must be installed.
    checkpoints: pattern of a complete checkpoint below the stage's folder; the number in its name is the step.
    progress: other files that hold work of an unfinished stage.
    joined: further arguments of `run`, `module:name` each: what it uses of parts that it may not import.
    trains_itself: True if the stage's own process does the work and gets `resources.trainer`. Otherwise it only
    directs actors, which have resources of their own.
    """

    schema: str
    run: str
    outputs: Mapping[str, str]
    data: Mapping[str, Rows] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    checkpoints: str = "checkpoints/step_*"
    progress: tuple[str, ...] = ()
    joined: Mapping[str, str] = field(default_factory=dict)
    trains_itself: bool = True


KINDS: dict[str, StageKind] = {
    "base": StageKind(
        schema="posttrain.base.config:StageConfig",
        run="posttrain.base.stage:run",
        outputs={
            "model": "model",
            "sft_data": "data/sft.jsonl",
            "prompts": "data/prompts.jsonl",
            "heldout": "data/heldout.jsonl",
            "tune": "data/tune.jsonl",
        },
        packages=("torch", "transformers"),
    ),
    "filter": StageKind(
        schema="posttrain.filtering.config:FilterConfig",
        run="posttrain.filtering.stage:run",
        outputs={"kept": "kept.jsonl", "dropped": "dropped.jsonl"},
        data={"data": "supervised", "decontaminate": "any"},
        packages=("torch", "transformers", "vllm"),
        trains_itself=False,
    ),
    "sft": StageKind(
        schema="posttrain.sft.config:SftConfig",
        run="posttrain.sft.stage:run",
        outputs={"model": "model"},
        data={"data": "supervised"},
        paths=("held_out.path",),
        packages=("torch", "transformers", "trl", "peft", "deepspeed"),
        trains_itself=False,
    ),
    "rl": StageKind(
        schema="posttrain.rl.config:RlConfig",
        run="posttrain.rl.stage:run",
        outputs={"model": "model", "rollouts": "rollouts"},
        data={"prompts": "prompt", "evaluation.data": "prompt"},
        paths=("loss.reference.path",),
        packages=("torch", "transformers", "deepspeed", "vllm"),
        checkpoints="checkpoints/step_*/ledger.sqlite",
        progress=("difficulty.parquet",),
        joined={"choose_engines": "posttrain.forecast.engines:choose_for_run"},
        trains_itself=False,
    ),
    "dpo": StageKind(
        schema="posttrain.dpo.config:DpoConfig",
        run="posttrain.dpo.stage:run",
        outputs={"model": "model", "pairs": "pairs.jsonl"},
        data={"pairs": "pairs"},
        paths=("rollouts", "held_out.path"),
        packages=("torch", "transformers", "trl", "peft", "deepspeed"),
        trains_itself=False,
    ),
    "eval": StageKind(
        schema="posttrain.eval.config:EvalConfig",
        run="posttrain.eval.stage:run",
        outputs={"results": "results.json"},
        data={"data": "prompt", "exclude": "any"},
        packages=("torch", "transformers", "vllm"),
        trains_itself=False,
    ),
}


def load_object(target: str) -> Any:
    """Import the object that a `module:name` text names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def load_schema(kind: StageKind) -> type[Config]:
    """The config class of a kind; importing it must not import torch."""
    return load_object(kind.schema)


def kind_name(kind: StageKind) -> str | None:
    """The name of a kind in the table; None for a kind that is not in it, such as one in a test."""
    return next((name for name, known in KINDS.items() if known is kind), None)


def unknown_kind(kind: str) -> str:
    """The error message for a kind that is not in the table."""
    near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(KINDS)}"
    return f"got {kind!r}: no such kind of stage; {hint}"
