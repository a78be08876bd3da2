"""`posttrain rewards test, audit, new`: what they find in rewards that can be fooled, and in the built-in ones."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli.main import main
from posttrain.errors import ConfigError, DataError
from posttrain.records import FinishReason, Message, Outcome, Row, Scored
from posttrain.reward_tools.audit import Asked, Audit, conclude, own_answers, wrong_answers_to
from posttrain.reward_tools.controls import FORMS, forms_with, golds, look_alikes, same, wrong_answers
from posttrain.reward_tools.template import write_plugin
from posttrain.reward_tools.trial import Tried, replies_of, reply_to
from posttrain.scoring.plugins.lookup import load_reward
from posttrain.scoring.plugins.results import to_result


def rows_of(*answers: Any, **fields: Sequence[Any]) -> list[Row]:
    return [
        Row(f"r{n}", "any", (Message("user", f"Question {n}?"),), answer, {name: v[n] for name, v in fields.items()})
        for n, answer in enumerate(answers)
    ]


def scored_here(function: Callable, asked: Sequence[Asked]) -> list[Tried]:
    """Scores without a process, for rewards that run no programs."""
    found = []
    for what, row, rollout in asked:
        try:
            scored = Scored(to_result(function(rollout, row)))
        except Exception as error:
            scored = Scored(None, Outcome.ERROR, f"{type(error).__name__}: {error}")
        found.append(Tried(what, row, rollout.text, scored))
    return found


def audit_here(function: Callable, rows: Sequence[Row], **args: Any) -> Audit:
    forms = forms_with(args)
    right = scored_here(function, own_answers(rows, forms))
    asked = wrong_answers_to(rows, rows, forms, right=right, threshold=0.5)
    return conclude(rows, right, scored_here(function, asked), threshold=0.5)


SENSIBLE = {
    "math": (rows_of("12", "\\sqrt{2}", "\\frac{1}{6}", "2x", "20%", "3000 m", "(2, \\infty)", ["4", "four"], 0.5), {}),
    "final_answer": (rows_of("Paris", "Rome", "4", "x + 1"), {}),
    "exact_match": (rows_of("Paris", 4, ["blue", "azure"], True, 0.5), {}),
    "exact_match, marked": (rows_of("Paris", "Rome", "Bern"), {"marker": "Final:"}),
    "multiple_choice": (rows_of("B", "A", 2, "y", choices=[["red", "blue", "green"], *[["x", "y", "z"]] * 3]), {}),
    "valid_json": (rows_of({"a": 1}, [1, 2], {"name": "x", "ok": True}, 7), {}),
    "instructions": (
        rows_of(None, None, constraints=[{"min_words": 3, "must_include": ["fur"]}, {"bullet_count": 2}]),
        {},
    ),
}


@pytest.mark.parametrize("name", SENSIBLE)
def test_no_control_fools_a_built_in_reward(name):
    rows, args = SENSIBLE[name]
    found = audit_here(load_reward(name.partition(",")[0], args), rows, **args)
    assert found.is_sound, found.to_json()
    assert found.verdict.startswith("no control fooled the reward")
    if rows[0].answer is not None:
        assert (found.with_answer, max(found.accepted.values())) == (len(rows), len(rows))
        assert len(found.passed) >= 10


def contains(rollout, row):
    return row.answer in rollout.text


def last_word(rollout, row):
    return rollout.text.split()[-1].strip(".") == row.answer


def any_reply(rollout, row):
    return True


def nothing(rollout, row):
    return False


def verdict_in_the_reply(rollout, row):
    return '"correct": true' in rollout.text or rollout.text == f"Answer: {row.answer}"


def only_a_prefix(rollout, row):
    return rollout.text.startswith(f"Answer: {row.answer}")


@pytest.mark.parametrize(
    ("reward", "fooled", "unscored"),
    [
        (contains, {"a hedge", "a look-alike", "a right answer only in thought", "every candidate listed"}, set()),
        (last_word, {"a hedge"}, {"an empty reply"}),
        (verdict_in_the_reply, {"a forged verdict"}, set()),
        (only_a_prefix, {"a hedge", "a look-alike"}, set()),
    ],
)
def test_a_naive_reward_is_caught(reward, fooled, unscored):
    found = audit_here(reward, rows_of("19", "15", "4.5", "Paris"))
    assert fooled <= {finding.control for finding in found.fooled}
    assert unscored <= {finding.control for finding in found.unscored}
    assert not found.is_sound
    assert "the reward can be fooled" in found.verdict
    assert not found.refused
    for finding in (*found.fooled, *found.unscored):
        assert 0 < finding.count <= finding.of
        assert finding.control not in found.passed


def test_rewards_that_are_always_right_or_never_right_fail_the_audit():
    every = audit_here(any_reply, rows_of("19", "15", "4.5"))
    assert every.passed == []
    never = audit_here(nothing, rows_of("19", "15", "4.5"))
    assert (never.fooled, [item.row.id for item in never.refused]) == ([], ["r0", "r1", "r2"])
    assert never.verdict == "the reward refuses right answers"


def test_wrong_answers_are_other_answers_that_are_not_the_same():
    rows = rows_of("0.5", "1/2", " 0.50", "Paris", "PARIS", 3, [4, 5], None)
    assert wrong_answers(rows[0], rows) == ["Paris", "PARIS", "3", "4"]
    assert wrong_answers(rows[3], rows) == ["0.5", "1/2", "0.50", "3", "4"]
    (alone,) = rows_of("17")
    assert wrong_answers(alone, [alone]) == ["blue"]
    choice = rows_of(1, choices=[["a", "b", "c"]])[0]
    assert (golds(choice), wrong_answers(choice, [choice])) == (["B"], ["A", "C"])
    assert golds(rows[-1]) == []
    assert look_alikes("42") == ["427", "4"]
    assert look_alikes("cat")[0] == "cat7"
    assert not any(same(text, "cat") for text in look_alikes("cat"))


def test_replies_are_read_from_a_file_and_from_a_run(tmp_path: Path):
    rows = rows_of("4", "5")
    path = tmp_path / "replies.jsonl"
    lines = [
        {"id": "r1", "reply": "5"},
        {"prompt_id": "r0", "reply": "4", "finish_reason": "length"},
        {"id": "r0", "reply": "4", "truncated": True},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = replies_of(str(path), rows)
    assert [(row.id, rollout.text, rollout.finish_reason) for _, row, rollout in found] == [
        ("r1", "5", FinishReason.STOP), ("r0", "4", FinishReason.LENGTH), ("r0", "4", FinishReason.LENGTH)
    ]  # fmt: skip
    for line, message in (
        ({"id": "r7", "reply": "5"}, r"replies.jsonl.* id is 'r7'; no row has this id \(the first has 'r0'\)"),
        ({"id": "r0"}, "reply is None; give the text of a reply"),
    ):
        path.write_text(json.dumps(line))
        with pytest.raises(DataError, match=message):
            replies_of(str(path), rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test", "mth"], "did you mean 'math'"),
        (["test", "code"], "row 'p1': no 'tests', which reward 'code' needs"),
        (["audit", "math", "timeout=3"], "timeout: unknown key; did you mean 'timeout_s'"),
        (["audit", "math", "timeout_s=0"], "reward: timeout_s: got 0"),
        (["audit", "math", "args.marker=x"], "unexpected keyword argument 'marker'"),
        (["test", "math", "--replies", "none.jsonl"], "none.jsonl: no such file"),
        (["test", "math", "--replies", "empty.jsonl"], "empty.jsonl"),
    ],
)
def test_bad_input_is_one_message(arguments, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "p1", "prompt": "2 + 2?", "answer": "4"}))
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["rewards", *arguments, "--on", "p.jsonl"]) == 2
    assert message in capsys.readouterr().err


def test_a_new_reward_passes_its_audit_and_destroys_nothing(tmp_path: Path):
    plugin, test = write_plugin("brief", tmp_path / "mine")
    assert (plugin.name, test.name) == ("brief.py", "test_brief.py")
    found = audit_here(load_reward(f"{plugin}:brief"), rows_of("4", "Paris", "x + 1"))
    assert found.is_sound, found.to_json()
    with pytest.raises(ConfigError, match=r"brief\.py, .*test_brief\.py: exists already"):
        write_plugin("brief", tmp_path / "mine")
    for name in ("1x", "class", "a-b", ""):
        with pytest.raises(ConfigError, match="must be a Python name"):
            write_plugin(name, tmp_path)
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        write_plugin("other", plugin)


def test_a_reply_is_what_an_engine_would_give():
    row = rows_of("4")[0]
    rollout = reply_to(row, "Answer: 4")
    assert (rollout.text, rollout.finish_reason, rollout.prompt.messages) == ("Answer: 4", "stop", row.messages)
    assert reply_to(row, "x", is_whole=False).finish_reason == "length"
    assert set(forms_with({"marker": "Final:"})) - set(FORMS) == {"Final: X"}


REWARD = '''
import os, time

def naive(rollout, row):
    """Trusts whatever contains the answer, and runs what it is given."""
    if "os._exit" in rollout.text:
        os._exit(0)
    if "while True" in rollout.text:
        time.sleep(1000)
    return float(row.answer in rollout.text)

def by_row(rollout, row):
    return {"p0": None, "p1": float("nan"), "p2": 1.0}[row.id]
'''


@pytest.mark.slow
def test_the_commands_use_reward_processes_that_can_be_killed(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARD)
    rows = [{"id": f"p{n}", "prompt": f"{n} + {n}?", "answer": str(2 * n + 10)} for n in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "replies.jsonl").write_text(
        "".join(json.dumps({"id": f"p{n}", "reply": "10"}) + "\n" for n in range(3))
    )

    assert main(["rewards", "audit", "r.py:naive", "--on", "p.jsonl", "timeout_s=2", "--rows", "2", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["sound"], found["rows"], found["rows_with_answer"]) == (False, 2, 2)
    assert {"a hedge", "every candidate listed"} <= {finding["control"] for finding in found["fooled"]}
    lost = {finding["control"]: finding["why"].partition(":")[0] for finding in found["unscored"]}
    assert lost == {
        "a program that exits or forges": "infrastructure",  # it ended the grader's own process
        "a program that never ends": "unscorable",
    }

    assert main(["rewards", "test", "r.py:by_row", "--on", "p.jsonl", "--replies", "replies.jsonl"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("reward r.py:by_row on 3 rows: 3 replies, 1 scored, 2 could not be scored (nan 1, none 1)\n")
    assert "row p0: no score for '10' (error: none: the reward returned None" in out
    assert main(["rewards", "test", "math", "--on", "p.jsonl"]) == 0
    assert "own answer as Answer: X: 3 of 3 right\n" in capsys.readouterr().out

    assert main(["rewards", "new", "mine", "--dir", "new"]) == 0
    assert "python -m pytest new/test_mine.py" in capsys.readouterr().out
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "new/test_mine.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
