"""posttrain: the post-training recipe behind Llama 4, from a judge-made filter to light DPO.

This module offers the names that a notebook needs. Each name is imported when it is first used, so `import posttrain`
alone loads neither torch, Ray nor vLLM. docs/python.md shows how to use them.

    run_pipeline, run_stage, evaluate       run a pipeline, a stage or an evaluation, as the commands do
    load_rows, write_rows, load_pairs       read and write datasets
    filter_rows, select                     let a judge rate rows, and select rows by their ratings
    load_image                              a picture of a row, in a reward
    load_model, load_tokenizer, save_model  read and write model folders
    LOSSES, LossInputs, LossConfig          the losses of RL, as functions of tensors
    ADVANTAGES                              the advantages of RL, as functions of rewards
    Trainer, StepResult                     types: the methods that RL calls on its trainer, and the result of a step
    read_rollouts                           the rollouts that an RL stage recorded
    write_report                            one HTML page about a run
"""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.context import StageContext
    from posttrain.data.images.references import load_image
    from posttrain.data.pairs import Pair, load_pairs, write_pairs
    from posttrain.data.rows import load_rows, write_rows
    from posttrain.errors import DataError, StageError, UserError
    from posttrain.filtering.selection import select
    from posttrain.filtering.stage import FilterResult, filter_rows
    from posttrain.model.load import load_model, save_model
    from posttrain.model.tokenizer import load_tokenizer
    from posttrain.pipeline.ray_session import ray_session
    from posttrain.pipeline.run import run_pipeline
    from posttrain.pipeline.single import StageResult, evaluate, run_stage
    from posttrain.pipeline.summary import Summary
    from posttrain.records import Message, RewardResult, Rollout, Row
    from posttrain.report.write import write_report
    from posttrain.rl.advantages import ADVANTAGES
    from posttrain.rl.history.recorded import RecordedRollout, read_rollouts
    from posttrain.rl.loss_config import LossConfig
    from posttrain.rl.losses import LOSSES, LossInputs, LossOutputs
    from posttrain.rl.training.protocol import StepResult, Trainer

__version__ = "0.1.0"

_HOMES = {
    "context": ["StageContext"],
    "data.images.references": ["load_image"],
    "data.pairs": ["Pair", "load_pairs", "write_pairs"],
    "data.rows": ["load_rows", "write_rows"],
    "errors": ["DataError", "StageError", "UserError"],
    "filtering.selection": ["select"],
    "filtering.stage": ["FilterResult", "filter_rows"],
    "model.load": ["load_model", "save_model"],
    "model.tokenizer": ["load_tokenizer"],
    "pipeline.ray_session": ["ray_session"],
    "pipeline.run": ["run_pipeline"],
    "pipeline.single": ["StageResult", "evaluate", "run_stage"],
    "pipeline.summary": ["Summary"],
    "records": ["Message", "RewardResult", "Rollout", "Row"],
    "report.write": ["write_report"],
    "rl.advantages": ["ADVANTAGES"],
    "rl.history.recorded": ["RecordedRollout", "read_rollouts"],
    "rl.loss_config": ["LossConfig"],
    "rl.losses": ["LOSSES", "LossInputs", "LossOutputs"],
    "rl.training.protocol": ["StepResult", "Trainer"],
}

__all__ = [
    "ADVANTAGES",
    "LOSSES",
    "DataError",
    "FilterResult",
    "LossConfig",
    "LossInputs",
    "LossOutputs",
    "Message",
    "Pair",
    "RecordedRollout",
    "RewardResult",
    "Rollout",
    "Row",
    "StageContext",
    "StageError",
    "StageResult",
    "StepResult",
    "Summary",
    "Trainer",
    "UserError",
    "__version__",
    "evaluate",
    "filter_rows",
    "load_image",
    "load_model",
    "load_pairs",
    "load_rows",
    "load_tokenizer",
    "ray_session",
    "read_rollouts",
    "run_pipeline",
    "run_stage",
    "save_model",
    "select",
    "write_pairs",
    "write_report",
    "write_rows",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
