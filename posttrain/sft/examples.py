"""Turn rows into token ids and masks with `posttrain.data.chat`, and check each against sampling.

The check: the token ids of every row must begin with exactly those that sampling would send as its prompt.
"""

from collections.abc import Sequence
from typing import Literal

from posttrain.data.chat import check_parity, render_conversation
from posttrain.data.messages import RowError
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import tools_of
from posttrain.errors import DataError
from posttrain.records import Row
from posttrain.tune.drift import Example


def tokenize(
    tokenizer: Tokenizer, rows: Sequence[Row], max_length: int, *, overlong: Literal["error", "drop"]
) -> tuple[list[Example], int]:
    """Return the examples, and how many rows were dropped because they are longer than `max_length`.

    Raises `DataError`, which names the row, if a row does not render as sampling would render it, or if it is too long
    and overlong is "error". Also raises it if no row is left.
    """
    examples: list[Example] = []
    too_long: list[tuple[str, int]] = []
    for row in rows:
        try:
            tools = tools_of(row.fields)
            check_parity(tokenizer, row.messages, tools)
            ids, mask = render_conversation(tokenizer, row.messages, tools)
        except (DataError, RowError) as error:
            raise DataError(f"row {row.id!r}: {error}") from None
        if len(ids) > max_length:
            too_long.append((row.id, len(ids)))
        else:
            examples.append(Example(ids, mask))
    if too_long and overlong == "error":
        identity, length = too_long[0]
        rule = "raise max_length, shorten it, or set overlong: drop"
        raise DataError(
            f"row {identity!r}: {length} tokens, but max_length is {max_length} ({len(too_long)} of {len(rows)} rows "
            f"are too long); {rule}"
        )
    if not examples:
        raise DataError(f"all {len(rows)} rows are longer than max_length {max_length}; raise it")
    return examples, len(too_long)
