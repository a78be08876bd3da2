"""Pipelines: YAML to a graph of stages on Ray, run directory, resume. Names are imported when they are first used."""

from typing import TYPE_CHECKING

from posttrain.lazy import lazy_names

if TYPE_CHECKING:
    from posttrain.pipeline.graph import load_pipeline
    from posttrain.pipeline.run import run_pipeline
    from posttrain.pipeline.single import run_stage

__all__ = ["load_pipeline", "run_pipeline", "run_stage"]

__getattr__, __dir__ = lazy_names(
    __name__, {"graph": ["load_pipeline"], "run": ["run_pipeline"], "single": ["run_stage"]}
)
