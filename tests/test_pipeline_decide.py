"""The decision for each stage of a run directory: skip, continue or run again; and what is asked and kept. No Ray."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipeline_kinds
import pytest
import yaml
from pipeline_kinds import said_on
from test_pipeline import CHAIN, pipeline, stage

from posttrain.cli.main import main
from posttrain.config.base import MAY_GROW, RESULT_STAYS
from posttrain.config.resources import HostChoice
from posttrain.errors import ConfigError
from posttrain.pipeline import load_pipeline
from posttrain.pipeline.changes import find_changes
from posttrain.pipeline.decide import decide
from posttrain.pipeline.graph import Pipeline
from posttrain.pipeline.hashing import marked
from posttrain.pipeline.kinds import KINDS, StageKind, load_schema
from posttrain.pipeline.replace import delete_kept, kept, kept_text, move_aside, require_consent
from posttrain.pipeline.rundir import RunDir


def finish(made: Pipeline, place: RunDir, *names: str) -> None:
    """Pretend that these nodes were run, each with a checkpoint of its last step."""
    decisions = decide(made, place)
    for name in names:
        node = made.nodes[name]
        begin(made, place, name)
        checkpoint(place, name, getattr(node.config, "steps", 1))
        (place.folder(node) / "count.txt").write_text(name)
        outputs = {"count": f"{node.folder}/count.txt"}
        place.finish(node, {"input_hash": decisions[name].input_hash, "outputs": outputs, "wall_s": 1.0})


def begin(made: Pipeline, place: RunDir, name: str) -> None:
    """Pretend that a node was begun."""
    decision = decide(made, place)[name]
    place.begin(made.nodes[name], decision.input_hash, {}, basis=decision.basis, resume=False)


def checkpoint(place: RunDir, name: str, step: int) -> None:
    (place.path / name / "checkpoints" / f"step_{step}").mkdir(parents=True)


def texts(made: Pipeline, place: RunDir, **options: Any) -> dict[str, str]:
    return {name: decision.text for name, decision in decide(made, place, **options).items()}


def actions(made: Pipeline, place: RunDir, **options: Any) -> dict[str, str]:
    return {name: decision.action for name, decision in decide(made, place, **options).items()}


@pytest.fixture
def place(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_what_is_unchanged_is_skipped(place: RunDir):
    made = pipeline(*CHAIN)
    assert actions(made, place) == {"a": "run", "b": "run", "c": "run"}
    finish(made, place, "a", "b")
    assert actions(made, place) == {"a": "skip", "b": "skip", "c": "run"}


def test_a_change_reaches_what_needs_it(place: RunDir):
    finish(pipeline(*CHAIN), place, "a", "b", "c")
    assert actions(pipeline(CHAIN[0], stage("b", source="${a.count}", add=9), CHAIN[2]), place) == {
        "a": "skip",
        "b": "run",
        "c": "run",
    }
    assert set(actions(pipeline(*CHAIN, seed=1), place).values()) == {"run"}


def test_an_input_file_is_compared_by_content(place: RunDir, tmp_path: Path):
    row = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    file = tmp_path / "rows.jsonl"
    file.write_text(row + "\n")
    made = pipeline(stage("a", data={"path": str(file)}), stage("b", source="${a.count}"))
    finish(made, place, "a", "b")
    os.utime(file, (1, 1))
    assert actions(made, place) == {"a": "skip", "b": "skip"}
    file.write_text(row.replace("q", "r") + "\n")
    assert actions(made, place) == {"a": "run", "b": "run"}


def test_a_change_of_a_rewards_source_runs_the_stage_again(place: RunDir, tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def score(rollout, row):\n    return 1.0\n")
    made = pipeline(stage("a", reward={"name": f"{file}:score"}))
    finish(made, place, "a")
    assert actions(made, place) == {"a": "skip"}
    file.write_text("def score(rollout, row):\n    return 0.0\n")
    assert actions(made, place) == {"a": "run"}


def test_an_output_that_is_gone_is_made_again(place: RunDir):
    made = pipeline(*CHAIN)
    finish(made, place, "a", "b", "c")
    (place.path / "b" / "count.txt").unlink()
    assert texts(made, place)["b"] == "continue from step 2: count is gone"
    assert actions(made, place) == {"a": "skip", "b": "continue", "c": "skip"}


def test_a_moved_run_directory_is_still_done(place: RunDir, tmp_path: Path):
    made = pipeline(*CHAIN)
    finish(made, place, "a", "b", "c")
    place.path.rename(tmp_path / "elsewhere")
    assert set(actions(made, RunDir(tmp_path / "elsewhere")).values()) == {"skip"}


def test_an_interrupted_stage_goes_on_and_asks_before_its_work_is_replaced(place: RunDir):
    made = pipeline(*CHAIN)
    finish(made, place, "a")
    begin(made, place, "b")
    changed = pipeline(CHAIN[0], stage("b", source="${a.count}", add=9), CHAIN[2])
    assert decide(changed, place)["b"].replaces == "", "there is no work yet"
    checkpoint(place, "b", 1)
    assert texts(made, place) == {
        "a": "skip: config, inputs and code are as before",
        "b": "continue from step 1: it was interrupted",
        "c": "run: new",
    }
    assert texts(made, place, start_from="b")["b"] == "continue from step 1: it was interrupted"
    longer = pipeline(CHAIN[0], stage("b", source="${a.count}", steps=5), CHAIN[2])
    assert texts(longer, place)["b"] == "continue from step 1: steps: 2 → 5"
    decision = decide(changed, place)["b"]
    assert (decision.text, decision.replaces) == ("run anew because add: 1 → 9", "an unfinished run at step 1")
    with pytest.raises(ConfigError, match="b, an unfinished run at step 1: add: 1 → 9"):
        require_consent(place, decide(changed, place), overwrite=False, ask=None)


def test_from_runs_it_and_what_needs_it_again_and_takes_the_rest_as_it_is(place: RunDir):
    made = pipeline(*CHAIN, stage("d", add=4))
    finish(made, place, "a", "b", "c", "d")
    assert actions(made, place, start_from="b") == {"a": "skip", "b": "run", "c": "run", "d": "skip"}
    assert actions(made, place, start_from="a") == {"a": "run", "b": "run", "c": "run", "d": "skip"}
    changed = pipeline(stage("a", add=5), *CHAIN[1:], stage("d", add=4))
    decisions = decide(changed, place, start_from="b")
    assert decisions["a"].action == "skip"
    assert "taken as it is" in decisions["a"].why
    assert decisions["b"].text == "run anew because asked for by --from"
    require_consent(place, decisions, overwrite=False, ask=None)  # --from is consent


def test_only_runs_the_named_stage(place: RunDir):
    made = pipeline(*CHAIN)
    with pytest.raises(ConfigError, match="stage 'a' has not been finished"):
        decide(made, place, only="b")
    finish(made, place, "a")
    assert actions(made, place, only="b") == {"a": "skip", "b": "run", "c": "leave out"}


@pytest.mark.parametrize("option", ["start_from", "only"])
def test_an_unknown_stage_to_start_from_is_refused(place: RunDir, option: str):
    with pytest.raises(ConfigError, match="no such stage; did you mean 'b'"):
        decide(pipeline(stage("a"), stage("b")), place, **{option: "bb"})


# --- what changed ---


def test_more_steps_go_on_and_reports_do_not_count(place: RunDir):
    finish(pipeline(*CHAIN), place, "a", "b", "c")
    longer = pipeline(CHAIN[0], stage("b", source="${a.count}", steps=5), CHAIN[2])
    assert texts(longer, place) == {
        "a": "skip: config, inputs and code are as before",
        "b": "continue from step 2: steps: 2 → 5",
        "c": "run anew because stage b goes on",
    }
    slower = pipeline(CHAIN[0], stage("b", source="${a.count}", step_s=1.0), CHAIN[2])
    assert set(actions(slower, place).values()) == {"skip"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"steps": 1}, "steps: 2 → 1"),
        ({"steps": 5, "add": 7}, "add: 1 → 7; steps: 2 → 5"),
        ({"trouble_unless": "x"}, "trouble_unless:  → x"),
        ({"resources": {"trainer": {"workers": 3}}}, "resources.trainer.workers: 1 → 3"),
    ],
)
def test_any_other_change_is_named_with_both_values(place: RunDir, config: dict[str, Any], why: str):
    finish(pipeline(stage("a")), place, "a")
    decision = decide(pipeline(stage("a", **config)), place)["a"]
    assert (decision.text, decision.replaces) == (f"run anew because {why}", "a finished result")


def test_an_unfinished_run_without_a_checkpoint_goes_on_with_more_steps(place: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(KINDS, "count", replace(KINDS["count"], progress=("profile",)))
    begin(pipeline(stage("a")), place, "a")
    assert texts(pipeline(stage("a", steps=9)), place)["a"] == "run: steps: 2 → 9"
    (place.path / "a" / "profile").touch()
    assert texts(pipeline(stage("a", steps=9)), place)["a"] == "continue: steps: 2 → 9"
    assert decide(pipeline(stage("a", add=9)), place)["a"].replaces == "an unfinished run"


def test_without_a_checkpoint_more_steps_begin_anew(place: RunDir):
    finish(pipeline(stage("a")), place, "a")
    (place.path / "a" / "checkpoints" / "step_2").rmdir()
    decision = decide(pipeline(stage("a", steps=9)), place)["a"]
    assert (decision.action, decision.replaces) == ("run", "a finished result")


def test_inputs_seed_stages_and_code_are_named(place: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows.write_text(json.dumps(row) + "\n")
    made = pipeline(stage("a", data={"path": str(rows)}), stage("b", source="${a.count}"))
    finish(made, place, "a", "b")
    rows.write_text(json.dumps({**row, "id": "1"}) + "\n")
    assert texts(made, place) == {
        "a": f"run anew because data: {rows} has other content than before",
        "b": "run anew because stage a runs anew",
    }
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text())
    moved = pipeline(stage("a", data={"path": str(other)}), seed=3)
    assert texts(moved, place)["a"] == f"run anew because data.path: …{tail_of(rows)} → …{tail_of(other)}; seed: 0 → 3"
    rows.write_text(json.dumps(row) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(
            "posttrain.pipeline.hashing.code_hashes", lambda kind: {"posttrain/rl": "x", "posttrain/files": "y"}
        )
        finish(made, place, "a", "b")
        patch.setattr(
            "posttrain.pipeline.hashing.code_hashes", lambda kind: {"posttrain/rl": "z", "posttrain/files": "y"}
        )
        assert texts(made, place)["a"] == "run anew because the code of posttrain/rl has changed"
    node = made.nodes["a"]
    (change,) = find_changes(None, {}, node.config, upstream={})
    assert change.text == "its earlier config is unknown: another version of posttrain made the result"


def tail_of(path: Path) -> str:
    """What is shown of a long path that differs from another in its last part."""
    return f"{path.parent}/"[-12:] + path.name


def test_a_stage_may_be_added_and_taken_away(place: RunDir):
    finish(pipeline(*CHAIN), place, "a", "b", "c")
    added = pipeline(*CHAIN, stage("d", source="${b.count}"))
    with place.open(added):
        assert actions(added, place) == {"a": "skip", "b": "skip", "c": "skip", "d": "run"}
    assert actions(pipeline(*CHAIN[:2]), place) == {"a": "skip", "b": "skip"}
    rewired = pipeline(CHAIN[0], stage("c", source="${a.count}", add=2))
    assert texts(rewired, place)["c"] == "run anew because source: ${b.count} → ${a.count}"


def test_every_mark_is_one_that_is_known():
    """A field with an unknown mark would silently count as one that decides the result."""
    growing = {"sft": {"epochs"}, "rl": {"steps"}, "dpo": {"epochs"}}
    for name in ("base", "filter", "sft", "rl", "dpo", "eval"):
        fields = load_schema(KINDS[name]).model_fields
        extras = {key: field.json_schema_extra for key, field in fields.items() if field.json_schema_extra}
        assert all(extra in (MAY_GROW, RESULT_STAYS) for extra in extras.values()), name
        assert {key for key, extra in extras.items() if extra == MAY_GROW} == growing.get(name, set())
        for key in {"trackers", "checkpoint_every"} & fields.keys():
            assert extras[key] == RESULT_STAYS
    config = pipeline_kinds.CountConfig()
    hosts = {f"resources.trainer.{key}" for key in HostChoice.model_fields}
    assert (marked(config, MAY_GROW), marked(config, RESULT_STAYS)) == ({"steps"}, {"step_s", *hosts})


# --- consent, and what is moved aside ---

BEYOND = (stage("a", add=5), *CHAIN[1:])


def test_everything_that_would_go_is_named_in_one_question(place: RunDir):
    finish(pipeline(*CHAIN), place, "a", "b", "c")
    decisions = decide(pipeline(*BEYOND), place)
    with pytest.raises(ConfigError) as refused:
        require_consent(place, decisions, overwrite=False, ask=None)
    assert str(refused.value) == (
        f"{place.path}: this run would replace\n"
        "  a, a finished result: add: 1 → 5\n"
        "  b, a finished result: stage a runs anew\n"
        "  c, a finished result: stage b runs anew\n"
        f"  --overwrite allows it, and keeps them in {place.path}/.replaced until the new ones are complete; "
        "or choose another --run-dir"
    )
    assert refused.value.exit_code == 2
    asked: list[str] = []
    require_consent(place, decisions, overwrite=False, ask=lambda question: not asked.append(question))
    assert "a, a finished result: add: 1 → 5" in asked[0]
    with pytest.raises(ConfigError, match="nothing was replaced, and nothing was started"):
        require_consent(place, decisions, overwrite=False, ask=lambda question: False)
    require_consent(place, decisions, overwrite=True, ask=None)
    require_consent(place, decide(pipeline(*CHAIN), place), overwrite=False, ask=None)


@pytest.mark.parametrize("on_terminal", [True, False])
def test_the_command_asks_on_a_terminal_and_refuses_elsewhere(
    on_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"name": "p", "stages": [stage("a")]}))
    place = RunDir("runs/p")
    finish(load_pipeline("p.yaml"), place, "a")
    for command in (["run", "p.yaml", "a.add=9", "--dry-run"], ["validate", "p.yaml", "a.add=9"]):
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert "a (count)  [run anew because add: 1 → 9]" in shown
        assert f"  replaces  a finished result in {place.path}/a\n" in shown
    master, terminal = os.openpty()
    os.write(master, b"n\n")
    with os.fdopen(os.dup(terminal), "r") as typed, os.fdopen(terminal, "w") as said, monkeypatch.context() as patch:
        if on_terminal:
            patch.setattr("sys.stdin", typed)
            patch.setattr("sys.stderr", said)
        assert main(["run", "p.yaml", "a.add=9"]) == 2
    shown = said_on(master) + capsys.readouterr().err
    assert "a, a finished result: add: 1 → 9" in shown
    assert ("[y/N]" in shown, "--overwrite allows it" in shown) == (on_terminal, not on_terminal)
    assert ("nothing was replaced, and nothing was started" in shown) == on_terminal
    assert (place.path / "a" / "DONE").exists()


def test_what_is_replaced_is_kept_until_the_new_is_whole(place: RunDir, monkeypatch: pytest.MonkeyPatch):
    evaluation = StageKind("pipeline_kinds:ScoreConfig", "pipeline_kinds:score", {"results": "results.json"})
    monkeypatch.setitem(KINDS, "eval", evaluation)
    score = {"config": {"model": {"path": "x"}}, "stages": ["a"]}
    made, changed = pipeline(*CHAIN, evaluate=score), pipeline(*BEYOND, evaluate=score)
    finish(made, place, "a", "b", "c", "a.eval")
    place.events.write_text("".join(json.dumps({"stage": name, "n": 1}) + "\n" for name in ("a", "b")))
    decisions = decide(changed, place)
    moved = move_aside(changed, place, decisions)
    assert set(moved) == {"a", "b", "c", "a.eval"}
    assert not any((place.path / name).exists() for name in "abc")
    assert (moved["a"] / "count.txt").read_text() == "a"
    assert (moved["a.eval"] / "DONE").exists()
    assert json.loads((moved["a"] / "events.jsonl").read_text()) == {"stage": "a", "n": 1}
    # The run is killed. The next run does not ask again, and knows the earlier results that are kept.
    assert actions(changed, place) == dict.fromkeys(("a", "b", "c", "a.eval"), "run")
    require_consent(place, decide(changed, place), overwrite=False, ask=None)
    assert kept_text(changed, place).count("The earlier result of") == 4
    assert f"The earlier result of a is in {moved['a']}" in kept_text(changed, place)
    # Its new result is replaced again before it is complete: both earlier results are kept.
    begin(changed, place, "a")
    checkpoint(place, "a", 1)
    again = move_aside(made, place, decide(made, place))
    assert kept(place, made.nodes["a"]) == sorted([moved["a"], again["a"]])
    # Moved back by hand, it is as it was.
    moved["a"].rename(place.path / "a")
    assert actions(made, place)["a"] == "skip"
    assert delete_kept(place, made.nodes["a"]) == [again["a"]]
    assert kept(place, made.nodes["a"]) == []
    assert kept(place, made.nodes["b"]) == [moved["b"]]
    for name in ("b", "c", "a.eval"):
        delete_kept(place, made.nodes[name])
    assert not (place.path / ".replaced").exists()
