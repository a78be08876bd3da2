"""From a stage's config and a cluster to what is simulated: the stage as it is, and the same devices in turns.

In turns every device holds every model. All sample one batch, then all train on it. That is staleness 0: nothing is
sampled ahead, so the devices wait for the slowest reply of each batch.
"""

import math
import random
from dataclasses import dataclass, replace

from posttrain.config.training import ParallelConfig
from posttrain.errors import ConfigError
from posttrain.forecast.config import ClusterConfig, DeviceConfig, WorkloadConfig
from posttrain.forecast.costs import Costs, UpdateCosts
from posttrain.forecast.hardware import GIGA, engine_costs, forward_s, trainer_costs
from posttrain.forecast.memory import DeviceMemory, engine_memory, sequences_in, stacked_memory, trainer_memory
from posttrain.forecast.simulation import Draw, Setting
from posttrain.planning.memory import BYTES
from posttrain.planning.sizes import Sizes
from posttrain.rl.config import RlConfig

FEWEST_SEQUENCES = 16  # of an engine: with room for fewer, the trainer's state leaves the devices while they sample


@dataclass(frozen=True, slots=True)
class Planned:
    """One way to run a stage. devices: how many it uses. switch_s: seconds of moving state, in each step."""

    name: str
    setting: Setting
    memory: tuple[DeviceMemory, ...]
    devices: int
    switch_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Models:
    """Sizes of the models of a stage. judge: None without a judge on engines of its own."""

    policy: Sizes
    judge: Sizes | None = None


def plan_asynchronous(config: RlConfig, cluster: ClusterConfig, device: DeviceConfig, *, models: Models) -> Planned:
    """The stage as it is configured, each model on devices of its own. Raises ConfigError if there are too few."""
    counts = device_counts(config)
    if (used := sum(counts.values())) > cluster.devices:
        asked = ", ".join(f"{role} {count}" for role, count in counts.items() if count)
        raise ConfigError(
            "--cluster",
            [f"the stage asks for {used} devices ({asked}), and hosts: {cluster.hosts} with devices_per_host: "
             f"{cluster.devices_per_host} are {cluster.devices}; lower the stage's resources or add hosts"],
        )  # fmt: skip
    dtype, split, length = config.model.dtype, per_engine(config), _length(config, cluster.workload)
    gib = device.memory_gib
    trainer = trainer_memory(models.policy, config, config.parallel, memory_gib=gib)
    engine = engine_memory("engine", models.policy, dtype, devices=split, memory_gib=gib)
    memory = [trainer, engine]
    if models.judge is not None:
        memory.append(engine_memory("judge", models.judge, dtype, devices=_per_judge(config), memory_gib=gib))
    fit = sequences_in(engine.room, models.policy, dtype, devices=split, length=length)
    costs = Costs(
        engine_costs(models.policy, device, devices=split, dtype=dtype),
        trainer_costs(
            models.policy, device, devices=counts["trainer"], checkpointing=config.gradient_checkpointing,
            offload=config.parallel.offload != "none",
        ),
        _update_costs(config, cluster, device, sizes=models.policy),
        reward_s=_reward_s(config, cluster.workload),
        reference_s=_reference_s(config, cluster.workload, device, sizes=models.policy),
        judge=None if models.judge is None
        else engine_costs(models.judge, device, devices=_per_judge(config), dtype=dtype),
        cores=float(cluster.devices_per_host) if device.shares_cores else None,
    )  # fmt: skip
    setting = make_setting(config, cluster.workload, costs, engines=config.resources.rollout.most)
    setting = replace(setting, max_seqs=max(1, min(config.engine.max_num_seqs, fit)))
    return Planned("asynchronous", setting, tuple(memory), used)


