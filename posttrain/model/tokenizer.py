"""Load the tokenizer of a model folder, without importing torch where that can be helped.

transformers' AutoTokenizer imports torch with the tables of all its models, which takes seconds; `validate` and `data
preview` need a tokenizer and nothing else.
"""

import os
from pathlib import Path
from typing import Any, cast

from posttrain.config.templates import ChatTemplateConfig
from posttrain.data.templates import use_template
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import CheckpointError
from posttrain.files import read_object
from posttrain.model.folder import existing_folder, first_line, tokenizer_problems

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# Classes that do what tokenizer.json says and nothing else: the first is the name in transformers 5, which also writes
# it, the second the one before.
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(path: str | os.PathLike[str], chat_template: ChatTemplateConfig | None = None) -> Tokenizer:
    """Load the tokenizer of a folder as transformers' AutoTokenizer does, with its own chat template or another.

    Raises:
        CheckpointError: the folder or its tokenizer is missing, the tokenizer cannot be read, or it has ids for which
            the model in the folder has no embedding.
        ConfigError: the other template cannot be used; see `posttrain.data.templates.use_template`.
    """
    folder = existing_folder(path)
    if not any((folder / name).exists() for name in FILES):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json); a model folder must hold its tokenizer")
    try:
        tokenizer = cast(Tokenizer, _class_of(folder).from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from error
    if problems := tokenizer_problems(folder, tokenizer.get_vocab()):
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    use_template(tokenizer, chat_template)
    return tokenizer


def _class_of(folder: Path) -> Any:
    """The generic class if the folder names it, else AutoTokenizer, which finds the class of the model's family."""
    named = (read_object(folder / "tokenizer_config.json") or {}).get("tokenizer_class")
    if named in GENERIC and (folder / "tokenizer.json").exists():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
