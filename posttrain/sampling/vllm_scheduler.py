"""vLLM's schedulers, able to empty the prefix cache while requests run, and to change the order of the queue.

vLLM refuses to reset the prefix cache as long as a request holds blocks. When running requests keep their KV cache
across a weight update, prefixes that were computed under the old weights would stay in the cache, and later requests
would reuse them.

vLLM fixes when it starts whether requests are served by priority. Here the first request with a priority turns that
on, and it is turned off when the engine is empty: a warm engine serves stages that use priorities and stages that do
not. The private parts of vLLM that both need are in posttrain/compat/vllm.py.

On CPUs, replies to one prompt share it to within a few tokens (posttrain/compat/vllm_prefixes.py).

What steps cost is summed up for `posttrain plan --calibrate` (step_sums.py).
"""

import os
import secrets
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched import async_scheduler, scheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy

from posttrain.compat.vllm import forget_prefixes, salt_prefixes, serve_by
from posttrain.compat.vllm_images import keep_tiles
from posttrain.compat.vllm_prefixes import PartialBlocks, share_parts_of_blocks
from posttrain.sampling.step_sums import PATH, StepClock, StepSums

if TYPE_CHECKING:
    Base = scheduler.Scheduler
else:
    Base = object


class _Ours(Base):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._parts = PartialBlocks(self)
        self._clock = StepClock(StepSums(os.environ[PATH]))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """The next step. A request whose prompt another one computes in this very step is left for the next."""
        self._clock.end()
        self._parts.begin_step()
        output = super().schedule(*args, **kwargs)
        self._clock.begin(output.num_scheduled_tokens.values())
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Take in what a step has sampled."""
        outputs = super().update_from_output(*args, **kwargs)
        if not self.requests:
            self._clock.end()
        return outputs

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        hit = super()._get_local_prefix_cache_hit(request)
        self._parts.look_up(request, hit[0], hit[1])
        return hit

    def _ec_transfer_pending(self, request: Any, num_computed_tokens: int) -> bool:
        """What vLLM asks after each look-up: whether the request has to wait."""
        return self._parts.is_waiting(request) or super()._ec_transfer_pending(request, num_computed_tokens)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._parts.keep_end(request)
        return super()._free_request(request, *args, **kwargs)

    def add_request(self, request: Any) -> None:
        """A request with a priority turns first-come-first-served off, until the engine has nothing to do."""
        if request.priority:
            serve_by(self, SchedulingPolicy.PRIORITY)
        elif not self.requests:
            serve_by(self, SchedulingPolicy.FCFS)
        super().add_request(request)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Without `reset_running_requests`: forget every prefix now, and let running requests go on."""
        self._clock.forget()  # weights are updated
        if reset_running_requests:
            return super().reset_prefix_cache(reset_running_requests, reset_connector)
        for request in self.requests.values():
            if request.num_computed_tokens > 0:
                salt_prefixes(request, secrets.token_hex(8))
        forget_prefixes(self.kv_cache_manager.block_pool)
        return self.reset_connector_cache() if reset_connector else True


class Scheduler(_Ours, scheduler.Scheduler):
    """For executors without asynchronous scheduling."""


class AsyncScheduler(_Ours, async_scheduler.AsyncScheduler):
    """For executors with asynchronous scheduling."""


keep_tiles()
share_parts_of_blocks()  # the engine core imports this module before it plans its KV cache
