"""The staleness queue under random speeds, drops and version lags: bound and quotas hold, and no group is lost."""

import random
from collections import Counter
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rl.loop.staleness import StalenessQueue
from posttrain.rl.prompts.quotas import places

ONE = {"math": 1.0}


def admit(queue, engine, returning, capabilities):
    """The next group: one that returns, if its capability is wanted, else a new one."""

    def choose(capability):
        return next((order for order in returning if capabilities[order] == capability), None)

    order, capability = queue.admit(engine, choose)
    if order in returning:
        assert capabilities[order] == capability
        returning.remove(order)
    return order, capability


@settings(max_examples=400, deadline=None)
@given(
    batch=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    mode=st.sampled_from(["pace", "wait", "drop"]),
    drop_rates=st.lists(st.sampled_from([0.0, 0.3, 0.6, 1.0]), min_size=1, max_size=4),
    refills=st.integers(0, 3),
    first=st.integers(0, 3),
    lag=st.integers(0, 1),
    crashes=st.lists(st.integers(1, 200), max_size=3),
    commit_every=st.integers(1, 4),
    over_provision=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_bound_and_quotas_hold_and_nothing_is_lost(
    batch, max_staleness, mode, drop_rates, refills, first, lag, crashes, commit_every, over_provision, seed
):
    """Random speeds, drops, lagging engines, version bumps and crashes; a crash undoes steps since the last commit."""
    rng = random.Random(seed)
    drop_rates[0] = min(drop_rates[0], 0.6)  # some capability teaches something
    names = "abcd"[: len(drop_rates)]
    weights = {name: rng.uniform(0.2, 3) for name in names}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    queue = StalenessQueue(
        batch, max_staleness, shares, refills=refills, version=first, mode=mode, over_provision=over_provision
    )
    in_flight: list[int] = []
    returning: list[int] = []  # groups of before a crash that wait for a place
    stamps: dict[int, int] = {}
    capabilities: dict[int, str] = {}
    ready: set[int] = set()
    trained: dict[int, list[int]] = {}
    dropped: set[int] = set()
    version = engine = committed = first
    lag = min(lag, max_staleness)  # a lagging engine needs a bound of at least its lag
    for moment in range(20_000):
        if version == first + 12:
            break
        if moment in crashes:
            undone = [order for step in range(committed, version) for order in trained.pop(step)]
            ready |= set(undone)
            version = engine = committed
            order = max(stamps, default=-1) + 1
            queue = StalenessQueue(
                batch,
                max_staleness,
                shares,
                refills=refills,
                version=version,
                mode=mode,
                first_order=order,
                over_provision=over_provision,
            )
            survivors = sorted({*ready, *in_flight, *returning}, key=lambda order: (stamps[order], order))
            in_flight, returning = [], []
            for order in survivors:
                # What was sampled by a version that is gone starts again, and so does half of what was in flight.
                fresh = stamps[order] > version or (order not in ready and rng.random() < 0.5)
                if fresh or not queue.adopt(order, capabilities[order], stamps[order], is_ready=order in ready):
                    ready.discard(order)
                    returning.append(order)
                elif order not in ready:
                    in_flight.append(order)
        for _ in range(queue.room(engine)):
            order, capability = admit(queue, engine, returning, capabilities)
            capabilities[order] = capability
            in_flight.append(order)
            stamps[order] = engine
        taken = queue.take(version)
        if taken is not None:
            assert taken == sorted(taken)
            assert len(taken) == batch
            assert all(0 <= version - stamps[order] <= max_staleness for order in taken)
            if mode == "wait":
                waiting = [stamps[order] for order in in_flight]
                assert len(names) > 1 or max(stamps[order] for order in taken) <= min(waiting, default=99)
            trained[version] = taken
            ready -= set(taken)
            version += 1
            engine = max(engine, version - lag)
            if version % commit_every == 0:
                committed = version
            for order in queue.expired():
                assert mode == "drop" or (over_provision and not max_staleness)
                assert version - stamps[order] > max_staleness
                queue.drop(order)
                dropped.add(order)
                ready.discard(order)
                in_flight = [other for other in in_flight if other != order]
            continue
        # Later groups finish before earlier ones as often as not.
        assert in_flight, "nothing is in flight and no batch can be formed: deadlock"
        order = in_flight.pop(rng.randrange(len(in_flight)))
        if rng.random() < drop_rates[names.index(capabilities[order])]:
            queue.drop(order)
            dropped.add(order)
        else:
            queue.ready(order)
            ready.add(order)
    assert version == first + 12
    all_trained = [order for step in trained for order in trained[step]]
    assert len(set(all_trained)) == len(all_trained) == 12 * batch
    assert {*all_trained, *dropped, *ready, *in_flight, *returning} == set(stamps)
    assert len(stamps) == len(all_trained) + len(dropped) + len(ready) + len(in_flight) + len(returning)
    if queue.num_lent == 0 and not any(crash < moment for crash in crashes):
        wanted = islice(places(shares, first * batch), 12 * batch)
        for step in range(first, first + 12):
            assert Counter(capabilities[order] for order in trained[step]) == Counter(islice(wanted, batch))


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


def test_waiting_takes_the_oldest_even_where_others_are_ready():
    queue = StalenessQueue(1, 2, ONE, refills=4, mode="wait")
    first, second, _ = (queue.admit(0)[0] for _ in range(3))
    queue.ready(second)
    assert queue.take(0) is None
    queue.ready(first)
    assert queue.take(0) == [first]


def test_dropping_goes_on_without_a_slow_group():
    queue = StalenessQueue(1, 1, ONE, refills=4, mode="drop")
    slow, second = (queue.admit(0)[0] for _ in range(2))
    queue.ready(second)
    assert queue.take(0) == [second]
    third, _ = queue.admit(0)
    queue.ready(third)
    assert queue.take(1) == [third]
    assert queue.expired() == [slow]
    queue.drop(slow)
    assert queue.expired() == []
    assert queue.room(0) == 0  # what an engine of version 0 samples now would be too old at once
    assert queue.room(1) == 2


def test_spares_follow_the_drop_rate_and_take_the_places_of_the_dropped():
    queue = StalenessQueue(8, 0, ONE, refills=99, over_provision=0.5)
    assert queue.room(0) == 8
    orders = [queue.admit(0)[0] for _ in range(8)]
    assert queue.room(0) == 0  # nothing is known of drops yet
    for order in orders[:4]:
        queue.drop(order)
    for order in [*orders[4:], *(queue.admit(0)[0] for _ in range(4))]:
        queue.ready(order)
    assert len(queue.take(0)) == 8  # a third was dropped: half of that is believed
    orders = [queue.admit(1)[0] for _ in range(queue.room(1))]
    assert len(orders) == 8
    assert queue.room(1) == 2  # 8 * (1/6) / (5/6), rounded up
    first, second = (queue.admit(1)[0] for _ in range(2))
    assert queue.room(1) == 0
    queue.drop(orders[0])
    for order in [*orders[1:], first]:
        queue.ready(order)
    assert queue.take(1) == [*orders[1:], first]
    assert queue.expired() == [second]
