"""Built-in rewards on the tables of `reward_pairs/`: a line is a row's answer, a reply, and the right verdict."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_records import one_turn

from posttrain.records import Message, Row
from posttrain.scoring.plugins.lookup import load_reward

TABLES = Path(__file__).parent / "reward_pairs"


def lines(name: str) -> Iterator[dict[str, Any]]:
    for line in (TABLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def verdict(name: str, case: dict[str, Any]) -> float:
    row = Row("r1", "any", (Message("user", "?"),), case.get("answer"), case.get("fields", {}))
    rollout = one_turn("p", "g", 0, (1, 2), (3,), case["reply"], (0.0,), (), "stop")
    result = load_reward(name, case.get("args"))(rollout, row)
    return result.value  # type: ignore[union-attr]


NAMES = sorted(path.stem for path in TABLES.glob("*.jsonl"))
MARKS = {"code": [pytest.mark.slow]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in NAMES])
def test_every_pair_of_the_table(name: str) -> None:
    cases = list(lines(name))
    wrong = [case for case in cases if verdict(name, case) != case["right"]]
    assert len(cases) > 10
    assert not wrong
