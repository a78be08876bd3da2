"""An engine and a trainer that answer at once, for measurements of what is between them."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.records import FinishReason, VersionSpan
from posttrain.rl.training.protocol import StepResult
from posttrain.rl.training.samples import TrainSample
from posttrain.sampling.manifests import WeightManifest
from posttrain.sampling.packed import Pieces
from posttrain.sampling.requests import Piece, SampleRequest, Updated

TOKENS = 8  # of a reply
PIECES_AT_ONCE = 1024


class PreparedEngine:
    """Has the methods of `EngineActor` for rollouts. `collect` answers every request; mute: it answers none."""

    def __init__(self, mute: bool):
        self._mute = mute
        self._version = 0
        self._waiting: list[tuple[int, int]] = []
        self._event = asyncio.Event()

    async def submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        if not self._mute:
            self._waiting += [(key, index) for key, request in requests for index in range(request.n)]
            self._event.set()

    async def collect(self, wait_s: float) -> tuple[list[Piece], float]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._event.wait()
        now, self._waiting = self._waiting[:PIECES_AT_ONCE], self._waiting[PIECES_AT_ONCE:]
        if not self._waiting:
            self._event.clear()
        ids, logprobs = tuple(range(TOKENS)), (-1.0,) * TOKENS
        spans = (VersionSpan(self._version, 0, TOKENS),)
        pieces = [Piece(key, index, 0, ids, logprobs, spans, FinishReason.STOP, "12") for key, index in now]
        return Pieces(pieces), time.time()

    async def update_weights(self, source: dict[str, Any], policy_version: int, kv: str) -> Updated:
        self._version = policy_version
        return Updated(time.time(), time.time(), [])

    async def cancel(self, keys: Sequence[int]) -> None:
        """Do nothing, as no request runs."""

    async def forget(self) -> None:
        """Do nothing, as no request runs."""

    async def pids(self) -> dict[str, int]:
        return {"actor": os.getpid()}


class ReadyTrainer:
    """Takes the place of a `TrainerClient`. A step takes no time, or as long as `held` says."""

    def __init__(self) -> None:
        self.times: list[tuple[float, dict[str, float]]] = []  # wall time at each step, and what `look` gave then
        self.look: Callable[[], dict[str, float]] = dict
        self.held: asyncio.Event | None = None

    async def async_publish(self) -> WeightManifest:
        return no_weights(0)

    async def async_logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        return [list(sample.sampler_logprobs) for sample in samples]

    async def async_step(self, samples: Sequence[TrainSample], step: int) -> StepResult:
        if self.held is not None:
            await self.held.wait()
        await asyncio.sleep(0)
        self.times.append((time.perf_counter(), self.look()))
        now = time.time()
        return StepResult({}, no_weights(step + 1), now, now)

    async def async_save_checkpoint(self, folder: Path, state: dict[str, Any]) -> None:
        folder.mkdir()


def no_weights(version: int) -> WeightManifest:
    """A manifest for engines that load nothing."""
    return WeightManifest("none", version, 0, "none", ())
