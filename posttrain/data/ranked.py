"""Rows in order of a rank within their stratum, such as their capability. They are sorted on disk, by SQLite.

The table is a temporary file (tables.py) of about 50 bytes a row.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any

from posttrain.data.tables import temporary_base

CACHE_KIB = 4096
_HALF = 1 << 63  # SQLite has signed whole numbers only


class Ranked:
    """The places of rows by stratum, rank and hash; equal ones are in the order of the rows. A context manager.

    rows: (stratum, rank, hash of 64 bits) of each row. sizes: the number of rows of each stratum.
    """

    def __init__(self, rows: Iterable[tuple[str, float, int]]):
        self._base = temporary_base(
            "CREATE TABLE ranked (place INTEGER PRIMARY KEY, stratum TEXT, rank REAL, hash INTEGER)",
            cache_kib=CACHE_KIB,
        )
        numbered = ((place, stratum, rank, hash - _HALF) for place, (stratum, rank, hash) in enumerate(rows))
        self._base.executemany("INSERT INTO ranked VALUES (?, ?, ?, ?)", numbered)
        counts = self._base.execute("SELECT stratum, COUNT(*) FROM ranked GROUP BY stratum")
        self.sizes: dict[str, int] = dict(counts.fetchall())

    def __enter__(self) -> "Ranked":
        return self

    def __exit__(self, *error: Any) -> None:
        self._base.close()

    def first(self, shares: Mapping[str, int]) -> Iterator[int]:
        """The places of the first rows of each stratum, so many as its share."""
        found = self._base.execute("SELECT stratum, place FROM ranked ORDER BY stratum, rank, hash, place")
        for stratum, rows in groupby(found, key=lambda row: row[0]):
            yield from (place for _, place in islice(rows, shares[stratum]))

    def spread(self, limit: int) -> Iterator[int]:
        """The places of `limit` rows, spread evenly over the strata by the ranks of their rows."""
        found = self._base.execute(
            "SELECT place FROM (SELECT place, stratum, 1.0 * (ROW_NUMBER() OVER (PARTITION BY stratum ORDER BY rank, "
            "hash, place) - 1) / COUNT(*) OVER (PARTITION BY stratum) AS share FROM ranked) "
            "ORDER BY share, stratum LIMIT ?",
            (limit,),
        )
        return (place for (place,) in found)
