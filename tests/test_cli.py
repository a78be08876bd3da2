"""The command line without Ray: help, errors and exit codes, plans, schemas, displays."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.main import get_command

import posttrain
from posttrain.cli.check import guess_kind
from posttrain.cli.display import LiveDisplay, PlainDisplay, RunState, seconds_text
from posttrain.cli.main import app, main
from posttrain.cli.outcome import outcome_lines
from posttrain.cli.rl_panel import PREFIXES, SUBJECTS, figures
from posttrain.context import StageContext
from posttrain.errors import StageError
from posttrain.files import NewRecords, write_text
from posttrain.pipeline.kinds import KINDS

COMMANDS = ["run", "filter", "sft", "rl", "dpo", "eval", "validate", "schema", "doctor", "report", "rewards"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def write(path: str, data: Any) -> str:
    Path(path).write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def rows(path: str, *roles: str) -> str:
    messages = [{"role": role, "content": role[0]} for role in roles]
    Path(path).write_text(
        "".join(json.dumps({"messages": messages, "id": str(n), "answer": "x"}) + "\n" for n in range(3))
    )
    return path


def model_folder(path: str, **config: Any) -> Path:
    """The folder of a model without any weights, with the quick start's tokenizer."""
    from posttrain.base.tokenizer import build_tokenizer

    folder = Path(path)
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def eval_config() -> dict[str, Any]:
    return {
        "model": {"path": "${base.model}"},
        "data": {"path": rows("held.jsonl", "user")},
        "reward": {"name": "final_answer"},
    }


# --- help ---


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: posttrain {name}" in text
    assert len(text) > 200


