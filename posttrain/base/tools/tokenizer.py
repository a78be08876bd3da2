"""The tokenizer of the pipeline `tools`: made as that of the quick start, with a chat template for tools.

Numbers have no space before them, so a number is the same tokens in a prompt, in a call and in a result. A call is
written as Llama 4 writes it, `[calculate(expression="47 * 86")]`. Of the declared tools only names and arguments are
shown.
"""

from typing import Any

from posttrain.base.families.edits import LETTERS
from posttrain.base.tokenizer import llama4_template, make_tokenizer

_SHOWN = """    {{- '<|header_start|>tools<|header_end|>\\n\\n' }}
    {%- for tool in tools %}
        {{- tool['function']['name'] + '(' + tool['function']['parameters']['properties'] | join(', ') + ')' }}
    {%- endfor %}
    {{- '<|eot|>' }}"""
_CALL = """                {{- ('[' if loop.first else ', ') + call['function']['name'] + '(' }}
                {%- for key, value in call['function']['arguments'].items() %}
                    {{- (', ' if not loop.first else '') + key + '=' + value | tojson }}
                {%- endfor %}
                {{- ')' + (']' if loop.last else '') }}"""

# A piece of text is a word with its colon, one letter, a number of up to two digits, or a run of signs; a word and
# signs have the space before them, if there is one.
_SPLIT = r" ?\p{L}{2,}:?|\p{L}|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s"
_WORDS = (
    *("system", "user", "assistant", "tool", "tools", "Steps:", "Answer:"),
    *("Compute:", "Find:", "Guess", "from", "to", "Sum:", "Sort", "up", "down", "up:", "down:"),
    *("calculate", "expression", "lookup", "key", "see", "higher", "lower"),
    *("Error:", "the", "call", "cannot", "be", "read", "no", "give", "number"),
)
_SIGNS = ["+", "-", "*", "=", "(", ")", "[", '="', '")', '")]', ",", ".", ":", "\n", "\n\n"]


def build_tool_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` like that of `base/tokenizer.py`, for the words of these puzzles."""
    words = [text for word in (*_WORDS, *_SIGNS) for text in (word, " " + word)]
    numbers = [*map(str, range(100)), *(f"0{digit}" for digit in range(10))]
    return make_tokenizer([*words, *numbers, *LETTERS], _SPLIT, llama4_template(_SHOWN, _CALL))
