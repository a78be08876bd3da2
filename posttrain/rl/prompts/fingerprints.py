"""Short hashes of what a result depends on: a policy, how it is sampled and scored, a prompt, a dataset.

Only content counts: a model folder that was moved or touched keeps its fingerprint. Left out: installed packages, and
what a reward imports from elsewhere than its own folder.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.data.rows import row_to_json
from posttrain.errors import CheckpointError
from posttrain.judging.config import EndpointConfig
from posttrain.records import Row
from posttrain.rl.grading.config import GradingConfig, RlJudgeConfig
from posttrain.scoring.plugins.requirements import reward_sources

# Weights, architecture, tokenizer and chat template: all that decides which tokens a policy samples.
_POLICY_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


def policy_fingerprint(path: str | Path) -> str:
    """Hash of every byte of a model folder's weights, configuration, tokenizer and chat template.

    Weights are read whole, several files at a time: two policies may differ in a few tensors only. Raises
    CheckpointError for what is no model folder.
    """
    folder = Path(path).expanduser()
    files = sorted({file for pattern in _POLICY_FILES for file in folder.glob(pattern) if file.is_file()})
    if not (folder / "config.json").is_file() or not any(file.suffix == ".safetensors" for file in files):
        raise CheckpointError(f"{path}: must be a model folder with config.json and *.safetensors")
    with ThreadPoolExecutor(8) as threads:
        hashes = list(threads.map(_file_hash, files))
    return _digest([[file.name, value] for file, value in zip(files, hashes, strict=True)])


def scoring_fingerprint(config: GradingConfig) -> str:
    """Hash of what decides whether a reply passes, beside policy and prompt: the sampling, the type of the weights,
    the reward with its arguments, and the source files in its folder."""
    sources = reward_sources(config.reward.name, config.reward.args)
    beside = sorted({file for source in sources for file in source.parent.glob("*.py")})
    return _digest(
        {
            "reward": [config.reward.name, config.reward.args],
            "judge": None if config.judge is None else _judge(config.judge),
            "sources": sorted([file.name, _file_hash(file)] for file in beside),
            "sampling": config.sampling.model_dump(),
            "dtype": config.model.dtype,
            "correct_threshold": config.reward.correct_threshold,
        }
    )


def _judge(judge: RlJudgeConfig) -> dict[str, Any]:
    """The judge's model and question. The weights behind an endpoint cannot be read, so its address and the model's
    name stand for them."""
    asked, source = judge.model_dump(exclude={"engine", "model", "endpoint"}), judge.source
    if isinstance(source, EndpointConfig):
        seen = source.model_dump(include={"base_url", "model", "top_logprobs", "max_prompt_chars"})
        return {**asked, "endpoint": seen}
    return {**asked, "model": policy_fingerprint(source.path), "dtype": source.dtype}


def prompt_fingerprint(row: Row) -> str:
    """Hash of a row without its id: its messages, and all that a reward may look at."""
    return _digest({name: value for name, value in row_to_json(row).items() if name != "id"})


def dataset_fingerprint(rows: Iterable[Row]) -> str:
    """Hash of the rows with their ids, in their order."""
    return _digest([[row.id, prompt_fingerprint(row)] for row in rows])


def run_fingerprints(model_path: str, rows: Sequence[Row]) -> dict[str, str]:
    """What a checkpoint is bound to: the dataset and the policy that training started from."""
    return {"dataset": dataset_fingerprint(rows), "policy": policy_fingerprint(model_path)}


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


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
