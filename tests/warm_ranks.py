"""Ranks that live through all tests of a module. Their imports take longer than the trainings of SFT and DPO tests.

A rank is what a stage starts itself, a Ray actor that has joined the others; only it is not ended after one training.
The training that is killed in tests/test_sft.py, and the quick start, have ranks of the stage's own.
"""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray.cloudpickle

from posttrain.config.resources import TrainerResources
from posttrain.config.training import ParallelConfig
from posttrain.parallel.ranks import RankGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks do not find the tests' folder


class _Caller:
    """The object of a warm rank: calls whatever it is given."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        try:
            return function(*arguments)
        finally:
            # It is a global of transformers, and with ZeRO-3 in it the next model would be divided as it is loaded.
            unset_hf_deepspeed_config()
            gc.collect()


class WarmRanks:
    """Groups of ranks by their number, started when they are first needed."""

    def __init__(self) -> None:
        self._groups: dict[int, RankGroup] = {}

    def run(
        self, parallel: ParallelConfig, resources: TrainerResources, function: Callable[..., Any], *given: Any
    ) -> Any:
        """As `posttrain.parallel.ranks.run_on_ranks`."""
        if parallel.processes not in self._groups:
            # The session is shared with tests that leave a warm engine on one of the two CPUs.
            self._groups[parallel.processes] = RankGroup(
                ParallelConfig(processes=parallel.processes), TrainerResources(cpus=0.25), _Caller
            )
        return self._groups[parallel.processes].get("call", function, *given)

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """`function(*given)` on the rank that is alone."""
        return self.run(ParallelConfig(), TrainerResources(), function, *given)

    def close(self) -> None:
        """End every rank."""
        for group in self._groups.values():
            group.close()


@contextlib.contextmanager
def warm_ranks() -> Iterator[WarmRanks]:
    """Within, the stages of this process train on warm ranks."""
    ranks = WarmRanks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.parallel.ranks.run_on_ranks", ranks.run)
        try:
            yield ranks
        finally:
            ranks.close()
