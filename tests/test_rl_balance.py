"""How many threads the trainer gets: it follows what steps measure, keeps what helps, and undoes what does not."""

import pytest

from posttrain.config.base import validate_config
from posttrain.errors import ConfigError
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.balance import FASTER, REST, WINDOW, ThreadBalance

ENGINES = ("engine-0", "engine-1")
CONFIG = {"model": {"path": "m"}, "prompts": {"path": "p"}, "reward": {"name": "math"}}


class Machine:
    """Steps whose duration depends on the number of threads: `seconds[n]`; who waits is given."""

    def __init__(self, seconds, *, engines_wait, trainer_waits, threads=1, most=4):
        self.balance = ThreadBalance(threads, most, ENGINES)
        self.seconds, self.waits = seconds, (engines_wait, trainer_waits)

    def run(self, windows):
        """The number of threads after each window; a window after a change has one step more."""
        numbers = []
        for _ in range(windows):
            for _ in range(WINDOW + 1):
                engines, trainer = self.waits
                idle = {"idle/trainer": trainer, **{f"idle/{name}": engines for name in ENGINES}}
                self.balance.measured(
                    {"step_wall_s": self.seconds[self.balance.threads], "tokens_trained": 100, **idle}
                )
            numbers.append(self.balance.threads)
        return numbers


def test_threads_are_added_while_engines_wait_and_steps_become_faster():
    machine = Machine({1: 1.0, 2: 0.6, 3: 0.45, 4: 0.4}, engines_wait=0.6, trainer_waits=0.0)
    assert machine.run(16)[-1] == 4


def test_a_thread_that_does_not_help_is_taken_back_and_rests():
    machine = Machine({1: 1.0, 2: FASTER + 0.01, 3: 0.1}, engines_wait=0.6, trainer_waits=0.0)
    numbers = machine.run(REST)
    assert numbers[-1] == 1
    tried = [before for before, after in zip([1, *numbers], numbers, strict=False) if (before, after) == (1, 2)]
    assert len(tried) == 1, numbers
    assert 2 in machine.run(4)  # it is tried again later


def test_threads_are_given_back_while_the_trainer_waits():
    machine = Machine({1: 0.7, 2: 0.85, 3: 1.0}, engines_wait=0.0, trainer_waits=0.4, threads=3)
    assert machine.run(12)[-1] == 1


@pytest.mark.parametrize(("engines_wait", "trainer_waits"), [(0.3, 0.3), (0.35, 0.3), (0.0, 0.05)])
def test_nothing_is_tried_while_both_wait_about_as_much(engines_wait, trainer_waits):
    machine = Machine({2: 1.0}, engines_wait=engines_wait, trainer_waits=trainer_waits, threads=2)
    assert set(machine.run(10)) == {2}


def test_one_thread_stays_and_no_more_than_allowed_are_given():
    assert set(Machine({1: 1.0}, engines_wait=0.0, trainer_waits=0.9).run(6)) == {1}
    assert set(Machine({2: 1.0}, engines_wait=0.9, trainer_waits=0.0, threads=2, most=2).run(6)) == {2}


@pytest.mark.parametrize(
    ("resources", "more", "told"),
    [
        ({"trainer_threads": 2, "trainer": {"gpus": 1}}, {}, "trainer_threads is 2, and trainer.gpus 1"),
        ({"trainer_threads": 4, "trainer": {"cpus": 4}}, {}, "set trainer_threads: 5 or more"),
        ({"trainer_threads": 2}, {"deterministic": True, "max_staleness": 0}, "resources.trainer_threads .2."),
    ],
)
def test_threads_that_cannot_change_are_refused(resources, more, told):
    with pytest.raises(ConfigError, match=told):
        validate_config(RlConfig, {**CONFIG, "resources": resources, **more}, "rl.yaml")
