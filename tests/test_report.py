"""The report: its sentences and charts, that it is one safe page, and that a broken run only makes it shorter."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_sample import ACCURACY, CAPABILITIES, FAULTS, HOSTILE, RL_CONFIG, STEPS, results, write_lines, write_sample
from vision_models import draw

import posttrain
from posttrain.data.images.section import STORE
from posttrain.data.images.store import ImageStore
from posttrain.report import write_report
from posttrain.report.blocks import Chart, Grid, Table
from posttrain.report.busy import intersection, length, measure_overlap, union
from posttrain.report.charts import Values, shortened, text_width
from posttrain.report.read import Run, Stage, read_run
from posttrain.report.sections.flow import DROPPED, FATES
from posttrain.report.sections.result import result_section
from posttrain.report.sections.rollouts import SAMPLE, sample_rollouts
from posttrain.report.series import Series
from posttrain.report.statements import Change, Share, changes, gain_sentences, headline, modality_sentences
from posttrain.report.write import build_sections
from posttrain.rl.loop.tally import REASONS

PREFIXES = ("reward/", "staleness/", "idle/", DROPPED)  # of metrics whose names end with a capability, an age, ...
RL_SECTIONS = ["rl", "rl-timeline", "rl-rollouts"]
ALL_SECTIONS = ["result", "pipeline", "faults", "base", "filter", "sft", *RL_SECTIONS, "dpo", "again"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def whole(sample: Path) -> "Page":
    """The page of the run as it is."""
    return page_of(sample)


@pytest.fixture
def copy(sample: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample, tmp_path / sample.name))


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text outside scripts, and each script's text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def sections(self) -> list[str]:
        return [attributes["id"] or "" for tag, attributes in self.elements if tag == "section"]

    def data(self) -> dict:
        """What the page's own script draws from."""
        return json.loads(self.scripts[0])


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- one self-contained page


def test_the_page_contains_everything_that_it_needs(sample: Path) -> None:
    path = write_report(sample)
    assert path == sample / "report.html"
    assert path.stat().st_size < 6 << 20
    assert [p.name for p in sample.iterdir() if p.name.startswith(".")] == []
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.sections() == ALL_SECTIONS
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy or "")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert len(page.scripts) == 3  # data, plotly, the page's own


def test_links_of_the_page_lead_somewhere(whole: Page) -> None:
    targets = {attributes["href"] for tag, attributes in whole.elements if tag == "a"}
    assert targets == {f"#{name}" for name in ALL_SECTIONS}


def test_every_chart_is_one_that_plotly_accepts(whole: Page) -> None:
    from plotly.graph_objects import Figure

    charts = whole.data()["charts"]
    placed = sorted(int(a["data-chart"] or -1) for _, a in whole.elements if "data-chart" in a)
    assert placed == list(range(len(charts)))
    assert len(charts) > 20
    tokens = set(re.findall(r'"(--[a-z0-9]+)(?:@[\d.]+)?"', json.dumps(charts)))
    style = (Path(__file__).parents[1] / "posttrain/report/page.css").read_text()
    for token in tokens:  # a light and a dark value each, of six digits: the script reads them so
        assert len(re.findall(rf"{token}: #[0-9a-f]{{6}};", style)) == 2, token
    for spec in json.loads(re.sub(r'"--[a-z0-9]+(@[\d.]+)?"', '"#123456"', json.dumps(charts))):
        Figure(spec)


