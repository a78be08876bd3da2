"""The capability of each place of a batch, computed from the shares of the mixture alone."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice

from posttrain.errors import ConfigError
from posttrain.records import Row


def mixture_shares(
    rows: Sequence[Row], mixture: Mapping[str, float], among: str = "selected prompt"
) -> dict[str, float]:
    """The share of each capability; their sum is 1. They follow `mixture` (on any scale), or `rows` if it is empty.

    among: what a message calls the rows. A capability of weight 0 is left out. Raises ConfigError for a capability that
    no row has.
    """
    there = Counter(row.capability for row in rows)
    mixture = {name: weight for name, weight in mixture.items() if weight > 0}
    missing = sorted(set(mixture) - set(there))
    if missing:
        rule = f"no {among} has this capability; there are: {', '.join(sorted(there))}"
        raise ConfigError("mixture", [f"{name}: {rule}" for name in missing])
    weights = dict(mixture) or {name: float(count) for name, count in there.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in sorted(weights.items())}


def places(shares: Mapping[str, float], first: int = 0) -> Iterator[str]:
    """The capability of place `first` in a batch, and of all later places, without end.

    Each place goes to the capability that is furthest behind its share of all places so far (the largest remainder).
    The remainder is carried from batch to batch, so that a small share gets its places too. The sequence depends on the
    shares alone, so a resumed run continues it.
    """
    return islice(_from_the_first(shares), first, None)


def _from_the_first(shares: Mapping[str, float]) -> Iterator[str]:
    given: Counter[str] = Counter()
    for total in count(1):
        name = max(shares, key=lambda name: (shares[name] * total - given[name], name))
        given[name] += 1
        yield name
