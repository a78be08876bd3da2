"""Pipelines: YAML to a graph of stages on Ray, run directory, resume. Imports nothing until a name is used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.pipeline.graph import load_pipeline
    from posttrain.pipeline.run import run_pipeline

__all__ = ["load_pipeline", "run_pipeline"]


def __getattr__(name: str) -> Any:
    if name == "run_pipeline":
        from posttrain.pipeline.run import run_pipeline

        return run_pipeline
    if name == "load_pipeline":
        from posttrain.pipeline.graph import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
