"""One stage from Python: `run_stage("sft", config, "runs/sft")` does what `posttrain sft config.yaml` does.

The stage runs as a pipeline of one stage: it is checked before anything starts, runs in a process of its own, and has a
run directory that can be continued. No report is written; `write_report` makes one from the run directory.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.base import Config
from posttrain.pipeline.config import RawPipeline, single_stage
from posttrain.pipeline.run import run_pipeline


@dataclass(frozen=True, slots=True)
class StageResult:
    """The result of one stage.

    folder: the stage's own folder, with metrics.jsonl and log.txt. outputs: {output name: path}, such as {"model":
    Path("runs/sft/sft/model")}. stats: the figures that the stage returned, such as {"steps": 40, "loss_last": 0.8}.
    """

    folder: Path
    outputs: Mapping[str, Path]
    stats: Mapping[str, object]


def run_stage(
    kind: str,
    config: Config | Mapping[str, object] | str | Path,
    run_dir: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> StageResult:
    """Run one stage to its end. A second call with the same input finds it finished and returns the same result.

    kind: base, filter, sft, rl, dpo or eval. config: the stage's config object, a mapping with the keys of its YAML, or
    the path of a YAML file. run_dir: None for runs/KIND. overrides: such as "optimizer.learning_rate=1e-5". overwrite:
    replace a result of another config in `run_dir`; without it that is an error. Raises UserError before anything
    starts, and StageError if the stage failed; the same call then continues it.
    """
    pipeline = as_pipeline(kind, config, overrides, seed=seed)
    summary = run_pipeline(pipeline, run_dir, overwrite=overwrite, command=f"run_stage({kind!r}, ...)")
    place = Path(run_dir or Path("runs") / kind)
    (record,) = summary.stages
    outputs = {name: place / path for name, path in record["outputs"].items()}
    return StageResult(place / kind, outputs, record["stats"] or {})


def evaluate(
    config: Config | Mapping[str, object] | str | Path,
    run_dir: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure a policy on held-out prompts: run the eval stage and return the content of its results.json.

    Returns {capability: {"n": number of prompts, "greedy": accuracy in [0, 1], "greedy_ci95": [low, high], "pass@1":
    ...}}. The entry "all" is over all capabilities together. The arguments and errors are those of `run_stage`.
    """
    result = run_stage("eval", config, run_dir, overrides=overrides, seed=seed, overwrite=overwrite)
    return json.loads(result.outputs["results"].read_text())


def as_pipeline(
    kind: str, config: Config | Mapping[str, object] | str | Path, overrides: Sequence[str] = (), *, seed: int = 0
) -> RawPipeline:
    """A pipeline whose only stage is this one."""
    if isinstance(config, Config):
        config = config.model_dump()
    return single_stage(kind, config, overrides, seed=seed)