def test_text_of_models_stays_text(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    summary["eval"]["rl"][HOSTILE] = summary["eval"]["rl"]["sum"]
    summary["stages"][1] |= {"status": "failed", "error": HOSTILE}
    summary["command"] = f"posttrain run '{HOSTILE}'"
    (copy / "summary.json").write_text(json.dumps(summary))
    (copy / "sft" / "config.yaml").write_text(HOSTILE)
    hostile = copy.with_name("x<script>alert(1)<")
    copy.rename(hostile)
    text = write_report(hostile).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 3
    assert "<script>window" not in text
    assert "<img" not in text.replace(page.scripts[1], "")
    assert HOSTILE in page.text
    replies = [said(leaf) for leaf in page.data()["leaves"][0]]
    assert f"Answer: {HOSTILE}" in replies  # shown whole, by a script that only sets text
    assert "innerHTML" not in page.scripts[2]
    assert "insertAdjacentHTML" not in page.scripts[2]
    # Plotly reads a little HTML in titles, labels and hover texts.
    assert "<img" not in json.dumps(page.data()["charts"])


# ---------------------------------------------------------------- what it says


def test_full_run_says_what_was_measured(whole: Page) -> None:
    assert "RL raised held-out accuracy from 48.2% [44.3, 52.0] to 75.2% [71.8, 78.4]." in whole.text
    assert "The share of replies that show their work rose 31.1%" in whole.text
    assert "SFT: no measurable change in held-out accuracy" in whole.text
    assert "DPO: no measurable change in held-out accuracy" in whole.text
    assert "posttrain run quickstart --run-dir runs/quickstart" in whole.text
    assert "2.13.0+cpu" in whole.text
    assert "prompts selected, 8 replies each. Shaded: the band from 0.1 to 0.7." in whole.text
    for capability in CAPABILITIES:
        assert capability in whole.text
    assert "could not be made" not in whole.text


def charts_of(run_dir: Path, name: str) -> dict[str, Chart]:
    """The charts of a section, by title."""
    section = next(section for section in build_sections(read_run(run_dir)) if section.id == name)
    return {chart.title: chart for block in section.blocks if isinstance(block, Grid) for chart in block.charts}


def drawn(chart: Chart) -> dict[str, list]:
    """What a chart draws, by the name of the trace."""
    return {trace["name"]: trace["y"] for trace in chart.spec["data"]}


def test_rl_shows_what_its_metrics_hold(sample: Path) -> None:
    lines = [json.loads(line) for line in (sample / "rl" / "metrics.jsonl").open()]
    charts = charts_of(sample, "rl")
    shown = json.dumps([chart.spec for chart in charts.values()])
    left_out = {
        *("step", "t", "policy_version", "learning_rate", "loss", "step_wall_s", "skipped"),
        *("tokens_trained", "tokens_generated", "tokens_dropped", "rollouts_unscored", "groups_generated"),
        "episodes",  # in the figures above the charts
        *("groups_dropped_zero_advantage", "groups_dropped_truncated"),  # told apart by cause; none
    }
    for name in {name for line in lines for name in line} - left_out:
        column = [line.get(name) for line in lines]
        traces = [trace["y"] for chart in charts.values() for trace in chart.spec["data"]]
        if name in ("pass_rate", "reward_mean") or name.startswith("reward/"):
            continue  # smoothed: by name
        rounded = [None if v is None or (name == "grad_norm" and v < 0) else float(f"{v:.5g}") for v in column]
        assert rounded in traces, name
    for words in ("pass rate, all replies", "mean reward, trained groups", *CAPABILITIES):
        assert f'"name": "{words}"' in shown


def test_the_loss_on_held_out_rows_is_drawn_over_that_of_training_rows(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "sft" / "metrics.jsonl").open()]
    assert all("held_out_loss" not in line for line in lines)
    before = charts_of(copy, "sft")["Loss on assistant tokens"]
    measured = {lines[1]["step"]: 1.75, lines[4]["step"]: 1.5}
    end = {"held_out_loss_first": 1.75, "held_out_loss_last": 1.5, "held_out_loss_best": 1.25, "result_step": 3}
    lines = [{**line, "held_out_loss": measured[line["step"]]} if line["step"] in measured else line for line in lines]
    write_lines(copy / "sft" / "metrics.jsonl", [*lines, {"step": lines[-1]["step"], **end}])
    chart = charts_of(copy, "sft")["Loss on assistant tokens"]
    assert [key.name for key in chart.keys][-1] == "held-out rows"
    *traces, apart = chart.spec["data"]
    assert traces == before.spec["data"]
    assert dict(zip(apart["x"], apart["y"], strict=True)) == measured
    assert "1.75 → 1.5" in page_of(copy).text
    assert "the result is step 3, with 1.25" in page_of(copy).text


def test_groups_are_drawn_by_what_became_of_them(sample: Path) -> None:
    fates = drawn(charts_of(sample, "rl")["What became of the groups"])
    assert list(fates) == [
        *("trained", "dropped: too easy", "dropped: too hard", "dropped: unscored", "dropped: stale", "dropped: lost")
    ]
    lines = [json.loads(line) for line in (sample / "rl" / "metrics.jsonl").open()]
    assert [sum(step) for step in zip(*fates.values(), strict=True)] == [
        sum(value for name, value in line.items() if re.match("groups_(trained|dropped_)", name)) for line in lines
    ]


def test_without_known_causes_groups_of_zero_advantage_are_one_series(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "rl" / "metrics.jsonl").open()]
    causes = ("groups_too_easy", "groups_too_hard")
    write_lines(copy / "rl" / "metrics.jsonl", [{k: v for k, v in line.items() if k not in causes} for line in lines])
    fates = drawn(charts_of(copy, "rl")["What became of the groups"])
    assert "dropped: zero advantage" in fates
    assert not any("too" in name for name in fates)


@pytest.mark.parametrize(
    ("limit", "share", "alarms"), [(0.2, 0.19, False), (0.2, 0.21, True), (0.4, 0.39, False), (0.05, 0.06, True)]
)
def test_many_unscored_replies_are_shown_as_an_alarm(copy: Path, limit: float, share: float, alarms: bool) -> None:
    (copy / "rl" / "config.yaml").write_text(f"reward: {{alarm_fraction: {limit}}}\n")
    lines = [json.loads(line) for line in (copy / "rl" / "metrics.jsonl").open()]
    for line in lines:
        line |= {"unscored_fraction": share if line["step"] == 3 else 0.0, "skipped": 0}
    write_lines(copy / "rl" / "metrics.jsonl", lines)
    page = page_of(copy)
    assert any(attributes.get("class") == "bad" for tag, attributes in page.elements if tag == "dd") == alarms
    above = drawn(charts_of(copy, "rl")["Unscored replies"])[f"above {limit:.0%}"]
    assert [value for value in above if value is not None] == ([share] if alarms else [])


@pytest.mark.parametrize("text", ["", "reward: [", "reward: {alarm_fraction: often}"])
def test_without_a_readable_config_nothing_is_called_right_or_an_alarm(copy: Path, text: str) -> None:
    (copy / "rl" / "config.yaml").write_text(text)
    traces = drawn(charts_of(copy, "rl")["Unscored replies"])
    assert not any(name.startswith("above") for name in traces)
    leaves = [leaf for leaves in page_of(copy).data()["leaves"] for leaf in leaves]
    assert {leaf["right"] for leaf in leaves} == {None}


