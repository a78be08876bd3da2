"""The queue's promises under random speeds, drops and version lags: the bound holds, nothing is lost, no deadlock."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rl.staleness import StalenessQueue


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    drop_rate=st.floats(0, 0.6),
    lag=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
def test_bound_holds_and_nothing_is_lost(batch, max_staleness, drop_rate, lag, seed):
    rng = random.Random(seed)
    queue = StalenessQueue(batch, max_staleness)
    in_flight: dict[int, int] = {}
    stamps: dict[int, int] = {}
    trained: list[int] = []
    dropped = 0
    version = engine = 0
    lag = min(lag, max_staleness)  # a lagging engine needs a bound of at least its lag
    for _ in range(100_000):
        if version == 12:
            break
        for _ in range(queue.room(version, engine)):
            order = queue.admit(engine)
            in_flight[order] = stamps[order] = engine
        taken = queue.take(version)
        if taken is not None:
            assert len(taken) == batch
            assert all(0 <= version - stamps[order] <= max_staleness for order in taken)
            trained += taken
            version += 1
            engine = max(engine, version - lag)
            continue
        # Later groups finish before earlier ones as often as not.
        assert in_flight, "nothing is in flight and no batch can be formed: deadlock"
        order = rng.choice(list(in_flight))
        del in_flight[order]
        if rng.random() < drop_rate:
            queue.drop(order)
            dropped += 1
        else:
            queue.ready(order)
    assert version == 12
    assert len(set(trained)) == len(trained)
    assert len(stamps) == len(trained) + dropped + queue.num_ready + queue.num_in_flight


def test_slow_group_is_waited_for_instead_of_going_stale():
    queue = StalenessQueue(groups_per_step=1, max_staleness=2)
    first, second, third = (queue.admit(0) for _ in range(3))
    queue.ready(first)
    assert queue.take(0) == [first]
    late = queue.admit(1)
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
    queue = StalenessQueue(groups_per_step=3, max_staleness=0)
    assert queue.room(next_version=0, engine_version=0) == 3
    for _ in range(3):
        queue.ready(queue.admit(0))
    assert queue.room(0, 0) == 0
    assert queue.take(0) == [0, 1, 2]
    assert queue.room(next_version=1, engine_version=0) == 0
    assert queue.room(next_version=1, engine_version=1) == 3
