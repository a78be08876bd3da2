"""The quota of each place of a batch, computed from the shares of the mixture alone.

A quota is a capability; where modalities have shares too, a capability and a modality, such as "math, image".
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice

import numpy as np

from posttrain.config.images import Modality
from posttrain.data.arrays import gathered, where
from posttrain.data.images.modality import modality_of
from posttrain.errors import ConfigError
from posttrain.records import Row

Shares = Mapping[str, float]  # of capabilities
_GOLDEN = (5**0.5 - 1) / 2
Modalities = Mapping[Modality, float]  # their shares


def quota_of(row: Row, modalities: Modalities | None) -> str:
    """The quota that a row belongs to. modalities: the shares of modalities, if they have any."""
    return f"{row.capability}, {modality_of(row)}" if modalities else row.capability


def places_by_quota(rows: Sequence[Row], modalities: Modalities | None) -> dict[str, np.ndarray]:
    """The places of the rows of each quota, by its name. modalities: see `quota_of`."""
    found: dict[str, int] = {}
    quotas = (quota_of(row, modalities) for row in rows)
    number_N = gathered((found.setdefault(quota, len(found)) for quota in quotas), np.int32)
    every = range(len(rows))
    return {
        name: where(every, lambda places, number=number: number_N[places] == number)
        for name, number in sorted(found.items())
    }


def mixture_shares(
    rows: Sequence[Row], mixture: Shares, among: str = "selected prompt", *, modalities: Modalities | None = None
) -> dict[str, float]:
    """The share of each quota; their sum is 1. They follow `mixture` (on any scale), or `rows` if it is empty.

    modalities: on any scale; within each the capabilities have the shares of `mixture`. among: what a message calls the
    rows. What has weight 0 is left out. Raises ConfigError for a capability or a modality that no row has.
    """
    mixture = {name: weight for name, weight in mixture.items() if weight > 0}
    if not modalities:
        there = Counter(row.capability for row in rows)
        _check_there(there, mixture, among)
        return _normalised(_weights(there, mixture))
    counts: dict[str, Counter[str]] = {}  # of the rows of each modality, by capability
    for row in rows:
        counts.setdefault(modality_of(row), Counter())[row.capability] += 1
    _check_there(sum(counts.values(), Counter[str]()), mixture, among)
    shares: dict[str, float] = {}
    for modality, share in _normalised(
        {str(name): weight for name, weight in modalities.items() if weight > 0}
    ).items():
        weights = _weights(counts.get(modality, {}), mixture)
        if not weights:
            found = ", ".join(f"{name} {sum(those.values())}" for name, those in sorted(counts.items()))
            rule = f"no {among} of a capability in mixture has this modality; there are: {found}"
            raise ConfigError("modalities", [f"{modality}: {rule}"])
        for capability, part in _normalised(weights).items():
            shares[f"{capability}, {modality}"] = share * part
    return dict(sorted(shares.items()))


def _check_there(there: Mapping[str, int], mixture: Shares, among: str) -> None:
    if missing := sorted(set(mixture) - set(there)):
        rule = f"no {among} has this capability; there are: {', '.join(sorted(there))}"
        raise ConfigError("mixture", [f"{name}: {rule}" for name in missing])


def _weights(there: Mapping[str, int], mixture: Shares) -> dict[str, float]:
    """The weight of each capability that is there. there: the number of its rows."""
    return {name: mixture[name] if mixture else float(n) for name, n in there.items() if not mixture or name in mixture}


def _normalised(weights: Shares) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in sorted(weights.items())}


def places(shares: Shares, first: int = 0) -> Iterator[str]:
    """The quota of place `first` in a batch, and of all later places, without end.

    Each place goes to the quota that is furthest behind its share of all places so far (the largest remainder). The
    remainder is carried from batch to batch, so that a small share gets its places too. The sequence depends on the
    shares alone, so a resumed run continues it.
    """
    return islice(_from_the_first(shares), first, None)


def scattered(shares: Shares, first: int = 0) -> Iterator[str]:
    """As `places`, for shares that move: the quota of a place depends on its number and the shares alone.

    The numbers are spread evenly over the shares by the golden ratio, so that every quota has its share of any run of
    places, and a small one too.
    """
    names = sorted(shares)
    ends = np.cumsum([shares[name] for name in names])
    for number in count(first):
        yield names[min(int(np.searchsorted(ends, (number + 0.5) * _GOLDEN % 1.0, side="right")), len(names) - 1)]


def moved_shares(shares: Shares, modalities: Shares, first: Shares) -> dict[str, float]:
    """The shares of quotas after those of modalities have moved; within one the capabilities keep theirs.

    modalities, first: the shares of modalities now, and those by which `shares` were made.
    """
    factors = {name: modalities[name] / share for name, share in first.items()}
    return {quota: share * factors[quota.rpartition(", ")[2]] for quota, share in shares.items()}


def _from_the_first(shares: Shares) -> Iterator[str]:
    given: Counter[str] = Counter()
    for total in count(1):
        name = max(shares, key=lambda name: (shares[name] * total - given[name], name))
        given[name] += 1
        yield name