def test_drops_by_length_and_pass_rate_are_not_counted_as_more_drops(copy: Path) -> None:
    before = drawn(charts_of(copy, "rl")["What became of the groups"])
    lines = [json.loads(line) for line in (copy / "rl" / "metrics.jsonl").open()]
    views = {"groups_dropped_length/32": 7, "groups_dropped_pass_rate/0.25": 7}
    write_lines(copy / "rl" / "metrics.jsonl", [{**line, **views} for line in lines])
    assert drawn(charts_of(copy, "rl")["What became of the groups"]) == before


def test_every_metric_that_the_report_reads_is_written_by_a_stage(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, in the source of the stages. A reason for a drop must be one that the tally counts."""
    read: set[str] = {name for name, _, _ in FATES}
    get, named = Series.get, Series.named

    def note_get(self: Series, *names: str) -> Values:
        read.update(names)
        return get(self, *names)

    def note_named(self: Series, prefix: str) -> list[str]:
        read.add(prefix)
        return named(self, prefix)

    monkeypatch.setattr(Series, "get", note_get)
    monkeypatch.setattr(Series, "named", note_named)
    build_sections(read_run(sample))
    package = Path(posttrain.__file__).parent
    parts = [package / part for part in ("base", "filtering", "sft", "dpo", "tune", "rl", "train")]
    source = "".join(file.read_text() for part in parts for file in part.rglob("*.py"))
    assert {"reward_mean", "loss", "staleness/", "idle/", DROPPED} <= read
    drops = {name.removeprefix(DROPPED) for name, _, _ in FATES if name.startswith(DROPPED)}
    assert drops <= set(REASONS)
    for name in read:
        if not any(name != prefix and name.startswith(prefix) for prefix in PREFIXES):
            assert (f'f"{name}{{' if name in PREFIXES else f'"{name}"') in source, name


def test_faults_and_recoveries_are_listed(copy: Path) -> None:
    events = [json.loads(line) for line in (copy / "events.jsonl").open()]
    bad = {"t": events[0]["t"], "stage": "sft", "event": "tracker_failed", "tracker": "wandb", "error": HOSTILE}
    write_lines(copy / "events.jsonl", [bad, *events])
    section = next(section for section in build_sections(read_run(copy)) if section.id == "faults")
    assert list(section.lead) == [
        "5 events: tracker turned off 1, engine replaced 1, reward processes restarted 1, alarm 1, rolled back 1."
    ]
    assert [row[1:] for row in section.blocks[0].rows] == [
        ("sft", "tracker turned off", f"wandb: {HOSTILE}"),
        ("rl", "engine replaced", "engine-0: its process ended"),
        ("rl", "reward processes restarted", "no answer for 60 s"),
        ("rl", "alarm", "unscored: unscored_fraction 0.25, step 20"),
        ("rl", "rolled back", "steps 2"),
    ]
    assert HOSTILE in page_of(copy).text


def test_of_very_many_faults_the_last_are_listed(copy: Path) -> None:
    alarms = [{"t": 1e9 + i, "stage": "rl", "event": "alarm", "reason": f"r{i}"} for i in range(150)]
    write_lines(copy / "events.jsonl", alarms)
    section = next(section for section in build_sections(read_run(copy)) if section.id == "faults")
    assert list(section.lead) == ["150 events: alarm 150. The last 100 are shown."]
    assert [row[3] for row in section.blocks[0].rows] == [f"r{i}" for i in range(50, 150)]


def test_a_run_without_faults_has_no_table_of_them(copy: Path) -> None:
    events = [json.loads(line) for line in (copy / "events.jsonl").open()]
    names = [fault["event"] for fault in FAULTS]
    write_lines(copy / "events.jsonl", [event for event in events if event["event"] not in names])
    assert page_of(copy).sections() == [name for name in ALL_SECTIONS if name != "faults"]


def share(value: float, low: float, high: float) -> Share:
    return Share(value, low, high, 100)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (share(0.5, 0.45, 0.55), share(0.7, 0.65, 0.75), "raised"),
        (share(0.7, 0.65, 0.75), share(0.5, 0.45, 0.55), "lowered"),
        (share(0.5, 0.45, 0.55), share(0.59, 0.54, 0.64), "none"),
        (share(0.5, 0.45, 0.55), share(0.6, 0.55, 0.65), "none"),  # they touch
        (share(0.5, 0.5, 0.5), share(0.5, 0.5, 0.5), "none"),
    ],
)
def test_a_change_is_claimed_only_when_the_intervals_are_apart(before: Share, after: Share, verdict: str) -> None:
    assert Change(before, after).verdict == verdict


def run_with(evals: dict[str, dict], kinds: dict[str, str] | None = None, models: dict[str, str] | None = None) -> Run:
    """A run of stages, each of which starts from the model of the one before it, or from what `models` says."""
    names = [*(models or {}), *(name for name in evals if name not in (models or {}))]
    starts = models if models is not None else dict(zip(names[1:], names, strict=False))
    stages = tuple(
        Stage(name, (kinds or {}).get(name, name), "done", Path("/nowhere") / name, model=starts.get(name, ""))
        for name in names
    )
    return Run(Path("/nowhere"), {}, stages, (), (), evals)


def pairs_of(run: Run) -> list[tuple[str, str]]:
    return [pair[:2] for pair in changes(run)]


def test_siblings_are_never_compared() -> None:
    """Two branches of one model: only the model that they started from is a before."""
    evals = {"mild": results(0.35), "strong": results(0.3)}
    kinds = {"mild": "sft", "strong": "sft"}
    run = run_with(evals, kinds, {"mild": "/models/policy", "strong": "/models/policy"})
    assert pairs_of(run) == []
    assert headline(run).startswith("Held-out accuracy: mild 34.9% [")
    assert lines_of(run) == []
    run = run_with({"start": results(0.6), **evals}, kinds, {"start": "", "mild": "start", "strong": "start"})
    assert pairs_of(run) == [("start", "mild"), ("start", "strong")]
    assert headline(run).startswith("Held-out accuracy: start 60.0% [")  # neither branch is the run's result
    assert lines_of(run) == [(0, 1), (0, 2)]


def test_without_an_evaluation_of_the_start_there_is_no_claim_but_a_line() -> None:
    run = run_with({"base": results(0.3), "rl": results(0.8)}, None, {"base": "", "sft": "base", "rl": "sft"})
    assert pairs_of(run) == []
    assert headline(run).startswith("Held-out accuracy: base 30.0% [")
    assert lines_of(run) == [(0, 1)]  # rl descends from base


def lines_of(run: Run) -> list[tuple[int, int]]:
    """(from, to) of the lines of the chart over all capabilities, as places of the evaluations."""
    section = result_section(run)
    assert section is not None
    grid = next(block for block in section.blocks if isinstance(block, Grid))
    trace = next(trace for trace in grid.charts[0].spec["data"] if trace["mode"] == "lines")
    return list(zip(trace["x"][::3], trace["x"][1::3], strict=True))


def own_eval(name: str, model: str, data: str) -> Stage:
    """An evaluation stage of the user's own."""
    return Stage(name, "eval", "done", Path("/nowhere") / name, model=model, config={"data": {"path": data}})


def test_own_evaluations_follow_the_rule_of_all_others() -> None:
    stages = (
        Stage("sft", "sft", "done", Path("/nowhere/sft"), model="/models/policy"),
        own_eval("hard_start", "/models/policy", "hard.jsonl"),
        own_eval("hard_sft", "sft", "hard.jsonl"),
        own_eval("easy_sft", "sft", "easy.jsonl"),
    )
    evals = {"hard_start": results(0.2), "hard_sft": results(0.6), "easy_sft": results(0.9)}
    run = Run(Path("/nowhere"), {}, stages, (), (), evals)
    assert pairs_of(run) == [("hard_start", "hard_sft")]
    assert headline(run).startswith("SFT (by hard_sft) raised held-out accuracy from 20.0% [")
    assert lines_of(run) == [(0, 1)]


@pytest.mark.parametrize("how", ["by reference", "by path", "by path in a moved run"])
def test_the_model_a_stage_started_from_is_read_from_the_run(tmp_path: Path, how: str) -> None:
    made = tmp_path / "run"
    for name in ("first", "second"):
        (made / name).mkdir(parents=True)
    named = "${first.model}" if how != "by path" else str(made / "first" / "model")
    config = {"name": "second", "kind": "sft", "config": {"model": {"path": named}}}
    (made / "pipeline.yaml").write_text(json.dumps({"name": "p", "stages": [{"name": "first", "kind": "sft"}, config]}))
    (made / "second" / "config.yaml").write_text(json.dumps({"model": {"path": str(made / "first" / "model")}}))
    (made / "first" / "config.yaml").write_text(json.dumps({"model": {"path": "models/policy"}}))
    if how == "by path in a moved run":
        made = made.rename(tmp_path / "moved")
    models = {stage.name: stage.model for stage in read_run(made).stages}
    assert models == {"first": str(Path("models/policy").resolve()), "second": "first"}


def test_headline_makes_no_claim_when_intervals_overlap() -> None:
    run = run_with({"sft": results(0.48), "rl": results(0.52)})
    assert headline(run).startswith("RL: no measurable change in held-out accuracy, 48.0% [")
    assert gain_sentences(run) == []


def test_the_change_is_told_by_modality() -> None:
    shares = {"text": (0.5, 0.52), "image": (0.4, 0.8), "multi-image": (0.9, 0.5)}
    evals = {
        stage: results(0.5) | {f"modality: {name}": results(pair[at])["all"] for name, pair in shares.items()}
        for at, stage in enumerate(("sft", "rl"))
    }
    told = modality_sentences(run_with(evals))
    assert [sentence.partition("%")[0] for sentence in told] == [
        "On prompts of text, accuracy did not measurably change: 50.0",
        "On prompts with one picture, accuracy rose 40.0",
        "On prompts with several pictures, accuracy fell 90.0",
    ]
    assert modality_sentences(run_with({"sft": results(0.4), "rl": results(0.8)})) == []


def test_the_headline_reports_a_loss_of_accuracy() -> None:
    assert headline(run_with({"sft": results(0.7), "rl": results(0.5)})).startswith(
        "RL lowered held-out accuracy from 70"
    )


def test_headline_is_about_rl_else_from_first_to_last() -> None:
    assert headline(run_with({n: results(ACCURACY[n]) for n in ACCURACY})).startswith("RL raised")
    run = run_with({"base": results(0.3), "sft": results(0.4), "dpo": results(0.6)})
    assert headline(run).startswith("From base to DPO, held-out accuracy rose from 30.0%")
    assert headline(run_with({"base": results(0.3), "sft": results(0.4)})).startswith("SFT raised held-out accuracy")


def test_headline_names_a_stage_where_there_are_two_of_a_kind() -> None:
    evals = {"sft": results(0.4), "first": results(0.6), "second": results(0.8)}
    run = run_with(evals, {"first": "rl", "second": "rl"})
    assert headline(run).startswith("First raised held-out accuracy from 40.0%")
    assert pairs_of(run) == [("sft", "first"), ("first", "second")]


def test_the_headline_without_a_comparison_is_the_accuracy_or_that_there_is_none() -> None:
    assert headline(run_with({"sft": results(0.48)})).startswith("Held-out accuracy is 48.0% [")
    assert headline(run_with({})) == "This run has no held-out evaluation."
    assert headline(run_with({"rl": {"all": {"n": 5, "greedy": None}}})) == "This run has no held-out evaluation."


def test_results_on_other_problems_are_not_compared() -> None:
    assert changes(run_with({"sft": results(0.4, n=130), "rl": results(0.8, n=100)})) == []
    evals = {"easy": results(0.9), "hard": results(0.2)}
    run = run_with(evals, {"easy": "eval", "hard": "eval"})
    assert changes(run) == []
    assert headline(run).startswith("Held-out accuracy: easy 90.0% [")


def test_gain_is_split_into_two_parts_that_add_up() -> None:
    # 0.2 * 0.9 + 0.8 * 0.3 = 0.42 and 0.8 * 0.9 + 0.2 * 0.3 = 0.78: all of it is more replies that show work.
    run = run_with({"sft": results(0.42, (0.2, 0.9, 0.3), n=1000), "rl": results(0.78, (0.8, 0.9, 0.3), n=1000)})
    first, second = gain_sentences(run)
    assert "rose 20.0%" in first
    assert "among replies that show their work, now on more of the problems, 90.0%" in first
    assert first.endswith(", no measurable change.")
    assert second.startswith(
        "Of the +36.0 points, +36.0 come from a changed share of replies that show their work, and +0.0"
    )


def test_gain_is_not_split_where_a_part_was_never_seen() -> None:
    evals = {"sft": results(0.42, (0.2, 0.9, 0.3), n=1000), "rl": results(0.78, (1.0, 0.78, 0.3), n=1000)}
    sentences = gain_sentences(run_with(evals))
    assert len(sentences) == 1
    assert "rose 20.0%" in sentences[0]


# ---------------------------------------------------------------- overlap


def busy(what: str, *spans: tuple[float, float]) -> list[dict]:
    return [{"actor": what, "what": what, "start": start, "end": end} for start, end in spans]


def test_overlap_of_known_times() -> None:
    events = busy("train", (10, 14), (16, 20)) + busy("generate", (0, 12), (11, 13), (18, 30))
    overlap = measure_overlap(events)
    assert overlap is not None
    assert (overlap.window_s, overlap.gen_s, overlap.train_s, overlap.both_s) == (10, 5, 8, 5)
    assert overlap.share == 0.5
    assert overlap.best == pytest.approx(5 / 8)
    assert overlap.goal == pytest.approx(0.5)


def test_no_overlap_without_both_kinds_of_work() -> None:
    assert measure_overlap(busy("train", (0, 1))) is None
    assert measure_overlap(busy("generate", (0, 1))) is None


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda s: (float(s[0]), float(s[0] + s[1]))))


