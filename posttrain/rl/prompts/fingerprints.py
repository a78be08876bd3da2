"""Short hashes of what a result depends on: a policy, how it is sampled and scored, a prompt, a dataset.

Only content counts: a model folder that was moved or touched keeps its fingerprint. Left out: installed packages, and
what a reward imports from elsewhere than its own folder.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.rows import row_to_json
from posttrain.errors import CheckpointError
from posttrain.files import content_hash
from posttrain.judging.cache import judge_identity
from posttrain.model.fingerprint import model_fingerprint
from posttrain.records import Row
from posttrain.rl.grading.config import GradingConfig, RlJudgeConfig
from posttrain.scoring.plugins.requirements import reward_sources


def scoring_fingerprint(config: GradingConfig) -> str:
    """Hash of what decides whether a reply passes, beside policy and prompt: the sampling, the type of the weights,
    the reward with its arguments, and the source files in its folder."""
    sources = reward_sources(config.reward.name, config.reward.args)
    beside = sorted({file for source in sources for file in source.parent.glob("*.py")})
    return _digest(
        {
            "reward": [config.reward.name, config.reward.args],
            "judge": None if config.judge is None else _judge(config.judge),
            "sources": sorted([file.name, content_hash(file)] for file in beside),
            "sampling": config.sampling.model_dump(),
            "dtype": config.model.dtype,
            "correct_threshold": config.reward.correct_threshold,
        }
    )


def _judge(judge: RlJudgeConfig) -> dict[str, Any]:
    """The judge's model and question."""
    asked = judge.model_dump(include={"template", "labels", "long_rows"})
    return {**asked, "prompt_limit": judge.prompt_limit, "judge": judge_identity(judge)}


def prompt_fingerprint(row: Row) -> str:
    """Hash of a row without its id: its messages, and all that a reward may look at."""
    return _digest({name: value for name, value in row_to_json(row).items() if name != "id"})


def dataset_fingerprint(rows: Iterable[Row]) -> str:
    """Hash of the rows with their ids, in their order."""
    return _digest([[row.id, prompt_fingerprint(row)] for row in rows])


def run_fingerprints(model_path: str, rows: Sequence[Row]) -> dict[str, str]:
    """What a checkpoint is bound to: the dataset and the policy that training started from."""
    return {"dataset": dataset_fingerprint(rows), "policy": model_fingerprint(model_path)}


def check_resumed(saved: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Whether a checkpoint belongs to what would be trained now. `folder`: that of the checkpoint.

    Raises CheckpointError that says what changed and what to do.
    """
    what = {
        "dataset": "prompts: their rows changed since the run began",
        "policy": "model.path: holds another model than the run began with",
    }
    changed = [
        f"{rule} (fingerprint {saved[name]}, now {now[name]})"
        for name, rule in what.items()
        if name in saved and saved[name] != now[name]
    ]
    if changed:
        raise CheckpointError(
            f"{'; '.join(changed)}; {folder} cannot go on from there: give back what it began with, "
            "or start anew in another run directory"
        )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
