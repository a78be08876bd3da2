"""Runs pipelines: from YAML to a graph of stages, on Ray, with a run directory that a later call continues.

config.py graph.py references.py    YAML, overrides and ${stage.output} become checked nodes
kinds.py layers.py                  the table of the kinds of stage; the table of who may import whom
inputs.py model_folders.py packages.py engines.py lengths.py rendering.py doubts.py   checks before anything starts
hashing.py changes.py decide.py replace.py   which stages run again, continue or are skipped, and why
plan.py                             the resolved plan: inputs, outputs, CPUs, GPUs, memory
run.py schedule.py stage_process.py adapters.py   run the stages as Ray tasks, each in a process of its own
rundir.py run_place.py summary.py memory.py   the files of the run directory; where it may be
ray_session.py watchdog.py          a Ray session that leaves no process behind
single.py                           one stage from Python

Public names are imported when they are first used.
"""

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