@given(spans, spans)
def test_interval_arithmetic_agrees_with_counting_seconds(left: list, right: list) -> None:
    def seconds(intervals: list) -> set[int]:
        return {second for start, end in intervals for second in range(int(start), int(end))}

    assert length(union(left)) == len(seconds(left))
    assert length(intersection(union(left), union(right))) == len(seconds(left) & seconds(right))


# ---------------------------------------------------------------- rollouts


def test_rollouts_of_every_kind_are_sampled(sample: Path) -> None:
    total, rows, unreadable = sample_rollouts(sample / "rl" / "rollouts", SAMPLE, 0.5)
    assert (total, len(rows), unreadable) == (16 * STEPS, SAMPLE, 0)
    assert {row["capability"] for row in rows} == set(CAPABILITIES)
    assert {row["status"] for row in rows} == {"trained", "dropped:zero_advantage", "dropped:unscored"}
    assert {row["reward"] for row in rows} == {0.0, 1.0, None}
    assert any(len(json.loads(row["versions"])) == 2 for row in rows)
    versions = [row["policy_version"] for row in rows]
    assert versions == sorted(versions)
    assert versions[0] <= 2
    assert versions[-1] >= STEPS - 3
    assert len({(row["group_id"], row["index"]) for row in rows}) == SAMPLE


