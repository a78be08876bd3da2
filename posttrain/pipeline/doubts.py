"""Values that are allowed and still mostly a mistake. A run says so and goes on; `validate` says so too."""

from pydantic import BaseModel

from posttrain.config.training import OptimizerConfig
from posttrain.pipeline.inputs import walk

HIGHEST_RATE = 0.01  # ten times what adapters of low rank are trained with


def doubts(config: BaseModel) -> list[str]:
    """One line for each doubtful value, beginning with its key path."""
    return [
        f"{key}.learning_rate: got {section.learning_rate:g}; language models are trained with 1e-7 to 1e-3, and "
        f"mostly diverge above {HIGHEST_RATE:g}"
        for key, section in walk(config)
        if isinstance(section, OptimizerConfig) and section.learning_rate > HIGHEST_RATE
    ]
