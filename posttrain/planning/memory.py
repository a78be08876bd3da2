"""Bytes that one rank of a training holds, by part, under the rules of our DeepSpeed engines. Arithmetic, no torch.

Every rule was measured on real engines (tests/test_planning.py). `held` parameters are those of a rank before ZeRO: all
except the experts of other ranks. A `share` is the part that remains on a rank with ZeRO: experts are divided among the
ranks (processes / expert) that hold the same ones, all other parameters among all processes.
Left out: the CUDA context, NCCL, workspaces of kernels, fragmentation.
"""

from dataclasses import dataclass, replace

from posttrain.config.training import ParallelConfig

BYTES = {"float32": 4, "bfloat16": 2}
FP32 = 4
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
LIVE = 1_000_000_000  # stage3_max_live_parameters: how many undivided parameters ZeRO-3 may hold at a time
SUB_GROUP = 1_000_000_000  # number of elements that ZeRO-3 updates at a time


@dataclass(frozen=True, slots=True)
class State:
    """Bytes of one rank. optimizer: fp32 masters and both moments of Adam.

    step: the largest size of the gradients within the optimizer's step. buffers: ZeRO's buffers in the backward pass.
    host: optimizer state that offload keeps in CPU memory.
    """

    weights: int
    gradients: int
    optimizer: int
    step: int
    buffers: int
    host: int = 0

    def total(self, activations: int = 0) -> int:
        """The larger of the two peaks: the backward pass with its activations, and the optimizer's step."""
        backward = self.gradients + self.buffers + activations
        return self.weights + self.optimizer + max(backward, self.step)


def state_bytes(
    total: int,
    experts: int,
    parallel: ParallelConfig,
    *,
    dtype: str,
    adapters: int = 0,
    largest: int = 0,
    bucket: int = BUCKET,
    live: int = LIVE,
) -> State:
    """The bytes of one rank when all weights are trained, or adapters alone.

    total, experts: number of parameters of the model, and of those in routed experts. dtype: of the weights. adapters:
    number of parameters of adapters; if there are any, only these are trained. largest: number of parameters of the
    largest module on one rank, which ZeRO-3 gathers to use it. bucket, live: DeepSpeed's reduce_bucket_size and
    stage3_max_live_parameters, in elements.
    """
    if adapters:
        base = state_bytes(total, experts, parallel, dtype=dtype, largest=largest, bucket=bucket, live=live)
        whole = ParallelConfig(processes=parallel.processes, zero=parallel.zero, offload=parallel.offload)
        own = state_bytes(adapters, 0, whole, dtype=dtype)
        return replace(own, weights=base.weights + own.weights, buffers=base.buffers)
    b, ranks, zero = BYTES[dtype], parallel.processes, parallel.zero
    dense = total - experts
    held = dense + experts // parallel.expert
    share = -(-total // ranks)
    trained = share if zero else held
    masters = FP32 * trained if zero or dtype != "float32" else 0
    optimizer = masters + 2 * FP32 * trained
    gradients = b * (share if zero >= 2 else held)
    buffers = b * bucket if zero else 0
    if zero == 3:
        buffers += b * max(largest, min(live, held))
    state = State(
        weights=b * (share if zero == 3 else held),
        gradients=gradients,
        optimizer=optimizer,
        step=_step_gradients(dense, experts, parallel, b=b),
        buffers=buffers,
    )
    if parallel.offload == "none":
        return state
    # Masters, moments and the fp32 gradients of the step are in CPU memory.
    return State(state.weights, state.gradients, 0, 0, state.buffers, host=optimizer + FP32 * share)


def _step_gradients(dense: int, experts: int, parallel: ParallelConfig, *, b: int) -> int:
    """The largest size of the gradients in the step: the optimizer converts them to fp32, divided experts last."""
    ranks = parallel.processes
    if parallel.zero == 0:
        held = dense + experts // parallel.expert
        return b * held + (FP32 * held if b < FP32 else 0)
    groups = [dense // ranks, experts // ranks] if parallel.expert > 1 else [(dense + experts) // ranks]
    share = sum(groups)
    if parallel.zero == 3:
        return b * share + FP32 * max(min(group, SUB_GROUP) for group in groups)
    if len(groups) == 1:
        return FP32 * share
    return max(b * share + FP32 * groups[0], FP32 * groups[1])
