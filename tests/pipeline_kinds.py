"""Small real stages for the tests of the pipeline: they count steps, keep checkpoints, fail when told to.

Run as a script it is the `posttrain` command with these kinds added to the table:

    python tests/pipeline_kinds.py run pipeline.yaml
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config.base import MAY_GROW, RESULT_STAYS, Config
from posttrain.config.data import DataConfig
from posttrain.config.models import ModelConfig
from posttrain.config.resources import ActorResources
from posttrain.config.rewards import RewardConfig
from posttrain.context import StageContext
from posttrain.errors import DataError
from posttrain.pipeline.kinds import KINDS, StageKind


def said_on(master: int) -> str:
    """The text that was written to a terminal whose other end is closed. Closes this end too."""
    parts: list[bytes] = []
    try:
        while part := os.read(master, 1 << 16):
            parts.append(part)
    except OSError:  # the kernel has handed over everything
        pass
    finally:
        os.close(master)
    return b"".join(parts).decode()


class CountResources(Config):
    """What the counting stage declares."""

    trainer: ActorResources = Field(default_factory=ActorResources)


class CountConfig(Config):
    """A stage that counts to `steps`, sleeping in between, and writes the number it was given plus its input's."""

    add: int = 1
    source: str | None = None
    steps: Annotated[int, Field(ge=1)] = Field(2, json_schema_extra=MAY_GROW)
    step_s: float = Field(0.0, json_schema_extra=RESULT_STAYS)
    checkpoint: bool = True
    write_bytes: int = 0
    limit_bytes: int | None = None
    trouble: Literal["", "error", "user", "kill", "nothing"] = ""
    trouble_unless: str = Field("", description="A file that, once it exists, ends the trouble.")
    model: ModelConfig | None = None
    data: DataConfig | None = None
    reward: RewardConfig | None = None
    resources: CountResources = Field(default_factory=CountResources)


def run(config: CountConfig, context: StageContext) -> dict[str, Any]:
    """Count, from the checkpoint if there is one."""
    print(f"counting in process {os.getpid()}")
    os.write(1, b"written to the descriptor itself\n")
    saved = context.dir / "checkpoints"
    saved.mkdir(exist_ok=True)
    start = max((int(path.name.removeprefix("step_")) for path in saved.glob("step_*")), default=0)
    context.event("begins", step=start)
    for step in range(start, config.steps):
        time.sleep(config.step_s)
        context.progress(step + 1, config.steps, "steps", values={"reward": step / config.steps})
        if config.checkpoint:
            (saved / f"step_{step + 1}").touch()
            (saved / f"step_{step}").unlink(missing_ok=True)
    if config.trouble and not (config.trouble_unless and Path(config.trouble_unless).exists()):
        make_trouble(config.trouble)
        return {}
    if config.limit_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (config.limit_bytes, config.limit_bytes))
    (context.dir / "count.txt").write_text(
        str(config.add + (int(Path(config.source).read_text()) if config.source else 0))
    )
    if config.write_bytes:
        with (context.dir / "big").open("wb") as big:
            for _ in range(config.write_bytes >> 16):
                big.write(os.urandom(1 << 16))
    return {"count": str(context.dir / "count.txt"), "stats": {"steps": config.steps - start}}


def make_trouble(kind: str) -> None:
    """Fail in the way that the config asks for."""
    if kind == "error":
        raise ValueError("the experts disagree\nand a second line")
    if kind == "user":
        raise DataError("rows.jsonl: row 37: no 'messages'")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


class ScoreConfig(Config):
    """The config of a small evaluation: it reads a model's path and writes results.json."""

    model: ModelConfig
    weight: int = 1


def score(config: ScoreConfig, context: StageContext) -> dict[str, Any]:
    """Write what was counted as a result."""
    import json

    value = int((Path(config.model.path) / "count.txt").read_text())
    results = {"all": {"n": 1, "greedy": value * config.weight}}
    (context.dir / "results.json").write_text(json.dumps(results))
    return {"stats": results["all"]}


KINDS["count"] = StageKind(
    schema="pipeline_kinds:CountConfig",
    run="pipeline_kinds:run",
    outputs={"count": "count.txt", "model": "."},
    data={"data": "supervised"},
    packages=("yaml",),
)


if __name__ == "__main__":
    import pipeline_kinds  # the same table entry, by the name that a stage's process imports it under

    from posttrain.cli.main import main

    if os.environ.get("POSTTRAIN_TEST_EVAL"):
        KINDS["eval"] = StageKind(
            schema="pipeline_kinds:ScoreConfig", run="pipeline_kinds:score", outputs={"results": "results.json"}
        )
    assert pipeline_kinds.KINDS is KINDS
    sys.exit(main())
