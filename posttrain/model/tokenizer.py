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
from posttrain.data.verbatim import template_problem
from posttrain.errors import CheckpointError, ConfigError
from posttrain.files import read_object
from posttrain.model.adapter import base_folder
from posttrain.model.folder import existing_folder, first_line, tokenizer_problems

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
FILES = (*VOCABULARIES, "tokenizer_config.json")
# By the model_type of config.json: the class that AutoTokenizer takes if tokenizer_config.json names it, too. For some
# types AutoTokenizer does not trust the class that the folder names, and takes the generic one.
_QWEN, _GEMMA, _LLAMA, _ANY = "Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizer", "TokenizersBackend"
FAMILIES = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _QWEN),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("llama", "llama4", "llama4_text"), _LLAMA),
    **dict.fromkeys(("phi3", "phimoe", "olmo2", "olmo3", "granite", "deepseek_v2", "deepseek_v3"), _ANY),
}
# Classes that do what tokenizer.json says and nothing else: the first is the name in transformers 5, which also writes
# it, the second the one before.
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(path: str | os.PathLike[str], chat_template: ChatTemplateConfig | None = None) -> Tokenizer:
    """Load the tokenizer of a folder as transformers' AutoTokenizer does, with its own chat template or another.

    A folder of adapters without a tokenizer has that of its base.

    Raises:
        CheckpointError: the folder or its tokenizer is missing, the tokenizer cannot be read, it has ids for which
            the model in the folder has no embedding, or its chat template changes what people say.
        ConfigError: the other template cannot be used; see `posttrain.data.templates.use_template`.
    """
    folder = existing_folder(path)
    base = base_folder(folder)
    if base != folder and not any((folder / name).exists() for name in VOCABULARIES):
        folder = existing_folder(base)
    if not any((folder / name).exists() for name in FILES):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json); a model folder must hold its tokenizer")
    try:
        tokenizer = cast(Tokenizer, _class_of(folder).from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from error
    if problems := tokenizer_problems(base, tokenizer.get_vocab()):
        raise CheckpointError(f"{folder}: " + "; ".join(problems))
    use_template(tokenizer, chat_template)
    if (problem := template_problem(tokenizer)) is not None:
        if chat_template is not None:
            raise ConfigError("chat_template", [problem])
        raise CheckpointError(f"{folder}: {problem}")
    return tokenizer


def _class_of(folder: Path) -> Any:
    """The class that AutoTokenizer would take, where that is known without it; else AutoTokenizer itself."""
    settings = read_object(folder / "tokenizer_config.json") or {}
    named = str(settings.get("tokenizer_class") or "")
    family = FAMILIES.get(str((read_object(folder / "config.json") or {}).get("model_type")))
    if (folder / "tokenizer.json").exists() and "auto_map" not in settings:
        if named in GENERIC or (named and family == _ANY):
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
        # AutoTokenizer decides by the name of the folder for models of this owner.
        if family is not None and named.removesuffix("Fast") == family and "deepseek-ai" not in str(folder).lower():
            import transformers

            return getattr(transformers, family)
    from transformers import AutoTokenizer

    return AutoTokenizer
