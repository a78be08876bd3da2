"""Arrays in files, and tables of ranks, give what numpy and sorted lists in memory give, for every size of a block."""

import random
import resource

import numpy as np
import pytest

from posttrain.data import arrays
from posttrain.data.ranked import Ranked


@pytest.fixture(params=[1, 3, 7, 1 << 16])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(arrays, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("count", [0, 1, 2, 7, 22, 50])
def test_the_order_is_that_of_sample(block: int, count: int) -> None:
    numbers = arrays.shuffled(count, random.Random(f"{count}"))
    assert numbers.tolist() == random.Random(f"{count}").sample(range(count), count)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 50])
def test_blocks_do_not_show_in_results(block: int, count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.integers(0, 2**64, count, dtype=np.uint64)
    found = arrays.gathered(values.tolist(), np.uint64)
    assert found.tolist() == values.tolist()
    copy = arrays.copied(found)
    copy.sort()
    assert (copy.tolist(), found.tolist()) == (sorted(values.tolist()), values.tolist())
    assert arrays.copied(range(3, count, 2)).tolist() == list(range(3, count, 2))
    odd = arrays.where(range(count), lambda places: found[places] % 2 == 1)
    assert odd.tolist() == np.flatnonzero(values % 2 == 1).tolist()
    assert arrays.where(odd, lambda places: places > 4).tolist() == [place for place in odd.tolist() if place > 4]
    assert arrays.computed(odd, lambda places: -places, np.int64).tolist() == (-odd).tolist()
    assert list(arrays.numbers_of(found)) == values.tolist()


def test_no_room_for_a_file_is_one_message() -> None:
    """Reserved at once: a write to a page that finds no room would kill the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        assert not arrays.zeros(1 << 10, np.int64).any()
        with pytest.raises(OSError, match=r"8388608 bytes are needed; make room there, or .* TMPDIR"):
            arrays.zeros(1 << 20, np.int64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_ranks_are_those_of_sorted_lists() -> None:
    """Equal ranks, equal hashes and hashes of all 64 bits among them."""
    rng = random.Random(0)
    rows = [
        (rng.choice(["b", "é", "a", ""]), rng.choice([0.0, -0.5, 2.0]), rng.choice([0, 7, 2**64 - 1]))
        for _ in range(200)
    ]
    strata = sorted({stratum for stratum, _, _ in rows})
    ordered = {
        name: sorted((place for place, row in enumerate(rows) if row[0] == name), key=lambda place: rows[place][1:])
        for name in strata
    }
    shares = {name: rng.randrange(len(places)) for name, places in ordered.items()}
    with Ranked(iter(rows)) as ranked:
        assert ranked.sizes == {name: len(places) for name, places in ordered.items()}
        assert list(ranked.first(shares)) == [place for name in strata for place in ordered[name][: shares[name]]]
        spread = sorted(
            (at / len(places), name, place) for name, places in ordered.items() for at, place in enumerate(places)
        )
        assert list(ranked.spread(77)) == [place for _, _, place in spread[:77]]
