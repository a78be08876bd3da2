"""The config section `held_out`, which SFT and DPO share: rows that are not trained on and measure the training."""

from typing import Annotated

from pydantic import Field, model_validator

from posttrain.config.base import MAY_GROW, Config
from posttrain.config.fields import PathText
from posttrain.config.models import ModelConfig

Count = Annotated[int, Field(ge=1)]


class HeldOutConfig(Config):
    """Rows on which the loss is measured during the training, and what is made of it.

    Example: `held_out: {fraction: 0.05, every: 50, keep_best: true, patience: 3}`.
    """

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Share of the rows that is held out, chosen by a hash of each row's prompt."
    )
    rows: Count | None = Field(default=None, description="Number of rows that are held out, instead of fraction.")
    path: PathText | None = Field(
        default=None, description="A file or folder with other rows, of the same shape as those that are trained on."
    )
    every: Count = Field(
        default=50,
        description="Optimizer steps between evaluations. There is one before the first step and after the last too.",
    )
    keep_best: bool = Field(
        default=False,
        description="The result is the model of the evaluation with the lowest loss, not that of the last step.",
    )
    patience: Count | None = Field(
        default=None,
        description="End the training after this many evaluations in a row without a lower loss; null trains to the "
        "end.",
        json_schema_extra=MAY_GROW,
    )

    @model_validator(mode="after")
    def _one_source(self) -> "HeldOutConfig":
        given = [name for name in ("fraction", "rows", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(f"got {found}: exactly one of fraction, rows and path says which rows are held out")
        return self

    def count(self, total: int) -> int:
        """How many of `total` rows are held out; at least one. Only for `fraction` and `rows`."""
        return self.rows if self.rows is not None else max(1, round((self.fraction or 0.0) * total))


def check_held_out(held_out: HeldOutConfig | None, model: ModelConfig) -> None:
    """Raise ValueError if the best model could not be kept as it was measured."""
    if held_out is not None and held_out.keep_best and model.router.bias_rate:
        raise ValueError(
            f"held_out.keep_best: got true with model.router.bias_rate {model.router.bias_rate:g}, whose bias fades "
            "to 0 only at the last step, so that the model of an earlier step could not be exported as it was "
            "measured; set one of the two to its default"
        )
