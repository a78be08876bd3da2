"""Config values that are allowed but usually a mistake. `validate` and a run print them, and the run continues."""

from pydantic import BaseModel

from posttrain.config.training import OptimizerConfig
from posttrain.pipeline.inputs import walk
from posttrain.rl.config import RlConfig

HIGHEST_RATE = 0.01  # ten times a usual learning rate for adapters of low rank


def doubts(config: BaseModel) -> list[str]:
    """One line for each doubtful value, beginning with its key path."""
    rates = [
        f"{key}.learning_rate: got {section.learning_rate:g}; language models are trained with 1e-7 to 1e-3, and "
        f"mostly diverge above {HIGHEST_RATE:g}"
        for key, section in walk(config)
        if isinstance(section, OptimizerConfig) and section.learning_rate > HIGHEST_RATE
    ]
    return [*rates, *_long_rollouts(config)]


def _long_rollouts(config: BaseModel) -> list[str]:
    """Rollouts that are longer than a micro-batch. Nothing is said where the model alone decides their length."""
    if not isinstance(config, RlConfig) or (longest := config.engine.max_model_len or 0) <= config.micro_batch_tokens:
        return []
    return [
        f"micro_batch_tokens: got {config.micro_batch_tokens}; a rollout may have {longest} tokens "
        "(engine.max_model_len), and one that is longer than a micro-batch is run whole, in a forward that needs more "
        "memory; raise micro_batch_tokens, or lower engine.max_model_len"
    ]