def test_fewer_rollouts_than_asked_for_are_all_shown(sample: Path) -> None:
    total, rows, _ = sample_rollouts(sample / "rl" / "rollouts", 10_000, 0.5)
    assert len(rows) == total


def said(leaf: dict) -> str:
    return "".join(piece["text"] for turn in leaf["turns"] for piece in turn["pieces"])


def leaf_of(run_dir: Path, **columns: object) -> dict:
    """The leaf of a run whose only rollout has these columns."""
    folder = run_dir / "rl" / "rollouts"
    folder.mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist([columns]), folder / "step_000000.parquet")
    (run_dir / "rl" / "config.yaml").write_text(RL_CONFIG)
    return page_of(run_dir).data()["leaves"][0][0]


def test_tokens_are_told_apart_by_policy_version(tmp_path: Path) -> None:
    leaf = leaf_of(
        tmp_path, reply="a b c", versions="[[3, 0, 2], [4, 2, 5]]", tokens='["a", " ", "b", " ", "c"]', reward=1.0
    )
    assert leaf["turns"][0]["pieces"] == [{"v": 3, "text": "a ", "n": 2}, {"v": 4, "text": "b c", "n": 3}]
    assert leaf["right"] is True


def test_without_token_texts_a_reply_is_not_cut_by_guess(tmp_path: Path) -> None:
    leaf = leaf_of(tmp_path, reply="a b c", versions="[[3, 0, 2], [4, 2, 5]]", prompt="plain text", reward=None)
    assert [(piece["v"], piece["text"]) for piece in leaf["turns"][0]["pieces"]] == [(None, "a b c"), (3, ""), (4, "")]
    assert leaf["right"] is None
    assert leaf["prompt"] == [{"role": "user", "content": "plain text"}]


