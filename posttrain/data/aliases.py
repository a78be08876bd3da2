"""Names that columns have elsewhere, from which an error text suggests how to name the columns of a row."""

from collections.abc import Mapping

# The likeliest name is the last.
_ALIASES = {
    "messages": ("chat", "dialog", "dialogue", "turns", "messages"),
    "prompt": ("context", "input", "instruction", "query", "question", "prompt"),
    "completion": ("reply", "output", "target", "answer", "response", "completion"),
}


def example_of_columns(value: Mapping[str, object]) -> str:
    """The setting that names the columns of this row, as far as their names tell what they hold."""
    lower = {str(name).casefold(): str(name) for name in value}
    named = {ours: lower[name] for ours, names in _ALIASES.items() for name in names if name in lower}
    named = {ours: theirs for ours, theirs in named.items() if ours != theirs}
    shown = named or {"prompt": "question", "completion": "answer"}
    return f"columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in shown.items())}}}"
