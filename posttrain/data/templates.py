"""Gives a tokenizer its chat template: its own, one from a file, or a built-in one, with arguments written into it.

The tokenizer object itself is changed. So prompts, training, pairs and the judge all use the same template, and a
saved model folder contains the template with which the model was trained.

An argument such as `enable_thinking: false` becomes a default at the beginning of the template. A program that renders
with the saved folder gets the same tokens, and can still pass another value.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.compat.trl import training_templates
from posttrain.config.templates import CHATML, GIVEN, ChatTemplateConfig
from posttrain.errors import CheckpointError, ConfigError

CHATML_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_ASKED = [{"role": "user", "content": "Which?"}]
_ANSWERED = [*_ASKED, {"role": "assistant", "content": "This."}]
_SHOWN = 60
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def chat_template(tokenizer: Any) -> str:
    """The text of the tokenizer's chat template. Raises `CheckpointError` if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise CheckpointError(
            f"{name}: the tokenizer has no chat template; set chat_template: {{path: FILE}} or {{builtin: chatml}} "
            "beside the model's path, put a chat_template.jinja into the folder that `model.path` names, or point "
            "`model.path` at an instruction-tuned checkpoint"
        )
    return template


def use_template(tokenizer: Any, config: ChatTemplateConfig | None) -> None:
    """Give a tokenizer the chat template of a config. None leaves the tokenizer as it is.

    Raises `ConfigError` for a file that is no template, for a built-in template that renders a prompt or a reply
    differently from the tokenizer's own, and for an argument that the template does not read. Raises `CheckpointError`
    for arguments to a template that the tokenizer does not have.
    """
    if config is None:
        return
    own = tokenizer.chat_template
    if config.path is not None:
        tokenizer.chat_template = _read(Path(config.path))
        _check_syntax(tokenizer, config.path)
    elif config.builtin is not None:
        tokenizer.chat_template = builtin_template(config.builtin)
    tokenizer.chat_template = with_arguments(tokenizer, config.arguments)
    if config.builtin is not None and own:
        _require_same(tokenizer, own, config)


def template_identity(config: ChatTemplateConfig | None) -> Any:
    """A JSON value for cache keys: the text of the template that replaces the tokenizer's own, and the arguments."""
    if config is None:
        return None
    text = None
    if config.path is not None:
        text = _read(Path(config.path))
    elif config.builtin is not None:
        text = builtin_template(config.builtin)
    return {"text": text, "arguments": config.arguments}


def builtin_template(name: str) -> str:
    """The text of a built-in template."""
    return CHATML_TEMPLATE if name == CHATML else training_templates()[name].read_text(encoding="utf-8")


def with_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> Any:
    """The tokenizer's chat template (or templates by name) with `arguments` as defaults of its variables.

    Raises `ConfigError` for an argument that no template reads.
    """
    if not arguments:
        return tokenizer.chat_template
    given: Any = tokenizer.chat_template
    texts = dict(given) if isinstance(given, Mapping) else {"default": chat_template(tokenizer)}
    for name, value in arguments.items():
        if not any(name in variables(text) for text in texts.values()):
            read = sorted({found for text in texts.values() for found in variables(text)})
            known = f"it reads {', '.join(read)}" if read else "it reads none"
            raise ConfigError(
                "chat_template",
                [f"arguments.{name}: got {value!r}, but the chat template reads no such variable; {known}"],
            )
    # The line ends with an expression, because Jinja drops a newline after a statement, which would be the template's.
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in arguments.items()
    ]
    head = "".join(lines) + "{{- '' }}"
    changed = {key: head + text for key, text in texts.items()}
    return changed if isinstance(given, Mapping) else changed["default"]


def variables(template: str) -> set[str]:
    """The variables of a chat template that can be set as arguments: all but those that transformers passes itself."""
    from jinja2 import Environment, TemplateSyntaxError, meta
    from jinja2.ext import loopcontrols

    # A template may hold the generation marks of transformers, which plain Jinja does not know. They read no variable.
    text = _GENERATION.sub("", template)
    try:
        found = meta.find_undeclared_variables(Environment(extensions=[loopcontrols]).parse(text))
    except TemplateSyntaxError:  # a statement that only transformers knows: assume that any word is a variable
        return set(re.findall(r"\b[A-Za-z_]\w*", text))
    return {name for name in found if name not in (*GIVEN, "raise_exception", "strftime_now") and name[-6:] != "_token"}


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("chat_template", [f"path: got {str(path)!r}: cannot be read: {error}"]) from None


def _check_syntax(tokenizer: Any, path: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template(_ASKED, tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(
            "chat_template", [f"path: got {path!r}: not a Jinja template: line {error.lineno}: {error.message}"]
        ) from None
    except TemplateError:  # a valid template may refuse these messages
        return


def _require_same(tokenizer: Any, own: Any, config: ChatTemplateConfig) -> None:
    """Raise `ConfigError` unless the tokenizer's new template renders a prompt and a reply as its own template did.

    own: the template that the tokenizer came with.
    """
    for messages, what in ((_ASKED, "prompt"), (_ANSWERED, "reply")):
        rendered = _render(tokenizer, messages, None, arguments=config.arguments)
        expected = _render(tokenizer, messages, own, arguments=config.arguments)
        if rendered != expected and expected is not None:
            rule = (
                f"writes a {what} as {_end(rendered)}, the model's own template as {_end(expected)}; take the family "
                "of the model, or give path, which may be any template"
            )
            raise ConfigError("chat_template", [f"builtin: got {config.builtin!r}, which {rule}"])


def _render(
    tokenizer: Any, messages: list[dict[str, str]], template: Any, *, arguments: Mapping[str, Any]
) -> str | None:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=template.get("default") if isinstance(template, Mapping) else template,
                tokenize=False,
                add_generation_prompt=len(messages) == 1,
                **arguments,
            )
        ).strip()
    except (TemplateError, TypeError, ValueError):
        return None


def _end(text: str | None) -> str:
    return "none at all" if text is None else repr(text if len(text) <= _SHOWN else "…" + text[-_SHOWN:])