def test_turns_of_tools_are_shown_in_a_prompt(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    leaf = leaf_of(tmp_path, reply="2", prompt=json.dumps(prompt))
    shown = [(turn["role"], turn["content"]) for turn in leaf["prompt"]]
    assert shown == [("user", "1 + 1?"), ("assistant", 'add({"a": 1})'), ("tool", "2")]


def test_pictures_of_prompts_are_shown_once_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the stage's file lacks, and one for which the page has no room, keep their number."""
    folder = tmp_path / "rl"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(RL_CONFIG)
    store = ImageStore(folder / STORE)
    keys = [store.add((tmp_path / draw(tmp_path / f"{n}.png", n, (900, 300))).read_bytes()).key for n in range(2)]
    prompts = [
        json.dumps([{"role": "user", "content": [
            {"type": "image", "image": first}, {"type": "text", "text": " or "}, {"type": "image", "image": second},
        ]}]) for first, second in ((keys[0], "0" * 32), (keys[0], keys[1]))
    ]  # fmt: skip
    rows = [{"reply": "a", "reward": 1.0, "prompt": prompt, "versions": "[]"} for prompt in prompts]
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "rollouts/step_000000.parquet")

    def shown() -> tuple[list[list[str | None]], dict[str, str]]:
        found = page_of(tmp_path).data()
        (leaves,) = found["leaves"]
        assert {leaf["prompt"][0]["content"] for leaf in leaves} == {"[picture 1] or [picture 2]"}
        return [leaf["prompt"][0]["pictures"] for leaf in leaves], found["pictures"]

    own, images = shown()
    assert own == [[keys[0], None], keys]
    assert set(images) == set(keys)
    for url in images.values():
        with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/webp;base64,")))) as image:
            assert image.size == (384, 128)
    monkeypatch.setattr("posttrain.report.pictures.MAX_CHARS", len(images[keys[0]]))
    assert shown() == ([[keys[0], None], [keys[0], None]], {keys[0]: images[keys[0]]})


def test_marks_of_byte_level_tokens_are_read(tmp_path: Path) -> None:
    leaf = leaf_of(tmp_path, reply="a b\nc", versions="[[0, 0, 2], [1, 2, 4]]", tokens='["a", "Ġb", "Ċ", "c"]')
    assert said(leaf) == "a b\nc"


def test_an_episode_is_shown_as_a_conversation(tmp_path: Path) -> None:
    """By hand: a call that two versions sampled, its result, a turn at another temperature, a new branch, a turn."""
    leaf = leaf_of(
        tmp_path,
        reply="e",
        tokens='["a", "b", "=4", "c", "d", "e"]',
        segments="[[0,2,true],[2,3,false],[3,4,false],[4,5,false,7],[5,6,true]]",
        versions="[[3,0,1],[4,1,2],[4,3,4],[5,5,6]]",
        parts='{"turn 1": 0.25, "turn 3": 1.0, "turns": 3}',
        status="trained",
        advantage=0.5,
        turn_advantages=[0.5, 0.25, 0.125],
    )
    shown = [
        (turn["number"], [(piece["v"], piece["text"]) for piece in turn["pieces"]], turn["trained"], turn["reward"])
        for turn in leaf["turns"]
    ]
    assert shown == [
        (1, [(3, "a"), (4, "b")], True, 0.25),
        (None, [(None, "=4")], False, None),
        (2, [(4, "c")], False, None),
        (None, [(None, "d")], False, None),
        (3, [(5, "e")], True, 1.0),
    ]
    assert [turn["keeps"] for turn in leaf["turns"]] == [None, None, None, 7, None]
    assert [turn["advantage"] for turn in leaf["turns"]] == [0.5, None, 0.25, None, 0.125]
    assert leaf["hidden"] == 0


def test_a_long_episode_is_cut_and_one_that_was_dropped_was_not_trained_on(tmp_path: Path) -> None:
    segments = [[place, place + 1, place % 2 == 0] for place in range(100)]
    versions = [[0, place, place + 1] for place in range(0, 100, 2)]
    leaf = leaf_of(
        tmp_path,
        tokens=json.dumps(["x" * 1000] * 100),
        segments=json.dumps(segments),
        versions=json.dumps(versions),
        status="dropped:stale",
        advantage=0.5,
    )
    assert (len(leaf["turns"]), leaf["hidden"]) == (60, 40)
    assert not any(turn["trained"] for turn in leaf["turns"])
    assert max(len(piece["text"]) for turn in leaf["turns"] for piece in turn["pieces"]) < 500