def plan_stacked(config: RlConfig, cluster: ClusterConfig, device: DeviceConfig, *, models: Models) -> Planned:
    """The same devices when every model is on all of them, and sampling and training take turns."""
    counts = device_counts(config)
    used, split, dtype = sum(counts.values()), per_engine(config), config.model.dtype
    gib, length = device.memory_gib, _length(config, cluster.workload)
    parallel = _spread(config.parallel, used, models.policy)
    served = [engine_memory("engine", models.policy, dtype, devices=split, memory_gib=gib)]
    if models.judge is not None:
        served.append(engine_memory("judge", models.judge, dtype, devices=_per_judge(config), memory_gib=gib))
    trainer = trainer_memory(models.policy, config, parallel, memory_gib=gib)
    memory = stacked_memory(trainer, served, memory_gib=gib)
    fit = sequences_in(memory.room, models.policy, dtype, devices=split, length=length)
    switch_s = 0.0
    if fit < min(FEWEST_SEQUENCES, config.engine.max_num_seqs):
        switch_s = 2 * memory.moved / (device.host_gb_s * GIGA)
        fit = sequences_in(memory.room + memory.moved, models.policy, dtype, devices=split, length=length)
    engines = max(1, used // split)
    weights = BYTES[dtype] * models.policy.total
    trained = trainer_costs(
        models.policy, device, devices=used, checkpointing=config.gradient_checkpointing,
        offload=config.parallel.offload != "none",
    )  # fmt: skip
    costs = Costs(
        engine_costs(models.policy, device, devices=split, dtype=dtype),
        replace(trained, fixed_s=trained.fixed_s + switch_s),
        UpdateCosts(0.0, weights / split / (device.link_gb_s * GIGA)),
        reward_s=_reward_s(config, cluster.workload),
        reference_s=_reference_s(config, cluster.workload, device, sizes=models.policy),
        judge=None if models.judge is None
        else engine_costs(models.judge, device, devices=_per_judge(config), dtype=dtype),
        cores=float(cluster.devices_per_host) if device.shares_cores else None,
    )  # fmt: skip
    setting = make_setting(config, cluster.workload, costs, engines=engines)
    seqs = max(1, min(config.engine.max_num_seqs, fit))
    return Planned("in turns", in_turns(replace(setting, max_seqs=seqs)), (trainer, memory), used, switch_s)


def in_turns(setting: Setting) -> Setting:
    """The setting with nothing sampled ahead."""
    return replace(setting, max_staleness=0, mode="pace")


def device_counts(config: RlConfig) -> dict[str, int]:
    """Devices of each role."""
    resources = config.resources
    judge = 0 if resources.judge is None else resources.judge.workers * _per_judge(config)
    return {
        "trainer": config.parallel.processes,
        "engines": resources.rollout.most * per_engine(config),
        "judge": judge,
        "reference": int(resources.reference is not None),
    }


def per_engine(config: RlConfig) -> int:
    """Devices of one engine."""
    return max(1, config.engine.tensor_parallel, math.ceil(config.resources.rollout.gpus))


def _per_judge(config: RlConfig) -> int:
    judge = config.resources.judge
    return max(1, math.ceil(judge.gpus)) if judge is not None else 1


def _spread(parallel: ParallelConfig, devices: int, sizes: Sizes) -> ParallelConfig:
    """The layout over all devices: experts as widely as before, if that divides the devices."""
    expert = parallel.expert if devices % parallel.expert == 0 else math.gcd(devices, parallel.expert)
    return parallel.model_copy(update={"processes": devices, "expert": expert})


def make_setting(config: RlConfig, workload: WorkloadConfig, costs: Costs, *, engines: int) -> Setting:
    """What is simulated of a stage with these costs, and so many engines."""
    workers = config.reward.workers
    at_once = min(workers, config.group_size)
    judge = config.resources.judge
    return Setting(
        costs,
        sampled_draw(config, workload),
        engines,
        config.engine.max_num_seqs,
        config.groups_per_step,
        config.max_staleness,
        prompt_tokens=workload.prompt_tokens,
        mode=config.staleness,
        over_provision=config.over_provision,
        refills=config.mixture_refills,
        judges=judge.workers if judge is not None and costs.judge is not None else 0,
        judge_tokens=workload.judge_tokens,
        reward_workers=max(1, workers // at_once),
        first_replies=config.first_replies,
    )


def sampled_draw(config: RlConfig, workload: WorkloadConfig) -> Draw:
    """Draws the replies of groups from the workload's distribution. The first replies stop every group that is dropped.

    So with `first_replies` the forecast is the best case: a dropped group whose first replies differ is sampled whole.
    """
    middle, sigma = math.log(workload.reply_tokens.median), workload.reply_tokens.sigma
    most, size, drop_rate = config.sampling.max_tokens, config.group_size, workload.drop_rate

    def draw(source: random.Random, capability: str, step: int) -> tuple[list[int], bool]:
        lengths = [max(1, min(most, round(source.lognormvariate(middle, sigma)))) for _ in range(size)]
        is_kept = source.random() >= drop_rate
        return lengths if is_kept else lengths[: config.first_replies], is_kept

    return draw


def mean_reply_tokens(config: RlConfig, workload: WorkloadConfig) -> float:
    """Mean tokens of a reply, from a thousand groups."""
    draw, source = sampled_draw(config, workload), random.Random(0)
    lengths = [length for _ in range(1000) for length in draw(source, "all", 0)[0]]
    return sum(lengths) / len(lengths)


def _length(config: RlConfig, workload: WorkloadConfig) -> int:
    return workload.prompt_tokens + math.ceil(mean_reply_tokens(config, workload))


def _reward_s(config: RlConfig, workload: WorkloadConfig) -> float:
    return workload.reward_s / min(config.reward.workers, config.group_size)


def _reference_s(config: RlConfig, workload: WorkloadConfig, device: DeviceConfig, *, sizes: Sizes) -> float:
    if config.resources.reference is None:
        return 0.0
    tokens = config.group_size * _length(config, workload)
    return tokens * forward_s(sizes, device, devices=1)


def _update_costs(config: RlConfig, cluster: ClusterConfig, device: DeviceConfig, *, sizes: Sizes) -> UpdateCosts:
    weights = BYTES[config.model.dtype] * sizes.total
    between = cluster.network_gbit_s / 8 * GIGA
    recomputes = config.weights.kv == "recompute"
    onto_device_s = weights / per_engine(config) / (device.host_gb_s * GIGA)
    match config.weights.backend:
        case "shm":
            publish_s = weights / (cluster.devices_per_host * device.host_gb_s * GIGA)
            pull_s = publish_s + (weights / between if cluster.hosts > 1 else 0.0)
            return UpdateCosts(pull_s, onto_device_s, recomputes)
        case "nccl":
            return UpdateCosts(0.0, weights / (between if cluster.hosts > 1 else device.link_gb_s * GIGA), recomputes)
        case "ipc":
            return UpdateCosts(0.0, weights / (device.memory_gb_s * GIGA), recomputes)
