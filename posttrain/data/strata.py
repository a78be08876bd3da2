"""Divides places among strata (capabilities, and modalities within them), and orders rows whatever their order in the
file is.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from posttrain.data.arrays import gathered
from posttrain.data.images.modality import modality_of
from posttrain.data.ranked import Ranked
from posttrain.records import Row

if TYPE_CHECKING:
    from posttrain.data.arrays import Places


def stratum_of(row: Row) -> str:
    """The stratum of a row: its capability, and its modality if it shows pictures, such as "math, image"."""
    modality = modality_of(row)
    return row.capability if modality == "text" else f"{row.capability}, {modality}"


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


def sampled_places(rows: Sequence[Row], limit: int | None) -> "Places":
    """The places of all rows, or of `limit` of them with a fair share of each stratum, in their order.

    The choice depends only on the rows' ids, not on a seed, so that two policies are measured on the same prompts.
    """
    if limit is None or limit >= len(rows):
        return range(len(rows))
    with Ranked(by_hash(rows, 0)) as ranked:
        places = gathered(ranked.first(proportional_shares(ranked.sizes, limit)), "q")
    places.sort()
    return places


def by_hash(rows: Sequence[Row], seed: int) -> Iterator[tuple[str, float, int]]:
    """What `Ranked` needs to order the rows of each stratum by a hash of their ids."""
    return ((stratum_of(row), 0.0, hash_order(seed, row.id)) for row in rows)
