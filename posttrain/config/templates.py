"""The section that says which chat template a model uses, and with which arguments."""

import difflib
import json
from typing import Any

from pydantic import Field, field_validator, model_validator

from posttrain.compat.trl import training_templates
from posttrain.config.base import Config
from posttrain.config.fields import PathText

# Templates of this package, besides the training templates of TRL.
CHATML = "chatml"
# What a template is given by whoever renders, so that no argument may have these names.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


def builtin_names() -> list[str]:
    """The names that `builtin` may have."""
    return sorted({CHATML, *training_templates()})


class ChatTemplateConfig(Config):
    """The chat template of a model. Example: `{builtin: qwen3, arguments: {enable_thinking: false}}`.

    Without `path` and `builtin` it is the model folder's own, here with arguments.
    """

    path: PathText | None = Field(
        default=None, description="File with a Jinja chat template, which takes the place of the model folder's own."
    )
    builtin: str | None = Field(
        default=None,
        description="Name of a family: chatml, or that of one of TRL's training templates, such as qwen3, llama3, "
        "gemma3 or deepseek_r1_distill. It must write a first prompt and its reply as the model's own template does.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Variables that the template reads, such as {enable_thinking: false}."
    )

    @field_validator("builtin")
    @classmethod
    def _is_known(cls, builtin: str | None) -> str | None:
        if builtin is not None and builtin not in (known := builtin_names()):
            near = difflib.get_close_matches(builtin, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"no such template; {hint}; for a template of your own give path")
        return builtin

    @field_validator("arguments")
    @classmethod
    def _can_be_written(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, value in arguments.items():
            if not name.isidentifier() or name in GIVEN:
                rule = "is given by the stage" if name in GIVEN else "is not the name of a variable"
                raise ValueError(f"{name!r} {rule}; remove it")
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                rule = "must be text, a number, true, false, null, or lists and mappings of these"
                raise ValueError(f"{name}: got {value!r}: {rule} ({error})") from None
        return arguments

    @model_validator(mode="after")
    def _one_source(self) -> "ChatTemplateConfig":
        if self.path is not None and self.builtin is not None:
            raise ValueError(f"has both path {self.path!r} and builtin {self.builtin!r}; remove one of them")
        return self
