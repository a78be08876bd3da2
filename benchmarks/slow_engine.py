"""A plug-in of vLLM by which every step of an engine begins with a sleep, so that many engines really run side by side
on two cores: each needs little of a core, as an engine on a GPU of its own does. elastic.py installs it for its runs.

A sleep is no work: it says nothing about how fast engines are, only about how their number is chosen.
"""

import functools
import os
import sys
import time
from pathlib import Path

VARIABLE = "SLOW_ENGINE_S"  # seconds
ENTRY_POINTS = f"[vllm.general_plugins]\nslow_engine = {__name__}:register\n"
METADATA = "Metadata-Version: 2.1\nName: slow-engine\nVersion: 0\n"


def install(folder: Path, seconds: float) -> None:
    """Have all engines that this process starts load the plug-in. folder: gets the files by which vLLM finds it."""
    described = folder / "slow_engine-0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(METADATA)
    (described / "entry_points.txt").write_text(ENTRY_POINTS)
    before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    paths = [str(folder), str(Path(__file__).resolve().parent), *before]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ[VARIABLE] = str(seconds)


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.v1.engine.core import EngineCore

    seconds = float(os.environ[VARIABLE])
    for name in ("step", "step_with_batch_queue"):
        setattr(EngineCore, name, _slowed(getattr(EngineCore, name), seconds))
    print(f"slow_engine: each step begins with {seconds} s of sleep", file=sys.stderr, flush=True)


def _slowed(step, seconds: float):
    @functools.wraps(step)
    def slowed(core):
        if core.scheduler.has_requests():
            time.sleep(seconds)
        return step(core)

    return slowed
