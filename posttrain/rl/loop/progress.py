"""What a run tells while it goes on: a line of metrics for each step, and the progress with a few figures beside it."""

import asyncio
from collections.abc import Callable
from typing import Any

from posttrain.context import StageContext
from posttrain.rl.loop.tally import REASONS
from posttrain.sampling.scoring import LOOK_S, lateness
from posttrain.scoring.pool.pool import PoolStats

SHOWN = ("reward_mean", "pass_rate", "staleness_mean", "queue_groups", "generate_tokens_per_s")


class StepProgress:
    """Tells of a run of `steps` steps, of which `first_step` are made.

    tokens_sampled: by the steps before, and by the profile. stats: of the reward, at any time.
    """

    def __init__(
        self,
        context: StageContext,
        steps: int,
        *,
        first_step: int,
        tokens_sampled: int,
        stats: Callable[[], PoolStats],
    ):
        self._context = context
        self._steps = steps
        self._steps_done = first_step
        self._tokens_sampled = tokens_sampled
        self._stats = stats
        self._shown: dict[str, float | str] = {}  # figures of the last step

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Step number `step` is made: write its metrics, and the progress."""
        self._tokens_sampled += values["tokens_generated"]
        self._context.metrics(step, {**values, "tokens_sampled_total": self._tokens_sampled})
        self._shown = {
            **{name: values[name] for name in SHOWN},
            "dropped_groups": sum(values[f"groups_dropped_{reason}"] for reason in REASONS),
        }
        self._steps_done = step + 1
        self._tell()

    async def watch_reward(self) -> None:
        """Show, beside the progress, that deadlines of the reward pass. Runs until it is cancelled."""
        told = 0
        while True:
            await asyncio.sleep(LOOK_S)
            if (found := self._stats().num_timeouts) > told:
                told = found
                self._tell()

    def _tell(self) -> None:
        values = {**self._shown, **lateness(self._stats())}
        self._context.progress(self._steps_done, self._steps, "steps", values=values)
