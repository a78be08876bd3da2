"""Writes a new plug-in and its test: a reward that passes its audit, or an environment."""

import keyword
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.files import write_text

REWARD = '''\
"""The reward `{name}`: what it pays for, in one sentence. Change it to what you want."""

from posttrain.records import RewardResult

REQUIRES = {{"{name}": ["answer"]}}  # fields that a row must have


def {name}(rollout, row, marker="Answer:"):
    """1 if the reply ends its turn, and its last line is the only one with the marker, and then has the row's answer.

    marker: the text that announces the answer. An exception here leaves the reply without a score; return 0 only for a
    reply that is wrong.
    """
    if rollout.finish_reason != "stop":
        return RewardResult(0.0, reason="cut off")
    lines = rollout.text.strip().splitlines()
    if rollout.text.count(marker) != 1 or not lines[-1].startswith(marker):
        return RewardResult(0.0, reason="not one answer, on the last line")
    said = lines[-1].removeprefix(marker).strip()
    return RewardResult(1.0) if said == str(row.answer).strip() else RewardResult(0.0, reason="wrong")
'''

REWARD_TEST = '''\
"""The reward `{name}`: right replies get 1 and wrong ones 0. Add every reply that ever got the wrong verdict."""

from pathlib import Path

import pytest

from posttrain.records import Message, Row
from posttrain.reward_tools.trial import reply_to
from posttrain.scoring.plugins.lookup import load_reward

REWARD = load_reward(str(Path(__file__).with_name("{name}.py")) + ":{name}")
ROW = Row("r1", "math", (Message("user", "What is 2 + 2?"),), "4")


@pytest.mark.parametrize("text", ["Answer: 4", "Two and two are four.\\nAnswer: 4"])
def test_right(text):
    assert REWARD(reply_to(ROW, text), ROW).value == 1.0


@pytest.mark.parametrize(
    "text",
    ["", ":", "Answer:", "4", "Answer: 5", "Answer: 4 or 5", "Answer: 4\\nAnswer: 5", "Answer: 44", "What is 2 + 2?"],
)
def test_wrong(text):
    assert REWARD(reply_to(ROW, text), ROW).value == 0.0


def test_cut_off():
    assert REWARD(reply_to(ROW, "Answer: 4", is_whole=False), ROW).value == 0.0
'''


ENVIRONMENT = '''\
"""The environment `{name}`: what the policy meets in it, in one sentence. Change it to what you want."""

from posttrain.records import RewardResult

REQUIRES = {{"{name}": ["answer"]}}  # fields that a row must have


async def {name}(session, row, max_turns=3):
    """Let the policy try again after a wrong answer; 1 for a right answer at once, and less for each further turn.

    max_turns: how many turns the policy has at most. An exception here leaves the episode without a score; return 0
    only for an episode that went wrong.
    """
    for number in range(1, max_turns + 1):
        turn = await session.sample()
        if turn.finish_reason != "stop":
            return RewardResult(0.0, reason="cut off")
        if turn.text.strip() == str(row.answer).strip():
            return RewardResult(1.0 / number)
        await session.add("user", "That is wrong. Give the answer alone.")
    return RewardResult(0.0, reason=f"no right answer in {{max_turns}} turns")
'''

ENVIRONMENT_TEST = '''\
"""The environment `{name}`: what it says to the policy, and what it pays. Add every episode that ever went wrong."""

from pathlib import Path

import pytest

from posttrain.episodes.rehearsal import rehearse
from posttrain.episodes.wire import PolicyTurn
from posttrain.records import Message, Row

NAME = str(Path(__file__).with_name("{name}.py")) + ":{name}"
ROW = Row("r1", "math", (Message("user", "What is 2 + 2?"),), "4")


@pytest.mark.parametrize(("said", "reward"), [(["4"], 1.0), (["5", "4"], 0.5), (["5", "6", "7"], 0.0), (["5"], 0.0)])
def test_reward(said, reward):
    assert rehearse(NAME, ROW, said).result.value == reward


def test_what_the_policy_is_told():
    told = rehearse(NAME, ROW, ["5", "4"]).messages[2]
    assert (told.role, told.text) == ("user", "That is wrong. Give the answer alone.")


def test_cut_off():
    assert rehearse(NAME, ROW, [PolicyTurn("4", finish_reason="length")]).result.value == 0.0
'''

TEMPLATES = {"reward": (REWARD, REWARD_TEST), "environment": (ENVIRONMENT, ENVIRONMENT_TEST)}


def write_plugin(name: str, folder: Path, kind: str = "reward") -> list[Path]:
    """Write NAME.py and test_NAME.py into the folder; returns their paths.

    kind: reward or environment. Raises ConfigError for a name that is no Python name, and for files that are there
    already.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError("NAME", [f"got {name!r}; it must be a Python name, such as polite_and_right"])
    plugin, test = TEMPLATES[kind]
    files = {folder / f"{name}.py": plugin, folder / f"test_{name}.py": test}
    if there := [str(path) for path in files if path.exists()]:
        raise ConfigError("NAME", [f"{', '.join(there)}: exists already; choose another name or --dir"])
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--dir", [f"got {str(folder)!r}: is a file; give a folder"])
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_text(path, text.format(name=name))
    return list(files)
