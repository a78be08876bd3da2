"""What an engine sums up of its steps, and which time counts as theirs."""

import time

import pytest

from posttrain.sampling.step_sums import StepClock, StepSums, as_equations, sums_of_step

WAITS = ("/proc/thread-self/schedstat", "/proc/a/kernel/that/tells/nothing")


def counted(sums: StepSums) -> tuple[list[float], float]:
    """The sums of steps, sequences and prompt tokens since the last look, and the seconds."""
    products, seconds = as_equations(sums.taken())
    return products[0].tolist(), float(seconds[0])


@pytest.mark.parametrize("waits", WAITS)
def test_a_step_lasts_until_the_next_begins_or_there_is_nothing_to_do(waits):
    sums = StepSums.create()
    clock = StepClock(StepSums(sums.path), waits)
    sums.give_up()
    for scheduled in ([30, 1, 1], [1, 1, 1]):
        clock.end()
        clock.begin(scheduled)
        time.sleep(0.01)
    clock.end()
    found, seconds = counted(sums)
    assert found == [2.0, 6.0, 29.0]
    assert seconds > 0.0
    time.sleep(0.01)  # idle
    clock.end()
    clock.begin([])  # a step of nothing is none
    clock.end()
    assert counted(sums) == ([0.0, 0.0, 0.0], 0.0)


def test_a_step_in_which_weights_are_updated_is_left_out():
    sums = StepSums.create()
    clock = StepClock(sums)
    clock.end()
    clock.begin([1, 1])
    clock.forget()
    clock.end()
    assert counted(sums)[0] == [0.0, 0.0, 0.0]
    sums.give_up()


def test_the_products_of_a_step_by_hand():
    products, seconds = as_equations(sums_of_step(3, 29, 0.5))
    assert products.tolist() == [[1, 3, 29], [3, 9, 87], [29, 87, 841]]
    assert seconds.tolist() == [0.5, 1.5, 14.5]
