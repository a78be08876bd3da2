"""summary.json: the state of a run, written anew after each node.

While a run is running, its status in the file is "interrupted". So the status is right if the run dies before it can
write the file again.
"""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import posttrain
from posttrain.files import read_object, write_text
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.rundir import RunDir

PACKAGES = ("torch", "vllm", "ray", "trl", "deepspeed", "transformers")


@dataclass(frozen=True)
class Summary:
    """The content of summary.json.

    wall_s: of this call. peak_rss_gib: the largest over all calls for this run directory (see memory.py).
    stages: one record for each stage that was handled, in pipeline order. evaluations: the same for the evaluations.
    eval: the results.json of each evaluation, by the name of the stage whose policy was evaluated.
    """

    status: str
    wall_s: float
    peak_rss_gib: float
    versions: Mapping[str, str]
    stages: list[dict[str, Any]]
    eval: Mapping[str, object]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    pipeline: str = ""
    seed: int = 0
    command: str = ""


class SummaryWriter:
    """Collects the records of the nodes and writes summary.json."""

    def __init__(self, pipeline: Pipeline, run_dir: RunDir, command: str):
        self._pipeline = pipeline
        self._run_dir = run_dir
        self._command = command
        self._started = time.monotonic()
        self._records: dict[str, dict[str, Any]] = {}
        self._earlier_peak = float((read_object(run_dir.summary) or {}).get("peak_rss_gib") or 0.0)

    def add(self, node: Node, status: str, record: Mapping[str, object]) -> None:
        """Note how a node ended.

        record: has wall_s, input_hash and outputs, and may have stats, error and why.
        """
        self._records[node.name] = {"name": node.name, "kind": node.kind, "status": status, **record}

    def write(self, status: str, peak_rss_gib: float) -> Summary:
        """Write summary.json and return what it holds."""
        nodes = [node for node in self._pipeline.nodes.values() if node.name in self._records]
        summary = Summary(
            status=status,
            wall_s=round(time.monotonic() - self._started, 3),
            peak_rss_gib=round(max(peak_rss_gib, self._earlier_peak), 3),
            versions=versions(),
            stages=[self._records[node.name] for node in nodes if not node.of],
            eval=self._results(nodes),
            evaluations=[self._records[node.name] for node in nodes if node.of],
            pipeline=self._pipeline.name,
            seed=self._pipeline.seed,
            command=self._command,
        )
        write_text(self._run_dir.summary, json.dumps(asdict(summary), indent=1, default=str) + "\n")
        return summary

    def _results(self, nodes: list[Node]) -> dict[str, Any]:
        results = {}
        for node in nodes:
            if node.kind == "eval" and self._records[node.name]["status"] in ("done", "skipped"):
                found = read_object(self._run_dir.folder(node) / "results.json")
                if found:
                    results[node.of or node.name] = found
        return results


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the installed libraries that affect results most."""
    found = {"posttrain": posttrain.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        for distribution in (name, f"{name}-cpu"):
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found