# ---------------------------------------------------------------- broken and partial runs


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("summary.json", []),  # the stages are known from events and folders, but nothing was evaluated
        ("events.jsonl", ["faults", "rl-timeline"]),
        ("filter/kept.jsonl", []),
        ("filter", ["filter"]),
        ("base/metrics.jsonl", ["base"]),
        ("sft/metrics.jsonl", []),
        ("rl/metrics.jsonl", []),
        ("rl/difficulty.parquet", []),
        ("rl/rollouts", ["rl-rollouts"]),
        ("rl", ["rl", "rl-rollouts"]),
        ("dpo", []),
        ("pipeline.yaml", []),
    ],
)
def test_what_is_missing_makes_the_report_smaller(copy: Path, whole: Page, missing: str, gone: list[str]) -> None:
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(copy)
    expected = [name for name in ALL_SECTIONS if name not in gone and (missing != "summary.json" or name != "result")]
    assert page.sections() == expected
    assert "could not be made" not in page.text
    assert len(page.text) < len(whole.text)


@pytest.mark.parametrize(
    "name",
    [
        "summary.json",
        "events.jsonl",
        "filter/kept.jsonl",
        "sft/config.yaml",
        "rl/metrics.jsonl",
        "rl/difficulty.parquet",
        "rl/rollouts/step_000003.parquet",
        "dpo/pairs.jsonl",
    ],
)
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"[1, 2]\n", b'{"step": "x", "t": null, "stage": 3}\n{"cut'])
def test_an_unreadable_file_costs_only_its_own_section(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    page = page_of(copy)
    assert {"pipeline", "dpo", "again"} <= set(page.sections())


def test_values_of_the_wrong_type_do_not_reach_a_chart(copy: Path) -> None:
    lines = [
        {"step": i, "t": 1.0 + i, "reward_mean": value} for i, value in enumerate([0.1, "x", None, True, [1], 0.4])
    ]
    write_lines(copy / "rl" / "metrics.jsonl", lines)
    text = (copy / "rl" / "metrics.jsonl").read_text() + '{"step": 6, "reward_mean": NaN, "ess": Infinity}\n'
    (copy / "rl" / "metrics.jsonl").write_text(text)
    page = page_of(copy)
    assert "could not be made" not in page.text
    assert "NaN" not in page.scripts[0]


def test_a_failed_run_says_where_and_why(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    summary["status"] = "failed"
    summary["stages"] = [s for s in summary["stages"] if s["name"] in ("base", "filter", "sft")]
    summary["stages"][2] |= {"status": "failed", "error": "no optimizer step was made"}
    summary["eval"] = {"base": summary["eval"]["base"]}
    summary["evaluations"] = summary["evaluations"][:1]
    (copy / "summary.json").write_text(json.dumps(summary))
    for name in ("rl", "dpo"):
        shutil.rmtree(copy / name)
    events = [e for e in map(json.loads, (copy / "events.jsonl").open()) if str(e["stage"])[:2] not in ("rl", "dp")]
    write_lines(copy / "events.jsonl", events)
    page = page_of(copy)
    assert "Stage sft failed: no optimizer step was made" in page.text
    assert "Held-out accuracy is 46.6% [" in page.text
    assert page.sections() == ["result", "pipeline", "base", "filter", "sft", "again"]


def test_a_stage_that_was_killed_is_known_from_its_events(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    summary["stages"] = summary["stages"][:3]
    (copy / "summary.json").write_text(json.dumps(summary))
    (copy / "rl" / "DONE").unlink()
    shutil.rmtree(copy / "dpo")
    events = [e for e in map(json.loads, (copy / "events.jsonl").open()) if str(e["stage"])[:3] != "dpo"]
    write_lines(copy / "events.jsonl", [e for e in events if (e["stage"], e["event"]) != ("rl", "stage_done")])
    page = page_of(copy)
    assert "Stage rl did not finish." in page.text
    assert "rl-timeline" in page.sections()


def test_a_run_continued_days_later_is_laid_end_to_end(copy: Path) -> None:
    events = [json.loads(line) for line in (copy / "events.jsonl").open()]
    for event in events:
        if str(event["stage"])[:2] in ("rl", "dp"):
            event["t"] += 3 * 86400
            if "start" in event:
                event |= {"start": event["start"] + 3 * 86400, "end": event["end"] + 3 * 86400}
    write_lines(copy / "events.jsonl", events)
    page = page_of(copy)
    titles = [c["layout"]["xaxis"].get("title", {}).get("text", "") for c in page.data()["charts"]]
    assert "seconds of work, without the pauses of the run" in titles
    assert "meets" in page.text or "misses" in page.text


def test_an_empty_folder_has_a_report_too(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "This run has no held-out evaluation." in page.text
    assert page.sections() == []
    assert len(page.scripts) == 2  # without plotly


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        write_report(tmp_path / "nothing")


def test_two_stages_of_a_kind_have_titles_and_anchors_of_their_own(copy: Path) -> None:
    shutil.copytree(copy / "sft", copy / "sft 2")
    summary = json.loads((copy / "summary.json").read_text())
    summary["stages"].append({"name": "sft 2", "kind": "sft", "status": "done", "wall_s": 1.0})
    (copy / "summary.json").write_text(json.dumps(summary))
    titles = {section.id: section.title for section in build_sections(read_run(copy))}
    assert titles["sft"] == "Light SFT (sft)"
    assert titles["sft-2"] == "Light SFT (sft 2)"


def test_results_are_found_in_the_folders_without_a_summary(copy: Path) -> None:
    (copy / "summary.json").unlink()
    for name, accuracy in ACCURACY.items():
        (copy / name / "eval").mkdir()
        (copy / name / "eval" / "results.json").write_text(json.dumps(results(accuracy)))
    assert "RL raised held-out accuracy from 48.2%" in page_of(copy).text


# ---------------------------------------------------------------- what fits on the page

WIDTHS = {1200: 874, 800: 744}  # of a window, and of the page's text column in it (page.css), in pixels


def long_names(run_dir: Path) -> None:
    """Give the stages of a run names that are far too long, and times that take the most room."""
    names = {name: f"{name}_with_a_very_long_name_that_says_everything_about_it" for name in ACCURACY}
    summary = json.loads((run_dir / "summary.json").read_text())
    for record in summary["stages"] + summary["evaluations"]:
        stage, dot, rest = record["name"].partition(".")
        record |= {"name": f"{names.get(stage, stage)}{dot}{rest}", "wall_s": 4_321_000.0, "kind": "sft"}
    summary["eval"] = {names[name]: cells for name, cells in summary["eval"].items()}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    events = [json.loads(line) for line in (run_dir / "events.jsonl").open()]
    for event in events:
        event["stage"] = names.get(event["stage"], event["stage"])
    write_lines(run_dir / "events.jsonl", events)
    for name, other in names.items():
        (run_dir / name).rename(run_dir / other)


@pytest.mark.parametrize("long", [False, True])
def test_no_text_of_a_chart_runs_off_it(copy: Path, long: bool) -> None:
    """By an estimate of the widths of texts, in a window of either width and in as many columns as fit into it."""
    if long:
        long_names(copy)
    sections = build_sections(read_run(copy))
    assert not long or any("…" in str(chart.spec) for chart in charts_in(sections))
    for content in WIDTHS.values():
        for section in sections:
            for block in section.blocks:
                if isinstance(block, Grid):
                    columns = max(1, (content + 36) // (block.min_width + 36))
                    width = (content + 36) / columns - 36
                    assert block.min_width <= content
                    for chart in block.charts:
                        check_fits(chart, width)
                elif isinstance(block, Chart):
                    check_fits(block, content)


def charts_in(sections: list) -> list[Chart]:
    blocks = [block for section in sections for block in section.blocks]
    return [c for b in blocks for c in (b.charts if isinstance(b, Grid) else [b] if isinstance(b, Chart) else [])]


def check_fits(chart: Chart, width: float) -> None:
    layout = chart.spec["layout"]
    left, right = layout["margin"]["l"], layout["margin"]["r"]
    plot = width - left - right
    assert plot > 150, chart.title
    for note in layout.get("annotations", []):
        assert text_width(note["text"], note["font"]["size"]) <= note["xshift"] <= right, note
    x, y = layout["xaxis"], layout["yaxis"]
    if "title" in x:
        assert text_width(x["title"]["text"], x["title"]["font"]["size"]) <= plot
    if "ticktext" in x:
        low, high = x["range"]
        for text in x["ticktext"]:
            assert text_width(text, x["tickfont"]["size"]) <= plot / (high - low), text
    for text in y.get("ticktext", []):
        assert text_width(text, y["tickfont"]["size"]) + 5 <= left, text


def test_text_of_the_page_can_be_broken_or_is_in_a_box_that_scrolls(copy: Path) -> None:
    css = (Path(posttrain.__file__).parent / "report" / "page.css").read_text()
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", css)
    stiff = {selector.strip() for selector, style in rules if "white-space: nowrap" in style}
    assert stiff == {".interval", ".n"}  # an interval is short; numbers of a table are in a box that scrolls
    assert {selector.strip() for selector, style in rules if "overflow-x: auto" in style} == {".scroll", "pre"}
    styles = {selector.strip(): style for selector, style in rules}
    assert "flex-wrap: wrap" in styles[".facts"]
    page = write_report(copy).read_text(encoding="utf-8")
    assert page.count("<table>") == len(re.findall(r'<div class="scroll[^"]*"><table>', page)) > 0


def test_a_stage_that_an_earlier_call_made_is_shown_as_done(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    for record in summary["stages"][:3]:
        record["status"] = "skipped"
    (copy / "summary.json").write_text(json.dumps(summary))
    section = next(section for section in build_sections(read_run(copy)) if section.id == "pipeline")
    table = next(block for block in section.blocks if isinstance(block, Table))
    assert {row[2] for row in table.rows} == {"done"}


def test_a_text_is_cut_to_a_width() -> None:
    assert shortened("short", 100, 12) == "short"
    cut = shortened("a_name_that_is_too_long", 80, 12)
    assert cut.endswith("…")
    assert text_width(cut, 12) <= 80 < text_width(f"{cut[:-1]}xx…", 12)
    assert shortened("abcdef", 1, 12) == "ab…"


def test_the_time_of_a_continued_run_is_that_of_all_its_stages(copy: Path) -> None:
    assert "4 min 24 s in all" in page_of(copy).text
    summary = json.loads((copy / "summary.json").read_text())
    summary["wall_s"] = 20.0
    for stage in summary["stages"][:4]:
        stage["status"] = "skipped"
    (copy / "summary.json").write_text(json.dumps(summary))
    assert "4 min 52 s of work, in several calls" in page_of(copy).text
