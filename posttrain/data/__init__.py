"""Datasets: reads files into validated rows and pairs, and renders chats into token ids and loss masks.

files.py readers.py hub.py splits.py     files, folders and names of datasets become raw records, one by one
formats.py messages.py turns.py          a record becomes a conversation; the rules for messages and their order
rows.py pairs.py kinds.py bad_rows.py    rows, preference pairs and labelled replies; bad rows
generated.py                             rows that a generator of another package makes
chat.py templates.py ends.py special.py shown.py tokenizer.py   chat templates; token ids; end tokens; special tokens
samples.py                               what is trained on: token ids with the loss mask
held_out.py strata.py                    rows that are held out; fair shares of capabilities
duplicates.py contamination.py ngrams.py   repeated rows, and rows with text of evaluation sets
arrays.py stored.py places.py            on disk, in temporary files: numbers of rows, rows, places by name
ranked.py tables.py                      rows in order of a rank, sorted by SQLite; a temporary database
inspection.py lengths.py transcript.py   counts, lengths, and messages as plain text

Public names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.data.pairs import Pair, load_pairs, write_pairs
    from posttrain.data.rows import check_data, load_rows, write_rows

__all__ = ["Pair", "check_data", "load_pairs", "load_rows", "write_pairs", "write_rows"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {"rows": ["check_data", "load_rows", "write_rows"], "pairs": ["Pair", "load_pairs", "write_pairs"]},
)
