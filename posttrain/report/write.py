"""Writes the report of a run: reads the run directory, builds each section, fills the page.

A section without data is left out. A section whose data cannot be read is replaced by a note. The page loads nothing:
script, style and data are in it, and its content security policy forbids everything else.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup, escape

from posttrain import __version__
from posttrain.files import write_text
from posttrain.report.blocks import Chart, Grid, Leaf, Section, Text
from posttrain.report.charts import colours_of
from posttrain.report.format import plural, seconds, utc
from posttrain.report.read import Run, number, read_run
from posttrain.report.sections.appendix import appendix_section
from posttrain.report.sections.faults import faults_section
from posttrain.report.sections.filtering import filter_section
from posttrain.report.sections.pipeline import pipeline_section
from posttrain.report.sections.result import capabilities_of, result_section
from posttrain.report.sections.rl import rl_section
from posttrain.report.sections.rollouts import rollouts_section
from posttrain.report.sections.timeline import timeline_section
from posttrain.report.sections.tuning import base_section, dpo_section, sft_section
from posttrain.report.statements import greedy, headline

HERE = Path(__file__).parent
INTERVAL = re.compile(r"\[[\d., \u2013-]+\]")


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html and return its path. The run may be finished, running, or broken off at any point.

    Raises FileNotFoundError if `run_dir` is not a folder, OSError if the file cannot be written.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run directory")
    path = run_dir / "report.html"
    write_text(path, render(read_run(run_dir)))
    return path


def render(run: Run) -> str:
    """The whole page as text."""
    # Importing plotly takes a third of a second, for which `posttrain --help` should not wait. So it is imported here.
    from plotly.offline import get_plotlyjs

    sections = build_sections(run)
    charts = [chart for section in sections for block in section.blocks for chart in _charts(block)]
    leaves = [block for section in sections for block in section.blocks if isinstance(block, Leaf)]
    numbers = {id(chart): i for i, chart in enumerate(charts)} | {id(leaf): i for i, leaf in enumerate(leaves)}
    return _template().render(
        title=run.dir.resolve().name,
        headline=headline(run),
        facts=_facts(run),
        troubles=_troubles(run),
        sections=sections,
        number_of=lambda block: numbers[id(block)],
        plotly=Markup(get_plotlyjs()) if charts else "",
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        data=json_for_script(
            {
                "charts": [chart.spec for chart in charts],
                "leaves": [leaf.rollouts for leaf in leaves],
                "pictures": {key: url for leaf in leaves for key, url in leaf.pictures.items()},
            }
        ),
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["intervals"] = mark_intervals
    return environment.get_template("page.html.jinja")


def build_sections(run: Run) -> list[Section]:
    """The sections for which the run has data: the result first, then the stages in the order in which they ran."""
    capabilities = [name for name in capabilities_of(run) if name != "all"]
    trained = [key[7:] for s in run.of_kind("rl") for line in s.metrics for key in line if key.startswith("reward/")]
    colours = colours_of(list(dict.fromkeys([*capabilities, *trained])))
    builders: list[tuple[str, Callable[[], Section | None]]] = [
        ("Result", partial(result_section, run)),
        ("Pipeline", partial(pipeline_section, run)),
        ("Faults", partial(faults_section, run)),
    ]
    by_kind: dict[str, list[Callable[..., Section | None]]] = {
        "base": [base_section],
        "filter": [filter_section],
        "sft": [sft_section],
        "rl": [partial(rl_section, colours=colours), timeline_section, rollouts_section],
        "dpo": [dpo_section],
    }
    for stage in run.stages:
        builders.extend((stage.name, partial(build, run, stage)) for build in by_kind.get(stage.kind, []))
    builders.append(("Commands", partial(appendix_section, run)))
    built = [_guarded(name, build) for name, build in builders]
    return _distinct([section for section in built if section is not None], run)


def _guarded(name: str, build: Callable[[], Section | None]) -> Section | None:
    """Build one section. If that raises, return a section with a note instead.

    The files of a run that broke off may hold anything, and one unreadable file must not prevent the other sections.
    """
    try:
        return build()
    except Exception as error:
        text = f"This section could not be made from the files of the run: {type(error).__name__}: {error}"
        return Section(f"{name.lower()}-unreadable", name, [Text([text], tone="alert")])


def _distinct(sections: list[Section], run: Run) -> list[Section]:
    """Add the stage's name to titles that would otherwise appear twice, and make every id a valid anchor."""
    titles = [section.title for section in sections]
    named = []
    for section in sections:
        title, anchor = section.title, re.sub(r"[^\w-]+", "-", section.id)
        if titles.count(title) > 1:
            stage = next((s.name for s in run.stages if section.id in (s.name, *_ids(s.name))), section.id)
            title = f"{title} ({stage})"
        named.append(Section(anchor, title, section.blocks, section.lead))
    return named


def _ids(name: str) -> tuple[str, str]:
    return f"{name}-timeline", f"{name}-rollouts"


def _charts(block: Any) -> Iterator[Chart]:
    if isinstance(block, Chart):
        yield block
    elif isinstance(block, Grid):
        yield from block.charts


def _facts(run: Run) -> list[str]:
    """The line under the title: date, duration and peak memory of the run, and the number of held-out problems."""
    first = min((t for event in run.events if (t := number(event.get("t")))), default=None)
    facts = [utc(first)] if first else []
    facts += _wall(run)
    if (peak := number(run.summary.get("peak_rss_gib"))) is not None:
        facts.append(f"{peak:.1f} GiB of memory at the peak")
    shares = [share for results in run.evals.values() if (share := greedy(results)) and share.n]
    if shares:
        facts.append(f"evaluated on {plural(shares[-1].n, 'held-out problem')}")
    return facts


def _wall(run: Run) -> list[str]:
    """How long the run took. The summary has only the time of the last call, so a continued run adds up its stages."""
    nodes = (*run.stages, *run.evaluations)
    if any(stage.status == "skipped" for stage in nodes):
        return [f"{seconds(sum(stage.wall_s or 0.0 for stage in nodes))} of work, in several calls"]
    wall = number(run.summary.get("wall_s"))
    return [f"{seconds(wall)} in all"] if wall and run.summary.get("status") in ("done", "failed") else []


def _troubles(run: Run) -> list[str]:
    """One sentence for each stage that failed or was interrupted."""
    sentences = []
    for stage in (*run.stages, *run.evaluations):
        if stage.status in ("failed", "interrupted"):
            verb = "failed" if stage.status == "failed" else "did not finish"
            sentences.append(f"Stage {stage.name} {verb}{': ' + stage.error if stage.error else '.'}")
    return sentences


def mark_intervals(text: str) -> Markup:
    """The text, escaped, with its [low, high] intervals in a fainter style."""
    safe = str(escape(text))
    return Markup(INTERVAL.sub(lambda found: f'<span class="interval">{found.group()}</span>', safe))


def json_for_script(value: object) -> Markup:
    """JSON that is safe inside a script element: it contains no text that can end the element or begin another."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _finite(value: object) -> Any:
    """The same value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and number(value) is None:
        return None
    return value
