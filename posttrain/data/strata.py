"""Divides places among strata, such as capabilities, and orders rows independently of their order in the file."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from posttrain.records import Row


def hash_order(seed: int, name: str) -> int:
    """A pseudo-random sort key that depends only on seed and name, so it is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big")


def proportional_shares(sizes: Mapping[str, int], total: int, seed: int = 0) -> dict[str, int]:
    """Split `total` places between strata in proportion to their sizes, by the largest remainder.

    sizes: rows in each stratum. The shares sum to `total`, none exceeds its stratum, and each is within one of its
    exact proportional share. The places that rounding leaves go first to strata that would have none, so that a small
    one vanishes only where there are more such strata than places left. Equal remainders are settled by a seeded hash
    of the stratum's name. Raises ValueError unless 0 <= total <= the sum of the sizes.

    Example: proportional_shares({"chat": 2, "math": 98}, 10) is {"chat": 1, "math": 9}; the exact shares are 0.2 and
    9.8.
    """
    num_rows = sum(sizes.values())
    if not 0 <= total <= num_rows:
        raise ValueError(f"{total} places for {num_rows} rows: needs between 0 and that many")
    if not num_rows:
        return dict.fromkeys(sizes, 0)
    shares = {name: total * size // num_rows for name, size in sizes.items()}
    remainders = {name: total * size % num_rows for name, size in sizes.items()}
    unfinished = [name for name, remainder in remainders.items() if remainder]
    unfinished.sort(key=lambda name: (shares[name] > 0, -remainders[name], hash_order(seed, name), name))
    for name in unfinished[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def sampled_rows(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """All rows, or `limit` of them with a fair share of each capability.

    The choice depends only on the rows' ids, not on a seed, so that two policies are measured on the same prompts.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    places = proportional_shares(Counter(row.capability for row in rows), limit)
    chosen: set[str] = set()
    for row in sorted(rows, key=lambda row: (hash_order(0, row.id), row.id)):
        if places[row.capability]:
            places[row.capability] -= 1
            chosen.add(row.id)
    return [row for row in rows if row.id in chosen]
