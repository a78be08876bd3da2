"""The queue's promises under random speeds, drops and version lags: bound and quotas hold, nothing is lost."""

import random
from collections import Counter, defaultdict
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rl.quotas import places
from posttrain.rl.staleness import StalenessQueue

ONE = {"math": 1.0}


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    drop_rates=st.lists(st.sampled_from([0.0, 0.3, 0.6, 1.0]), min_size=1, max_size=4),
    refills=st.integers(0, 3),
    first=st.integers(0, 3),
    lag=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
def test_bound_and_quotas_hold_and_nothing_is_lost(batch, max_staleness, drop_rates, refills, first, lag, seed):
    rng = random.Random(seed)
    drop_rates[0] = min(drop_rates[0], 0.6)  # some capability teaches something
    names = "abcd"[: len(drop_rates)]
    weights = {name: rng.uniform(0.2, 3) for name in names}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    queue = StalenessQueue(batch, max_staleness, shares, refills, first)
    in_flight: list[int] = []
    stamps: dict[int, int] = {}
    capabilities: dict[int, str] = {}
    trained: list[int] = []
    made = defaultdict(Counter)
    dropped = 0
    version = engine = first
    lag = min(lag, max_staleness)  # a lagging engine needs a bound of at least its lag
    for _ in range(100_000):
        if version == first + 12:
            break
        for _ in range(queue.room(engine)):
            order, capabilities[order] = queue.admit(engine)
            in_flight.append(order)
            stamps[order] = engine
        taken = queue.take(version)
        if taken is not None:
            assert taken == sorted(taken)
            assert len(taken) == batch
            assert all(0 <= version - stamps[order] <= max_staleness for order in taken)
            trained += taken
            made[version].update(capabilities[order] for order in taken)
            version += 1
            engine = max(engine, version - lag)
            continue
        # Later groups finish before earlier ones as often as not.
        assert in_flight, "nothing is in flight and no batch can be formed: deadlock"
        order = in_flight.pop(rng.randrange(len(in_flight)))
        if rng.random() < drop_rates[names.index(capabilities[order])]:
            queue.drop(order)
            dropped += 1
        else:
            queue.ready(order)
    assert version == first + 12
    assert len(set(trained)) == len(trained)
    assert len(stamps) == len(trained) + dropped + queue.num_ready + queue.num_in_flight
    if queue.num_lent == 0:
        wanted = islice(places(shares, first * batch), 12 * batch)
        for step in range(first, first + 12):
            assert made[step] == Counter(islice(wanted, batch))
    else:
        assert len(names) > 1
        assert any(drop_rates)


def test_a_dry_capability_lends_its_places_after_its_refills():
    queue = StalenessQueue(4, 0, {"dry": 0.5, "rich": 0.5}, refills=2)
    tried = Counter()
    while (taken := queue.take(0)) is None:
        order, capability = queue.admit(0)
        tried[capability] += 1
        if capability == "dry":
            queue.drop(order)
        else:
            queue.ready(order)
    assert len(taken) == 4
    assert tried == {"dry": 2 * 3, "rich": 4}
    assert queue.num_lent == 2
    assert [queue.admit(1)[1] for _ in range(queue.room(1))].count("dry") == 2  # it is tried again in the next batch


def test_a_capability_alone_keeps_its_places():
    queue = StalenessQueue(1, 0, ONE, refills=0)
    for _ in range(5):
        order, capability = queue.admit(0)
        assert capability == "math"
        queue.drop(order)
    assert (queue.num_lent, queue.room(0)) == (0, 1)


def test_places_follow_the_shares_and_small_ones_get_theirs():
    shares = {"a": 0.61, "b": 0.36, "c": 0.03}
    given_ = list(islice(places(shares), 400))
    for total in range(1, 401):
        counts = Counter(given_[:total])
        assert all(abs(counts[name] - share * total) < 1 for name, share in shares.items()), total
    assert given_[160:170] == list(islice(places(shares, 160), 10))


def test_slow_group_is_waited_for_instead_of_going_stale():
    queue = StalenessQueue(1, 2, ONE, refills=4)
    first, second, third = (queue.admit(0)[0] for _ in range(3))
    queue.ready(first)
    assert queue.take(0) == [first]
    late, _ = queue.admit(1)
    queue.ready(late)
    # `second` and `third` must go at versions 1 and 2, so the fresh group may not take a place before them.
    assert queue.take(1) is None
    queue.ready(third)
    assert queue.take(1) == [third]
    assert queue.take(2) is None
    queue.ready(second)
    assert queue.take(2) == [second]
    assert queue.take(3) == [late]


def test_strictly_on_policy_admits_one_batch():
    queue = StalenessQueue(3, 0, ONE, refills=4)
    assert queue.room(0) == 3
    for _ in range(3):
        queue.ready(queue.admit(0)[0])
    assert queue.room(0) == 0
    assert queue.take(0) == [0, 1, 2]
    assert queue.room(0) == 0
    assert queue.room(1) == 3
