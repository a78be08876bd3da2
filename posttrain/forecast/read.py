"""Reads what a forecast needs beside a stage's config: the cluster file, the device, the sizes of the models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.base import load_config
from posttrain.errors import ConfigError
from posttrain.forecast.config import ClusterConfig, DeviceConfig
from posttrain.forecast.hardware import measured_cpu
from posttrain.forecast.setting import Models
from posttrain.planning.config import PlanConfig
from posttrain.planning.layouts import need
from posttrain.planning.sizes import Sizes, count_sizes, find_model, read_config
from posttrain.resources import bundled, bundled_names
from posttrain.rl.config import RlConfig

MEASURED = "cpu"


def read_cluster(path: Path) -> ClusterConfig:
    """The cluster file. Raises ConfigError."""
    return load_config(ClusterConfig, path)


def find_device(cluster: ClusterConfig) -> DeviceConfig:
    """The device of a cluster. Raises ConfigError for a name that is not bundled."""
    if isinstance(cluster.device, DeviceConfig):
        return cluster.device
    if cluster.device == MEASURED:
        return measured_cpu(cluster.devices_per_host)
    known = [name.removeprefix("devices/") for name in bundled_names("configs") if name.startswith("devices/")]
    if cluster.device not in known:
        names = ", ".join((*known, MEASURED))
        raise ConfigError("device", [f"got {cluster.device!r}; give one of {names}, or the keys of a device"])
    return load_config(DeviceConfig, bundled("configs", f"devices/{cluster.device}"))


def find_models(config: RlConfig, cluster: ClusterConfig, *, calibrated: Path | None = None) -> Models:
    """The sizes of the policy, and of a judge on engines. Raises ConfigError if they are not known."""
    policy = _sizes("model", cluster.model or _folder(config.model.path, calibrated), config)
    judge = None
    if config.resources.judge is not None:
        judge = _sizes("judge_model", cluster.judge_model, None) if cluster.judge_model else policy
    need(policy, PlanConfig(parallel=config.parallel, dtype=config.model.dtype, lora=config.lora))  # experts divide
    return Models(policy, judge)


def _folder(path: str, calibrated: Path | None) -> str:
    """The model folder of a stage; if another stage makes it, that of the run that is calibrated from."""
    made = calibrated / "rl" / "model" if calibrated is not None else None
    return str(made) if made is not None and "${" in path and made.exists() else path


def _sizes(key: str, name: str, config: RlConfig | None) -> Sizes:
    try:
        return count_sizes(read_config(find_model(name)), config.lora if config is not None else None)
    except ConfigError as error:
        problems: Sequence[Any] = error.problems
        raise ConfigError("--cluster", [f"{key}: got {name!r}: {problem}" for problem in problems]) from None
