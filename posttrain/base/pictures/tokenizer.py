"""The tokenizer for puzzles about pictures: made as that of the quick start, with the tokens that stand for pictures.

The name of a cell, such as a1, is one token.
"""

from typing import Any

from posttrain.base.pictures.drawing import CELLS, COLOURS, EMPTY, NAMES, SIDE
from posttrain.base.tokenizer import make_tokenizer
from posttrain.data.images.tiles import TOKENS, TileRule

# Messages with plain strings, and with parts, of which a picture becomes <|image|>.
CHAT_TEMPLATE = """{{- bos_token }}
{%- macro content_of(message) -%}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{{ '<|image|>' }}
            {%- else -%}{{ part['text'] }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}{%- generation %}{{- content_of(message) + '<|eot|>' }}{%- endgeneration %}
    {%- else %}{{- content_of(message) + '<|eot|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}
"""

# A piece of text is the name of a cell, a run of letters with its colon, a number of up to two digits, or a run of
# signs, each with the space before it, if there is one.
_SPLIT = r" ?[abc][123]| ?\p{L}+:?| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s"
_WORDS = (
    *("system", "user", "assistant", "Steps:", "Answer:", "Rate:", "easy", "medium", "hard"),
    *("Count", "Find", "Highest", "Lowest", "bar", "Add", "digits", "Which", "differs", "same", "other", "picture"),
    *("Sum:", "Sort", "up", "down", "up:", "down:"),
)
MAX_TILES = 4  # of larger pictures, which the puzzles do not have
_SIGNS = ["+", "=", ",", ".", ":", "[", "]", "][", "\n", "\n\n"]


def build_picture_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` like that of `base/tokenizer.py`, for the words of these puzzles and pictures."""
    words = [*_WORDS, *_SIGNS, *COLOURS, EMPTY, *NAMES, *"abc"]
    texts = [text for word in words for text in (word, " " + word)] + [f" {number}" for number in range(100)]
    return with_picture_tokens(make_tokenizer(texts, _SPLIT, CHAT_TEMPLATE))


def with_picture_tokens(tokenizer: Any) -> Any:
    """The tokenizer with the tokens that stand for pictures, and with a chat template for parts of messages."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def picture_rule(tokenizer: Any) -> TileRule:
    """The tokens that stand for a picture: a feature of each cell."""
    return TileRule(SIDE, MAX_TILES, CELLS**2, False, *tokenizer.convert_tokens_to_ids(list(TOKENS)))
