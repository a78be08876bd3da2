"""Costs from the shape of a model and the figures of a device: an engine that decodes is bound by its memory until its
batch is large, prompts and training by products of matrices.

Left out: the exchange of tokens between the ranks of expert parallelism and ZeRO's gathers, except as far as
`train_efficiency` has them; attention's own operations, which are few for replies of some thousand tokens.
"""

import time
from collections.abc import Callable

from posttrain.config.training import GradientCheckpointing
from posttrain.forecast.config import DeviceConfig
from posttrain.forecast.costs import EngineCosts, TrainerCosts
from posttrain.planning.activations import kv_bytes
from posttrain.planning.memory import BYTES
from posttrain.planning.sizes import Sizes

TERA, GIGA = 1e12, 1e9
FORWARD, BACKWARD = 2, 4  # operations for each weight that a token uses: a product, and two in the backward pass
STATE = 28  # bytes that AdamW reads and writes for a weight: gradient, master and moments in fp32, the weight


def engine_costs(sizes: Sizes, device: DeviceConfig, *, devices: int, dtype: str) -> EngineCosts:
    """Costs of an engine that is split over `devices` devices."""
    b, config = BYTES[dtype], sizes.config
    bandwidth = devices * device.memory_gb_s * GIGA * device.decode_efficiency
    embeddings = sizes.parts.get("embeddings", 0)  # of which a token reads one row
    token_s = FORWARD * (sizes.active - embeddings) / (devices * device.tflops * TERA * device.prefill_efficiency)
    idle = 1 - config.num_experts_per_tok / config.num_local_experts if sizes.experts else 0.0
    context = kv_bytes(config, 1, 1, dtype=dtype) if sizes.native else 0
    return EngineCosts(
        device.engine_step_s,
        token_s,
        prefill_s=token_s,
        dense_s=b * (sizes.total - sizes.experts - embeddings) / bandwidth,
        experts_s=b * sizes.experts / bandwidth,
        idle_expert=idle,
        context_s=context / bandwidth,
    )


def trainer_costs(
    sizes: Sizes, device: DeviceConfig, *, devices: int, checkpointing: GradientCheckpointing, offload: bool = False
) -> TrainerCosts:
    """Costs of an optimizer step on `devices` devices.

    Efficiencies are published for weights that are all trained; adapters need no products for the gradients of weights.
    checkpointing: a published efficiency with `full` leaves out that the forward is made twice, so it is not counted.
    """
    products = FORWARD + (BACKWARD / 2 if sizes.adapters else BACKWARD)
    if checkpointing == "none":
        products *= 3 / 4  # the published efficiency is that of `full`, which makes the forward twice
    rate = devices * device.tflops * TERA * device.train_efficiency
    trained = sizes.adapters or sizes.total
    bandwidth = (device.host_gb_s if offload else device.memory_gb_s) * GIGA
    return TrainerCosts(trained * STATE / devices / bandwidth, products * sizes.active / rate)


def forward_s(sizes: Sizes, device: DeviceConfig, *, devices: int) -> float:
    """Seconds of one token in a forward: of a reference."""
    return FORWARD * sizes.active / (devices * device.tflops * TERA * device.prefill_efficiency)


def measured_cpu(cores: int) -> DeviceConfig:
    """One core of this machine, of which there are `cores`: measured with one thread in about a second.

    What no measurement of the machine alone can say, the step of an engine and the shares that programs reach, are
    round figures. `--calibrate` replaces them.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = torch.randn(512, 512), torch.randn(512, 512)
        product_s = _best(lambda: a @ b)
        source = torch.zeros(16 << 20)
        target = torch.empty_like(source)
        copy_s = _best(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(threads)
    bandwidth = 2 * source.numel() * 4 / copy_s / GIGA
    return DeviceConfig(
        name="a core of this machine",
        source="measured: a product of two matrices of 512 x 512 in fp32, a copy of 64 MiB, one thread",
        memory_gib=_memory_gib() / cores,
        tflops=2 * 512**3 / product_s / TERA,
        memory_gb_s=bandwidth,
        link_gb_s=bandwidth / 2,
        host_gb_s=bandwidth / 2,
        train_efficiency=0.3,
        prefill_efficiency=0.3,
        decode_efficiency=0.5,
        engine_step_s=0.003,
        shares_cores=True,
    )


def _best(work: Callable[[], object], times: int = 20) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def _memory_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / 2**30
