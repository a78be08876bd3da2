"""The quick start's tokenizer: each word of the puzzles is one token, and any other text is split into bytes.

It is a byte-level BPE with an empty list of merges. A word of the vocabulary is one token. Any other text becomes its
bytes, so no text is unknown. The vocabulary is written in this file and not trained, so it is the same on every
machine. Special tokens and chat template follow Llama 4.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.base.families.edits import LETTERS
from posttrain.data.tokenizer import Tokenizer

BOS, EOT, PAD = "<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>"
SPECIAL_TOKENS = (BOS, "<|end_of_text|>", "<|header_start|>", "<|header_end|>", EOT, PAD)

# How Llama 4 writes turns. SHOWN stands where tools are shown, and CALLS where calls are written.
_TURNS = """{{- bos_token }}
{%- if tools %}
SHOWN
{%- endif %}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim }}
            {%- for call in message['tool_calls'] or [] %}
CALLS
            {%- endfor %}
            {{- '<|eot|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""
_SHOWN = """    {{- '<|header_start|>tools<|header_end|>\\n\\n' + tools | tojson + '<|eot|>' }}"""
_CALL = """                {{- '{"name": ' + call['function']['name'] | tojson }}
                {{- ', "parameters": ' + call['function']['arguments'] | tojson + '}' }}"""

_LARGEST_NUMBER = 99
_MAX_LENGTH = 2048
# A piece of text is the head of a statement, a run of letters with its colon, a number of up to two digits, or a run of
# signs, each with the space before it, if there is one.
_SPLIT = r" ?x [-+*]?=| ?\p{L}+:?| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s"
_WORDS = (
    *("system", "user", "assistant", "Steps:", "Answer:", "Rate:", "easy", "medium", "hard", "yes", "no", "none"),
    *("Sum:", "Run:", "Sort", "Edit:", "Make", "from", "up", "down", "up:", "down:"),
    *("reverse", "upper", "double", "first", "drop", "last", "reverse:", "upper:", "first:", "last:"),
    *("Solve", "Give", "Reply", "You", "are", "with", "the", "a", "one", "right", "answer"),
    *("careful", "puzzle", "solver"),
)
_STATEMENTS = ["x =", "x +=", "x -=", "x *="]
_SIGNS = ["+", "-", "*", "=", "(", ")", ").", ",", ";", ".", ":", "\n", "\n\n"]


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` with the Llama 4 special tokens; its end-of-sequence token is `<|eot|>`."""
    words = [*_WORDS, *_STATEMENTS, *_SIGNS, *LETTERS, *LETTERS.upper()]
    texts = [text for word in words for text in (word, " " + word)] + [f" {n}" for n in range(_LARGEST_NUMBER + 1)]
    return make_tokenizer(texts, _SPLIT, llama4_template(_SHOWN, _CALL))


def llama4_template(shown: str, call: str) -> str:
    """The template of chats. shown: lines that show `tools`. call: lines that write one `call` of a turn."""
    return _TURNS.replace("SHOWN", shown).replace("CALLS", call)


def make_tokenizer(texts: Sequence[str], split: str, template: str) -> Any:
    """A tokenizer for which each of `texts` is one token, and any other text its bytes.

    split: the regular expression that cuts text into pieces; a token never goes beyond one. template: of chats.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(_vocabulary(texts))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        model_max_length=_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def _vocabulary(texts: Sequence[str]) -> list[str]:
    """All tokens in the order of their ids, in the byte alphabet of byte-level BPE ("Ġ" is a space)."""
    from tokenizers.pre_tokenizers import ByteLevel

    split = ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [split.pre_tokenize_str(text)[0][0] for text in texts]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *tokens]))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer, its chat template and a generation_config.json that knows both ends of a reply."""
    tokenizer.save_pretrained(folder)
    end_ids = tokenizer.convert_tokens_to_ids([EOT, "<|end_of_text|>"])
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": end_ids,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
