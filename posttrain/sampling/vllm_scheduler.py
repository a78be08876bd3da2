"""vLLM's schedulers, able to forget cached prefixes while requests run, and to let some requests wait for others.

vLLM refuses to reset the prefix cache as long as a request holds blocks, and new weights that running requests keep
their KV cache under would leave stale prefixes for others to hit. Source: `BlockPool.reset_prefix_cache` and
`Scheduler.reset_prefix_cache` of vLLM 0.32.

vLLM decides when it starts whether requests are taken by their priority. Here the first request that has one decides:
where nothing has a priority the order stays the plain one, also in an engine that was handed on.
"""

import secrets
from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.sched import async_scheduler, scheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

if TYPE_CHECKING:
    Base = scheduler.Scheduler
else:
    Base = object


class _Ours(Base):
    def add_request(self, request: Any) -> None:
        """A request with a priority turns first-come-first-served off, until the engine has nothing to do."""
        if request.priority:
            self._serve_by(SchedulingPolicy.PRIORITY)
        elif not self.requests:
            self._serve_by(SchedulingPolicy.FCFS)
        super().add_request(request)

    def _serve_by(self, policy: SchedulingPolicy) -> None:
        if self.policy is policy:
            return
        self.policy = policy
        for name in ("waiting", "kv_holding_waiting"):
            queue = create_request_queue(policy)
            for request in getattr(self, name):
                queue.add_request(request)
            setattr(self, name, queue)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Without `reset_running_requests`: forget every prefix now, and let running requests go on."""
        if reset_running_requests:
            return super().reset_prefix_cache(reset_running_requests, reset_connector)
        for request in self.requests.values():
            if request.num_computed_tokens > 0:
                set_apart(request)
        pool: Any = self.kv_cache_manager.block_pool
        pool.cached_block_hash_to_block = BlockHashToBlockMap()
        pool.cached_block_hashes_by_block.clear()
        for block in pool.blocks:
            block.reset_hash()
        return self.reset_connector_cache() if reset_connector else True


def set_apart(request: Any) -> None:
    """What this request caches from now on is found by nobody else: its blocks hold the KV of older weights."""
    if request._block_hasher is None:  # no prefix caching
        return
    request.cache_salt = secrets.token_hex(8)
    request.block_hashes = []
    request.update_block_hashes()


class Scheduler(_Ours, scheduler.Scheduler):
    """For executors without asynchronous scheduling."""


class AsyncScheduler(_Ours, async_scheduler.AsyncScheduler):
    """For the others."""
