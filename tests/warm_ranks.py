"""Ranks that live through all tests of a process. Their imports take longer than the trainings of the tests.

A rank is what a stage starts itself, a Ray actor that has joined the others; only it is not ended after one training.
The training that is killed in tests/test_sft.py, the RL runs of tests/test_rl_faults.py, and the quick start have ranks
of the stage's own.
"""

import contextlib
import gc
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import ray
import ray.cloudpickle

from posttrain.config.resources import TrainerResources
from posttrain.config.training import ParallelConfig
from posttrain.parallel.ranks import RankGroup

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks do not find the tests' folder


class _Caller:
    """The object of a warm rank: calls whatever it is given, or holds objects by a key and calls their methods."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        finally:
            self._clean()

    def hold(self, key: str, make: Callable[..., Any], *arguments: Any) -> None:
        self._held[key] = make(*arguments)

    def use(self, key: str, method: str, *arguments: Any) -> Any:
        return getattr(self._held[key], method)(*arguments)

    def drop(self, key: str) -> None:
        self._held.pop(key, None)
        self._clean()

    @staticmethod
    def _clean() -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # It is a global of transformers, and with ZeRO-3 in it the next model would be divided as it is loaded.
        unset_hf_deepspeed_config()
        gc.collect()


class WarmRanks:
    """Groups of ranks by their number, started when they are first needed."""

    def __init__(self) -> None:
        self._groups: dict[int, RankGroup] = {}

    def run(
        self,
        parallel: ParallelConfig,
        resources: TrainerResources,
        function: Callable[..., Any],
        *given: Any,
    ) -> Any:
        """As `posttrain.parallel.ranks.run_on_ranks`."""
        try:
            return self.group(parallel.processes).get("call", function, *given)
        except BaseException:
            if parallel.processes > 1:  # the other ranks may wait for the one that failed
                self._groups.pop(parallel.processes).close()
            raise

    def group(self, processes: int) -> RankGroup:
        """So many ranks, each with a `_Caller`. Ranks that are gone are started anew."""
        if processes in self._groups and not _answers(self._groups[processes]):
            del self._groups[processes]
        if processes not in self._groups:
            # They are idle while other tests use the CPUs of the session.
            self._groups[processes] = RankGroup(ParallelConfig(processes=processes), TrainerResources(cpus=0), _Caller)
        return self._groups[processes]

    def call(self, function: Callable[..., Any], *given: Any) -> Any:
        """`function(*given)` on the rank that is alone."""
        return self.run(ParallelConfig(), TrainerResources(), function, *given)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Within, the stages of this process train on these ranks."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("posttrain.parallel.ranks.run_on_ranks", self.run)
            patch.setattr("posttrain.rl.training.client.RankGroup", partial(LentGroup, self))
            yield

    def close(self) -> None:
        """End every rank."""
        for group in filter(_answers, self._groups.values()):
            group.close()


def _answers(group: RankGroup) -> bool:
    """Whether the ranks can still be called. Ray raises a bare `Exception` for an actor that it does not know."""
    try:
        group.get("call", os.getpid)
    except Exception:
        return False
    return True


class LentGroup:
    """As a `RankGroup`, on ranks that were there before and stay. `options`, such as deadlines, do not apply to it."""

    def __init__(
        self,
        ranks: WarmRanks,
        parallel: ParallelConfig,
        resources: TrainerResources,
        make: Callable[..., Any],
        *arguments: Any,
        **options: Any,
    ):
        self._key = secrets.token_hex(8)
        self._group = ranks.group(parallel.processes)
        self._starts = self._group._submit("hold", (self._key, make, *arguments))

    def get(self, method: str, *arguments: Any) -> Any:
        ray.get(self._starts)
        return self._group.get("use", self._key, method, *arguments)

    async def call(self, method: str, *arguments: Any) -> Any:
        ray.get(self._starts)
        return await self._group.call("use", self._key, method, *arguments)

    def close(self, last: str | None = None) -> None:
        if last is not None:
            self.get(last)
        self._group.get("drop", self._key)
