"""Workers that join and leave while the others sample.

join ──► engine starts ──► weights of the newest version ──► compared with an engine that counts ──► it gets turns
leave ──► it gets no more turns ──► finishes what it has, for a while ──► others finish the rest ──► engine ends
"""

import asyncio
import time
from collections.abc import Sequence

from posttrain.errors import StageError
from posttrain.sampling.client import Engines
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.sampling.worker import Worker
from posttrain.sampling.workers import RolloutWorkers

LOOK_S = 0.05


async def join(
    workers: RolloutWorkers, engines: Engines, requests: Sequence[SampleRequest], *, tolerance: float
) -> tuple[Worker, float]:
    """Add a worker, while `workers.run` runs. It is sent turns once it has passed `compare`. Returns it, and the gap.

    Raises what the start of the engine raises, and StageError if it fails the comparison. Then there is neither a new
    worker nor a new engine.
    """
    version = max(worker.policy_version for worker in workers.workers)
    seat = await engines.join()
    worker = workers.make(seat, version, is_alive=False)
    workers.workers.append(worker)  # so that the trainer overwrites no weights that it reads
    try:
        gap = await compare(worker, workers, requests, tolerance=tolerance)
        await workers.weights.begin(worker)
    except Exception:
        workers.workers.remove(worker)
        await engines.leave(seat)
        raise
    workers.serve(worker)
    return worker, gap


async def leave(workers: RolloutWorkers, engines: Engines, worker: Worker, *, within_s: float) -> int:
    """End a worker and its engine. Returns how many requests it had not finished in time: others finish them."""
    worker.is_leaving = True
    until = time.monotonic() + within_s
    while worker.asks and time.monotonic() < until:
        await asyncio.sleep(LOOK_S)
    async with worker.lock:  # it may read weights, which the trainer must not overwrite meanwhile
        left = workers.take_out(worker)
    await engines.leave(worker.seat)
    return left


async def compare(
    worker: Worker, workers: RolloutWorkers, requests: Sequence[SampleRequest], *, tolerance: float
) -> float:
    """Have a new worker load the newest weights, and sample the same as a worker that counts.

    requests: are sampled without chance. Returns the mean gap of the log-probabilities, in nats. Raises StageError if
    it is above the tolerance, or if the new engine samples with another version.
    """
    while True:
        peer = await _peer(workers)
        peer.is_kept = True
        try:
            await workers.weights.load(worker)
            if worker.policy_version == peer.policy_version:
                theirs = await peer.await_busy(peer.actor.sample.remote(requests))
                ours = await worker.await_busy(worker.actor.sample.remote(requests))
                return _gap(worker, peer, ours=ours, theirs=theirs, tolerance=tolerance)
        finally:
            if peer.is_kept:  # it may have been lost
                await workers.weights.release(peer)


async def _peer(workers: RolloutWorkers) -> Worker:
    """Wait for a worker that has the newest version."""
    while (peer := workers.weights.newest()) is None or peer.is_leaving:
        await asyncio.sleep(LOOK_S)
    return peer


def _gap(
    worker: Worker,
    peer: Worker,
    *,
    ours: Sequence[Sequence[Completion]],
    theirs: Sequence[Sequence[Completion]],
    tolerance: float,
) -> float:
    version, gaps = peer.policy_version, []
    for (our,), (their,) in zip(ours, theirs, strict=True):
        for completion, name in ((our, worker.name), (their, peer.name)):
            if found := {span.policy_version for span in completion.versions} - {version}:
                raise StageError(f"{name} sampled with version {found.pop()} in the place of {version}")
        # Where two tokens are as likely, either may be taken. The replies cannot be compared after that.
        same = next(
            (i for i, pair in enumerate(zip(our.token_ids, their.token_ids, strict=False)) if pair[0] != pair[1]), None
        )
        end = min(len(our.token_ids), len(their.token_ids)) if same is None else same + 1
        gaps += [abs(one - other) for one, other in zip(our.logprobs[:end], their.logprobs[:end], strict=True)]
    gap = sum(gaps) / len(gaps)
    if not gap <= tolerance:
        raise StageError(
            f"{worker.name} and {peer.name} disagree on {len(gaps)} tokens of policy version {version}: mean gap "
            f"{gap:.2g}, largest {max(gaps):.2g}, allowed mean {tolerance:g} (parity_tolerance)"
        )
    return gap
