"""The appendix, with all that is needed to repeat the run: commands, versions and every setting."""

import shlex
from pathlib import Path
from typing import Any

from posttrain.report.blocks import Code, Section, Table, Text
from posttrain.report.read import Run, mapping

MAX_CHARS = 60_000


def appendix_section(run: Run) -> Section | None:
    """The section, or None if the run has recorded nothing that belongs here."""
    blocks: list[Any] = []
    if commands := _commands(run):
        blocks.append(Code("\n".join(commands)))
    if versions := mapping(run.summary.get("versions")):
        rows = [(name, str(version)) for name, version in sorted(versions.items())]
        blocks.append(Table(("package", "version"), rows))
    if text := _text(run.dir / "pipeline.yaml"):
        blocks.append(Code(text, "pipeline.yaml, every default written out"))
    configs = [(stage.name, _text(stage.dir / "config.yaml")) for stage in run.stages]
    blocks += [Code(text, f"{name}/config.yaml") for name, text in configs if text]
    if run.notes:
        blocks.append(Text(run.notes, tone="note"))
    return Section("again", "Commands and versions", blocks) if blocks else None


def _commands(run: Run) -> list[str]:
    """Every command that was run on this run directory, oldest first, as recorded in the events."""
    found = [event.get("command") for event in run.events] + [run.summary.get("command")]
    lines = [c if isinstance(c, str) else shlex.join(map(str, c)) for c in found if isinstance(c, str | list) and c]
    return list(dict.fromkeys(lines))


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + "\n… the rest is in the run directory"
