"""A private SQLite database for one pass over a dataset, in a file without a name that is gone when it is closed.

The file is in SQLITE_TMPDIR, TMPDIR or /tmp. It is written without a journal, because nobody reads it after a crash.
"""

import sqlite3


def temporary_base(*tables: str, cache_kib: int) -> sqlite3.Connection:
    """An open database with these tables (CREATE statements), in the middle of its only transaction.

    cache_kib: memory for its pages.
    """
    # An empty name makes SQLite use a private temporary file: in memory while it is small, deleted on close.
    base = sqlite3.connect("", isolation_level=None)
    settings = ("journal_mode=OFF", f"cache_size=-{cache_kib}", "temp_store=FILE")
    for line in (*(f"PRAGMA {setting}" for setting in settings), *tables, "BEGIN"):
        base.execute(line)
    return base
