"""Fingerprints, which are short hashes of all that a pass rate depends on: how replies are sampled and scored, the
prompt and the dataset.

A fingerprint covers content only, so a model folder that was moved keeps its fingerprint. It does not cover installed
packages, nor modules that a reward imports from outside its own folder.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.config.training import ParallelConfig
from posttrain.data.rows import row_to_json
from posttrain.data.templates import template_identity
from posttrain.errors import CheckpointError
from posttrain.files import content_hash
from posttrain.judging.cache import judge_identity
from posttrain.model.fingerprint import model_fingerprint
from posttrain.records import Row
from posttrain.rl.grading.config import GradingConfig, RlJudgeConfig
from posttrain.scoring.plugins.requirements import environment_sources, reward_sources


def scoring_fingerprint(config: GradingConfig) -> str:
    """Fingerprint of everything, apart from policy and prompt, that decides whether a reply passes.

    It covers the sampling, the data type of the weights, the chat template of the config, the judge, and the reward
    with its arguments and the source files in its folder.
    """
    sources = reward_sources(config.reward.name, config.reward.args)
    functions = config.environment.functions.values() if config.environment is not None else ()
    sources += [source for function in functions for source in environment_sources(function.name, function.args)]
    beside = sorted({file for source in sources for file in source.parent.glob("*.py")})
    return _digest(
        {
            **({"environment": config.environment.model_dump()} if config.environment is not None else {}),
            "reward": [config.reward.name, config.reward.args],
            "judge": None if config.judge is None else _judge(config.judge),
            "sources": sorted([file.name, content_hash(file)] for file in beside),
            "sampling": config.sampling.model_dump(),
            "dtype": config.model.dtype,
            "chat_template": template_identity(config.model.chat_template),
            "correct_threshold": config.reward.correct_threshold,
        }
    )


def _judge(judge: RlJudgeConfig) -> dict[str, Any]:
    """What decides the judge's ratings: its model or endpoint, and its question."""
    asked = judge.model_dump(include={"template", "labels", "long_rows"})
    template = template_identity(judge.model.chat_template) if judge.model is not None else None
    return {**asked, "prompt_limit": judge.prompt_limit, "judge": judge_identity(judge), "chat_template": template}


def prompt_fingerprint(row: Row) -> str:
    """Fingerprint of a row without its id: the messages, and every field that a reward can read."""
    return _digest({name: value for name, value in row_to_json(row).items() if name != "id"})


def dataset_fingerprint(rows: Iterable[Row]) -> str:
    """Fingerprint of the rows with their ids, in their order."""
    total = hashlib.sha256(b"[")  # as `_digest` of the whole list, of which one item at a time is in memory
    for place, row in enumerate(rows):
        item = json.dumps([row.id, prompt_fingerprint(row)])
        total.update(f"{', ' if place else ''}{item}".encode())
    total.update(b"]")
    return total.hexdigest()[:16]


def run_fingerprints(model_path: str, rows: Sequence[Row], ranks: ParallelConfig | None = None) -> dict[str, str]:
    """Fingerprints of the dataset and of the policy that the training starts from, which each checkpoint records.

    ranks: of the trainer, if the result depends on them; None: the run may continue on others.
    """
    own = {"ranks": ranks.model_dump_json(exclude={"offload"})} if ranks is not None else {}
    return {"dataset": dataset_fingerprint(rows), "policy": model_fingerprint(model_path), **own}


def check_resumed(saved: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Check that a checkpoint belongs to the dataset and policy of this run.

    saved: the fingerprints in the checkpoint; now: those of this run, see `run_fingerprints`. folder: the checkpoint's
    folder. Raises CheckpointError, which says what changed and what to do.
    """
    what = {
        "dataset": "prompts: the rows have changed since the run began",
        "policy": "model.path: this is not the model that the run began with",
        "ranks": "parallel: a deterministic run keeps its ranks, for other ranks round otherwise",
    }
    changed = [
        f"{rule} (fingerprint {saved[name]}, now {now[name]})"
        for name, rule in what.items()
        if name in saved and name in now and saved[name] != now[name]
    ]
    if changed:
        raise CheckpointError(
            f"{'; '.join(changed)}; training cannot continue from {folder}. Restore what the run began with, or start "
            "again in another run directory"
        )


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
