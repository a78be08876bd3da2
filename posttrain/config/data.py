"""Sections that name files of rows or pairs, and how they are read."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.config.base import Config
from posttrain.config.fields import PathText, Positive

NEAR_FLOOR = 0.3  # below it, nearly all rows would be candidates


class FilesConfig(Config):
    """Records of any kind: JSON lines, JSON, Parquet or CSV files, a folder of such files, or a saved `datasets`
    folder.
    """

    path: PathText | list[PathText] = Field(
        description="A file or folder, or a list of them; in a pipeline also ${stage.output}."
    )
    limit: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Number of rows to use, from the first on; null uses all."
    )


class DataConfig(FilesConfig):
    """A dataset of rows or preference pairs. Example: `{path: data/train.jsonl, capability: math}`."""

    capability: str = Field(default="general", description="Capability of the rows that do not name one themselves.")
    format: Literal["messages", "prompt_completion", "sharegpt", "alpaca", "kto", "text", "pairs"] | None = Field(
        default=None,
        description="The shape of the rows, see docs/data.md; null tells it from the columns of each row.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Which columns of the data hold what, the name that is used here first: "
        "{prompt: question, completion: answer}.",
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="Other names of roles in the data and what they mean, such as {developer: system}.",
    )
    weights: list[Positive] | None = Field(
        default=None,
        description="How often a row is drawn from each path, relative to the others, until the first path has no more "
        "rows; null reads the paths one after another.",
    )
    mix_seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of the draws that `weights` ask for.")
    on_bad_row: Literal["fail", "set_aside"] = Field(
        default="fail",
        description="What to do with a row that cannot be used. fail: stop, and name the first of them. set_aside: "
        "leave it out, write it to set_aside_NAME.jsonl in the stage's folder, NAME being its file's, with what is "
        "wrong, and say how many.",
    )
    special_tokens_in_text: Literal["encode", "refuse"] = Field(
        default="encode",
        description="What to do with a special token, such as <|im_end|>, in the text of a row. encode makes it plain "
        "text, so that no row can forge a turn; refuse makes it an error.",
    )

    @model_validator(mode="after")
    def _weighs_each_path(self) -> "DataConfig":
        paths = [self.path] if isinstance(self.path, str) else self.path
        if self.weights is not None and len(self.weights) != len(paths):
            raise ValueError(
                f"weights: got {len(self.weights)} for {len(paths)} paths; give one for each entry of path"
            )
        return self


class DedupConfig(Config):
    """Which rows repeat an earlier one and are removed. Example: `dedup: {near: 0.9}`; `dedup: {}` for equal ones."""

    near: Annotated[float, Field(ge=NEAR_FLOOR, lt=1)] | None = Field(
        default=None,
        description="Also remove a row each of whose texts shares at least this part of its 5-word shingles with an "
        "earlier row; null removes only equal rows.",
    )


class EvaluationSetsConfig(FilesConfig):
    """Evaluation sets whose text no row may contain. Example: `decontaminate: {path: [heldout.jsonl, tune.jsonl]}`."""

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Which columns of these sets hold what, where a row has them: {prompt: question}.",
    )
    ngram: Annotated[int, Field(ge=4)] = Field(
        default=13, description="Words in a run that counts as shared. Shorter prompts are compared as a whole."
    )
    overlap: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="The least share of an evaluation text's words in shared runs that removes a row."
    )

    @property
    def paths(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path
