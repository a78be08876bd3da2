"""Turn rows into token ids and masks by `posttrain.data.samples`, which makes no sample that sampling would not begin.

A row becomes one sample, or several under a chat template that rewrites earlier turns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from posttrain.data.images.render import Pictures, row_samples
from posttrain.data.messages import RowError
from posttrain.data.stored import Stored, StoreWriter
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import DataError
from posttrain.records import Row
from posttrain.tune.examples import Example


def tokenize(
    tokenizer: Tokenizer, rows: Sequence[Row], max_length: int, *, overlong: Literal["error", "drop"],
    pictures: Pictures | None = None, folder: Path | None = None, name: str | None = None,
) -> tuple[Stored[Example], int]:  # fmt: skip
    """Return the examples, and how many rows were dropped because a sample of theirs is longer than `max_length`.

    The tokens of pictures count. pictures: those of the rows; None for rows of text. folder, name: of the file in which
    the examples lie; see `StoreWriter`. Raises `DataError`, which names the row, if
    a row does not render as sampling would render it, or if it is too long and overlong is "error". Also raises it if
    no row is left.
    """
    first_too_long, num_too_long = ("", 0), 0
    with StoreWriter[Example](Example, folder, name) as examples:
        for row in rows:
            try:
                samples = row_samples(tokenizer, row, pictures)
            except (DataError, RowError) as error:
                raise DataError(f"row {row.id!r}: {error}") from None
            if (longest := max(len(sample.ids) for sample in samples)) > max_length:
                first_too_long = first_too_long if num_too_long else (row.id, longest)
                num_too_long += 1
            else:
                for sample in samples:
                    examples.append(Example(sample.ids, sample.mask, sample.pictures))
        if num_too_long and overlong == "error":
            identity, length = first_too_long
            rule = "raise max_length, shorten it, or set overlong: drop"
            raise DataError(
                f"row {identity!r}: {length} tokens, but max_length is {max_length} ({num_too_long} of {len(rows)} "
                f"rows are too long); {rule}"
            )
        if not len(examples):
            raise DataError(f"all {len(rows)} rows are longer than max_length {max_length}; raise it")
        return examples.close(), num_too_long
