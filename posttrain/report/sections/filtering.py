"""The filter: how hard the judge found the examples, which were kept and which were dropped."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.files import read_jsonl
from posttrain.report.blocks import Chart, Key, Section, Stat, Stats, Table
from posttrain.report.charts import axis, bars, figure
from posttrain.report.format import count, percent
from posttrain.report.read import Run, Stage, mapping, number

BINS = 20
TAGS = ("easy", "medium", "hard")


def filter_section(run: Run, stage: Stage) -> Section | None:
    """The section, or None if the stage wrote no rows."""
    kept = list(_difficulties(stage.dir / "kept.jsonl"))
    dropped = list(_difficulties(stage.dir / "dropped.jsonl"))
    total = len(kept) + len(dropped)
    if not total:
        return None
    blocks: list[Any] = [Stats(_stats(kept, dropped))]
    scores = [score for _, _, score in kept + dropped if score is not None]
    if scores:
        blocks.append(_histogram(kept, dropped, scores))
    blocks.append(_by_capability(kept, dropped))
    lead = [f"A judge model rated how hard each of {count(total)} supervised examples is; the hardest are kept."]
    return Section(stage.name, "Filter", blocks, lead)


def _difficulties(path: Path) -> Iterator[tuple[str, str, float | None]]:
    """(capability, tag, score) of each row of a file."""
    for row in read_jsonl(path, on_bad=lambda: None):
        difficulty = mapping(row.get("difficulty"))
        yield str(row.get("capability", "")), str(difficulty.get("tag", "")), number(difficulty.get("score"))


def _stats(kept: list, dropped: list) -> list[Stat]:
    total = len(kept) + len(dropped)
    stats = [
        Stat("kept", count(len(kept)), percent(len(kept) / total, 1)),
        Stat("dropped", count(len(dropped)), percent(len(dropped) / total, 1)),
    ]
    for rows, name in ((kept, "kept"), (dropped, "dropped")):
        hard = sum(tag == "hard" for _, tag, _ in rows)
        if rows and any(tag == "hard" for _, tag, _ in kept + dropped):
            stats.append(Stat(f"hard, of the {name}", percent(hard / len(rows), 1), "by the judge's tag"))
    return stats


def _histogram(kept: list, dropped: list, scores: list[float]) -> Chart:
    low, high = math.floor(min(scores) * 100) / 100, math.ceil(max(scores) * 100) / 100
    width = (high - low) / BINS or 0.05
    centres = [round(low + (i + 0.5) * width, 4) for i in range(BINS)]

    def binned(rows: list) -> list[float | None]:
        places = Counter(min(int((s - low) / width), BINS - 1) for _, _, s in rows if s is not None)
        return [places[i] for i in range(BINS)]

    data = [
        bars(centres, binned(dropped), "--faint", name="dropped", hover="%{y} examples"),
        bars(centres, binned(kept), "--accent", name="kept", hover="%{y} examples"),
    ]
    spec = figure(data, axis("score, higher is harder", grid=False), axis(), barmode="stack", bargap=0.08)
    keys = [Key("kept", "--accent", "box"), Key("dropped", "--faint", "box")]
    return Chart("Difficulty by the judge", spec, 240, "examples", keys=keys)


def _by_capability(kept: list, dropped: list) -> Table:
    names = dict.fromkeys(capability for capability, _, _ in kept + dropped)
    tags = [tag for tag in TAGS if any(row[1] == tag for row in kept + dropped)]
    rows = []
    for name in sorted(names):
        mine = [[row for row in part if row[0] == name] for part in (kept, dropped)]
        total = sum(map(len, mine))
        cells = (f"{sum(r[1] == tag for r in mine[0])} / {sum(r[1] == tag for p in mine for r in p)}" for tag in tags)
        rows.append((name, count(total), count(len(mine[0])), percent(len(mine[0]) / total, 1), *cells))
    columns = ("capability", "examples", "kept", "share", *(f"{tag}, kept / all" for tag in tags))
    return Table(columns, rows, numeric=range(1, len(columns)))