def test_every_option_has_a_help_text():
    group: Any = get_command(app)
    for name, command in group.commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name == "help", f"{name} {parameter.name}"


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]):
    for name in ("run", "filter", "sft", "rl", "dpo", "eval", "validate", "schema", "report"):
        main([name, "--help"])
        assert f"posttrain {name} " in capsys.readouterr().out.partition("Usage: ")[2].partition("\n")[2]


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom posttrain.cli.main import main\ncode = main(['--help'])\n"
        "heavy = [n for n in ('torch', 'ray', 'transformers', 'pydantic', 'yaml', 'plotly') if n in sys.modules]\n"
        "sys.exit(1 if heavy or code else 0)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "quickstrat"], "did you mean 'quickstart'?"),
        (["schema", "slf"], "did you mean 'sft'?"),
        (["report", "."], "is not a run directory"),
        (["sft"], "Missing argument"),
        (["run", "p.yaml", "--form", "a"], "--form"),
        (["sfd"], "sfd"),
        (["validate", "p.yaml", "--kind", "rll"], "did you mean 'rl'?"),
    ],
)
def test_a_wrong_command_exits_with_2_and_one_message(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    write("p.yaml", {"name": "p", "stages": []})
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sft", "s.yaml", "--learning_rate", "1e-5"], "KEY.PATH=VALUE: optimizer.learning_rate=1e-5\n"),
        (["sft", "s.yaml", "--optimizer.learning-rate=1e-5"], "KEY.PATH=VALUE: optimizer.learning_rate=1e-5\n"),
        (["run", "p.yaml", "--groups_per_step", "8"], "KEY.PATH=VALUE: STAGE.groups_per_step=8\n"),
        (["rl", "r.yaml", "--steps"], "KEY.PATH=VALUE: steps=VALUE\n"),
        (["sft", "s.yaml", "--moonshine", "1"], "No such option: --moonshine"),
    ],
)
def test_a_key_given_as_an_option_is_shown_as_it_must_be(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert ("Keys of a config" in error) == ("KEY.PATH" in expected)


def test_a_pipeline_and_a_stage_are_told_apart(capsys: pytest.CaptureFixture[str]):
    write("p.yaml", {"name": "p", "stages": [{"name": "base", "kind": "base", "config": {}}]})
    write("s.yaml", {"model": {"path": "m"}, "data": {"path": "d"}, "batch_tokens": 4096, "packing": True})
    assert main(["sft", "p.yaml"]) == 2
    assert "is a pipeline, as it has `stages`, not the config of one sft stage; use posttrain run p.yaml" in (
        capsys.readouterr().err
    )
    assert main(["run", "s.yaml"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "s.yaml: has no `stages`, so it is not a pipeline but the config of one stage; use posttrain sft s.yaml\n"
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="has no /proc")
def test_an_unusable_run_directory_is_a_user_error(capsys: pytest.CaptureFixture[str]):
    write("p.yaml", {"name": "p", "stages": [{"name": "base", "kind": "base", "config": {}}]})
    assert main(["run", "p.yaml", "--run-dir", "/proc/x"]) == 2
    assert "/proc/x: nothing can be written there" in capsys.readouterr().err


BAD_FILES = [
    ("epoch: 1\n", "p.yaml: epoch: unknown key; did you mean 'epochs'?"),
    ("model:\n\tpath: x\n", "p.yaml: line 2: a tab character; YAML is indented with spaces only"),
    ("data: {path: nowhere.jsonl}\n", "p.yaml: data.path: nowhere.jsonl: no such file or folder"),
    ("model: {path: nowhere}\n", "p.yaml: model.path: got 'nowhere': no such folder"),
    ("epochs: many\n", "p.yaml: epochs: got 'many'"),
    ("batch_tokens: 16\n", "batch_tokens 16 is less than max_length 4096"),
]


@pytest.mark.parametrize(("text", "expected"), BAD_FILES)
@pytest.mark.parametrize("command", ["sft", "validate"])
def test_a_wrong_stage_file_exits_with_2_and_one_message(
    command: str, text: str, expected: str, capsys: pytest.CaptureFixture[str]
):
    good = {"model": {"path": "model"}, "data": {"path": rows("rows.jsonl", "user", "assistant")}, "batch_tokens": 8192}
    model_folder("model")
    if "\t" not in text:
        text = yaml.safe_dump({**good, **yaml.safe_load(text)})
    write("p.yaml", text)
    assert main([command, "p.yaml", *(["--kind", "sft"] if command == "validate" else [])]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_reference_in_a_stage_file_needs_a_pipeline(capsys: pytest.CaptureFixture[str]):
    """It cannot be run alone, but the rest of it can be checked."""
    write("e.yaml", {**eval_config(), "samples": 4, "k": 4})
    assert main(["eval", "e.yaml"]) == 2
    expected = "e.yaml: model.path: got '${base.model}': there are no other stages here; give a path\n"
    assert capsys.readouterr().err == expected
    assert main(["validate", "e.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "model = ${base.model}" in shown
    assert "eval (eval)\n" in shown
    model_folder("model")
    assert main(["validate", "e.yaml", "model.path=model"]) == 0
    assert "eval (eval)  [run: new]\n" in capsys.readouterr().out
    assert main(["validate", "e.yaml", "k=9"]) == 2
    assert "pass@k needs at least k samples" in capsys.readouterr().err


def test_failures_and_defects_have_their_own_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(error: BaseException) -> int:
        def raise_it(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("posttrain.cli.check.schema_of", raise_it)
        return main(["schema", "sft"])

    assert fails(StageError("stage rl failed: no GPU left")) == 3
    assert capsys.readouterr().err == "stage rl failed: no GPU left\n"
    assert fails(KeyboardInterrupt()) == 130
    assert fails(ZeroDivisionError("a defect")) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    log = Path(re.findall(r"\S+\.log", error)[0])
    assert "ZeroDivisionError: a defect" in log.read_text()
    log.unlink()


# --- plans, schemas, rewards ---


def test_validate_and_dry_run_print_the_plan(capsys: pytest.CaptureFixture[str]):
    base = {"name": "base", "kind": "base", "config": {}}
    write("p.yaml", {"name": "p", "stages": [base, {"name": "test", "kind": "eval", "config": eval_config()}]})
    for arguments in (["validate", "p.yaml"], ["run", "p.yaml", "--dry-run"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "pipeline p · seed 0 · 2 stages" in out
        assert "model = ${base.model}" in out
        assert "out  results = test/results.json" in out
        assert "memory after base" in out
        assert "test (eval)  [run: new]" in out
    assert not Path("runs").exists()


def test_an_override_shows_in_the_plan(capsys: pytest.CaptureFixture[str]):
    write("e.yaml", {**eval_config(), "model": {"path": "nowhere"}})
    assert main(["eval", "e.yaml", "--dry-run", "model.path=elsewhere"]) == 2
    assert "got 'elsewhere'" in capsys.readouterr().err


def test_the_kind_of_a_stage_file_is_guessed(tmp_path: Path):
    for kind, data in {
        "sft": {"model": {"path": "m"}, "data": {"path": "d"}, "batch_tokens": 4096},
        "dpo": {"model": {"path": "m"}, "rollouts": "r"},
        "filter": {"judge": {"path": "m"}, "data": {"path": "d"}, "keep_fraction": 2},
        "rl": {"model": {"path": "m"}, "prompts": {"path": "d"}, "reward": {"name": "r"}, "stepz": 1},
        "eval": eval_config(),
    }.items():
        assert guess_kind(tmp_path / "mine.yaml", data) == kind
    wrong_value = {"model": {"path": "m"}, "data": {"path": "$HOME/d"}}  # a wrong value says nothing about the kind
    assert guess_kind(tmp_path / "mine.yaml", wrong_value) == "sft"


@pytest.mark.parametrize("name", [*KINDS, "pipeline"])
def test_schemas_are_json(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["schema", name]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


def test_environments_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["environments", "list"]) == 0
    shown = capsys.readouterr().out
    for name in ("calculator", "tool_use", "agent"):
        assert name in shown
    assert "posttrain.environments.calculator:calculator" in shown


def test_rewards_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["rewards", "list"]) == 0
    assert "final_answer" in capsys.readouterr().out


# --- displays ---


def event(stage: str, name: str, /, **fields: Any) -> str:
    return json.dumps({"t": 1000.0, "stage": stage, "event": name, **fields}) + "\n"


NODES = [("sft", "sft"), ("rl", "rl"), ("rl.eval", "eval")]


def test_the_tail_reads_whole_lines_from_the_present_end(tmp_path: Path):
    file = tmp_path / "events.jsonl"
    file.write_text(event("old", "x"))
    tail = NewRecords(file, from_end=True)
    assert tail.read() == []
    with file.open("a") as out:
        out.write(event("a", "x") + '{"stage": "b", ')
        out.flush()
        assert [item["stage"] for item in tail.read()] == ["a"]
        out.write('"event": "y"}\nnot json\n')
        out.flush()
        assert [item["stage"] for item in tail.read()] == ["b"]
    write_text(file, event("c", "x"))
    assert [item["stage"] for item in tail.read()] == ["c"], "a file that was replaced is read from its beginning"
    assert tail.read() == []


def test_plain_lines_when_not_on_a_terminal(tmp_path: Path):
    file, out = tmp_path / "events.jsonl", io.StringIO()
    display = PlainDisplay(out)
    display.start(NODES, file)
    file.write_text(
        event("sft", "stage_skipped", why="as before")
        + event("rl", "stage_start")
        + event("rl", "progress", done=1, total=9, unit="steps", values={"reward": 0.25, "queue": 3})
        + event("rl", "progress", done=2, total=9, unit="steps", values={})
        + event("rl", "busy", actor="x")
        + event("nobody", "stage_start")
    )
    display.refresh()
    with file.open("a") as more:
        more.write(event("rl", "stage_failed", error="first\nsecond", wall_s=75))
    display.stop()
    lines = [line.split("  ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [
        "sft  skipped: as before",
        "rl  starts",
        "rl  1/9 steps  reward 0.25 · queue 3",
        "rl  failed: first",
    ]


def test_the_live_display_shows_stages_and_the_figures_of_rl(tmp_path: Path):
    file = tmp_path / "events.jsonl"
    display = LiveDisplay()
    display._state = RunState(NODES, file)
    (tmp_path / "rl").mkdir()
    metrics = {
        "reward_mean": 0.4321,
        "pass_rate": 0.37,
        "reward/math": 0.51,
        "entropy": 0.48,
        "mismatch_kl": 6e-4,
        "ess": 0.985,
        "masked_fraction": 0.004,
        "staleness_mean": 1.5,
        "staleness/0": 5,
        "staleness/2": 27,
        "groups_trained": 32,
        "groups_dropped_stale": 17,
        "groups_dropped_unscored": 0,
        "groups_too_hard": 11,
        "unscored_fraction": 0.25,
        "queue_groups": 6,
        "queue_age_s_mean": 0.6,
        "generate_tokens_per_s": 2512.0,
        "idle/trainer": 0.12,
        "idle/engine-1": 0.03,
        "episodes": 32,
        "episode/turns": 2.5,
        "episode/tokens": 1234.5,
        "episode/tool_calls": 1.25,
        "episode/malformed_calls": 0.125,
        "episode/tool_failures": 0.03,
        "episode/cached": 0.875,
        "prompts_seen": 400,
    }
    context = StageContext("rl", tmp_path / "rl", file)
    context.metrics(11, {"reward_mean": 0.9, "prompts_mixed": 3})
    context.metrics(12, metrics)
    file.write_text(
        event("sft", "stage_start")
        + event("sft", "stage_done", wall_s=63.0)
        + event("rl", "stage_start")
        + event("rl", "progress", done=12, total=40, unit="steps", values={})
    )
    display.refresh()
    text = shown(display)
    for expected in (
        "1 min 03 s",
        "running",
        "12/40 steps",
        "waiting",
        "0.432",
        "1.50",
        "mean 0.432   pass rate 37%   math 0.510",
        "entropy 0.48   mismatch KL 0.0006   effective samples 98.5%   masked 0.40%",
        "mean 1.50   groups of age 0 5   groups of age 2 27",
        "trained 32   dropped too hard 11   dropped stale 17   unscored replies 25.0%",
        "waiting 6   waited, s 0.6",
        "tokens/s 2,512   idle trainer 12%   idle engine-1 3%",
        "ended 32   turns 2.5   tokens 1,234   tool calls 1.2   malformed 0.12   tools failed 0.03   cached 88%",
        "drawn 400",
    ):
        assert expected in text, text
    assert "mixed" not in text  # of an earlier step
    assert "clipped" not in text


def shown(display: LiveDisplay) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(display._render())
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("limit", "share", "alarms"), [(0.2, 0.2, False), (0.2, 0.21, True), (0.5, 0.4, False), (None, 0.9, False)]
)
def test_many_unscored_replies_alarm(limit: float | None, share: float, alarms: bool):
    assert figures({"unscored_fraction": share}, limit)["groups"] == [("unscored replies", f"{share:.1%}", alarms)]


@pytest.mark.parametrize(("limit", "alarms"), [(0.2, True), (0.3, False)])
def test_the_panel_alarms_above_what_the_stage_was_given(tmp_path: Path, limit: float, alarms: bool):
    """The limit comes from the stage's own config.yaml, which is written before the stage starts."""
    display, file = LiveDisplay(), tmp_path / "events.jsonl"
    display._state = RunState(NODES, file)
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "config.yaml").write_text(f"reward: {{name: x, alarm_fraction: {limit}}}\n")
    StageContext("rl", tmp_path / "rl", file).metrics(0, {"unscored_fraction": 0.25})
    file.write_text(event("rl", "stage_start"))
    display.refresh()
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    console.print(display._render())
    assert ("\x1b[1;31m25.0%" in console.file.getvalue()) == alarms


def test_each_dropped_group_is_shown_once():
    metrics = {"groups_dropped_stale": 2, "groups_dropped_length/32": 2}
    assert figures(metrics)["groups"] == [("dropped stale", "2", False)]
    metrics = {"groups_dropped_zero_advantage": 5, "groups_dropped_pass_rate/0.25": 5}
    assert figures(metrics)["groups"] == [("dropped zero advantage", "5", False)]
    causes = {**metrics, "groups_dropped_stopped": 4, "groups_too_easy": 3, "groups_too_hard": 6}
    assert figures(causes)["groups"] == [("dropped too easy", "3", False), ("dropped too hard", "6", False)]


def test_a_phase_is_shown_until_there_is_progress(tmp_path: Path):
    display, file, out = LiveDisplay(), tmp_path / "events.jsonl", io.StringIO()
    display._state = RunState(NODES, file)
    plain = PlainDisplay(out)
    plain.start(NODES, file)
    context = StageContext("rl", tmp_path / "rl", file)
    file.write_text(event("rl", "stage_start"))
    context.phase("starting engines: 2")
    display.refresh()
    assert shown(display).count("starting engines: 2") == 2  # in the table and in the panel
    context.progress(1, 40, "prompts", values={"phase": "pass@k profile"})
    context.phase("waiting for the trainer")
    display.refresh()
    assert shown(display).count("waiting for the trainer") == 2
    context.progress(40, 40, "prompts", values={"phase": "pass@k profile"})
    display.refresh()
    assert "waiting for the trainer" not in shown(display)
    assert "40/40 prompts" in shown(display)
    plain.stop()
    lines = [line[10:] for line in out.getvalue().splitlines()]
    assert "rl  starting engines: 2" in lines
    assert "rl  waiting for the trainer" in lines


def test_the_panel_shows_the_phase_before_the_first_step(tmp_path: Path):
    display = LiveDisplay()
    display._state = RunState(NODES, tmp_path / "events.jsonl")
    profile = event("rl", "progress", done=3, total=9, unit="prompts", values={"phase": "pass@k profile"})
    (tmp_path / "events.jsonl").write_text(event("rl", "stage_start") + profile)
    display.refresh()
    assert "phase pass@k profile" in shown(display)


def test_rl_reports_every_metric_that_the_panel_shows():
    """The names are searched in the source of the stage that reports them."""
    source = "".join(file.read_text() for file in (Path(posttrain.__file__).parent / "rl").rglob("*.py"))
    for key, _, _ in [entry for entries in SUBJECTS.values() for entry in entries]:
        start = f'f"{key}{{' if key.endswith(PREFIXES) else f'"{key}"'
        assert start in source, key


MADE = {
    "filter": (
        {"outputs": {"kept": "x/kept.jsonl"}, "stats": {"num_kept": 600, "num_rows": 1200}},
        "kept 600 of 1\u202f200 rows: {run}/x/kept.jsonl",
    ),
    "sft": (
        {"outputs": {"model": "x/model"}, "stats": {"steps": 120, "loss_first": 1.234, "loss_last": 0.871}},
        "120 steps, loss 1.23 → 0.871: {run}/x/model",
    ),
    "rl": (
        {"outputs": {"model": "x/model", "rollouts": "x/rollouts"}, "stats": {"steps": 1, "selected_prompts": 87}},
        "1 step on 87 prompts: {run}/x/model",
    ),
    "base": ({"outputs": {"model": "x/model"}, "stats": {}}, "{run}/x/model"),
}


@pytest.mark.parametrize("kind", MADE)
def test_the_last_lines_of_a_stage_show_its_output_and_figures(kind: str, tmp_path: Path):
    record, expected = MADE[kind]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "DONE").write_text(json.dumps(record))
    assert outcome_lines(tmp_path, "x", kind) == [expected.format(run=tmp_path)]


@pytest.mark.parametrize("live", [False, True])
def test_the_last_lines_of_an_evaluation_are_its_table(live: bool, tmp_path: Path):
    file, out = tmp_path / "events.jsonl", io.StringIO()
    folder = tmp_path / "rl" / "eval"
    folder.mkdir(parents=True)
    (folder / "DONE").write_text(json.dumps({"outputs": {"results": "rl/eval/results.json"}}))
    math = {"n": 36, "greedy": 0.5, "greedy_ci95": [0.34, 0.66], "pass@1": 0.4, "pass@k": None, "k": 8, "unscored": 2}
    (folder / "results.json").write_text(json.dumps({"math": math, "all": {**math, "unscored": 0}}))
    display: Any = LiveDisplay(Console(file=out, width=200)) if live else PlainDisplay(out)
    display.start(NODES, file)
    file.write_text(event("rl.eval", "stage_done", wall_s=2.0))
    display.stop()
    said = [line.split("rl.eval  ", 1)[1].rstrip() for line in out.getvalue().splitlines() if line[2:3] == ":"]
    assert said[-4:] == [
        f"results: {folder}/results.json",
        "      n   greedy              pass@1  unscored",
        "math  36  50.0% (34% to 66%)  40.0%   2",
        "all   36  50.0% (34% to 66%)  40.0%   0",
    ]
    assert outcome_lines(tmp_path, "sft", "sft") == [], "it is not finished"


FAULTS = (
    event("rl", "engine_replaced", name="engine-0", reason="its process ended")
    + event("rl", "alarm", reason="unscored", values={"unscored_fraction": 0.25})
    + event("rl", "rolled_back", steps=2)
    + event("rl", "reward_restarted")
    + event("sft", "tracker_failed", tracker="wandb", error="CommError: no route")
)
FAULT_LINES = [
    "rl  engine replaced: engine-0: its process ended",
    "rl  alarm: unscored: unscored_fraction 0.25",
    "rl  rolled back: steps 2",
    "rl  reward processes restarted",
    "sft  tracker turned off: wandb: CommError: no route",
]


@pytest.mark.parametrize("live", [False, True])
def test_both_displays_print_a_line_for_each_fault(tmp_path: Path, live: bool):
    file, out = tmp_path / "events.jsonl", io.StringIO()
    display: Any = LiveDisplay(Console(file=out, width=120)) if live else PlainDisplay(out)
    display.start(NODES, file)
    file.write_text(event("rl", "busy", actor="trainer") + FAULTS)
    display.stop()
    said = [line.split("  ", 1)[1].strip() for line in out.getvalue().splitlines() if line[2:3] == ":"]
    assert said == FAULT_LINES


def test_durations_are_written_in_seconds_or_minutes():
    assert [seconds_text(value) for value in (None, 0.04, 59.94, 61)] == ["", "0.0 s", "59.9 s", "1 min 01 s"]
