"""The scorers of reasoning-gym as a reward, for rows that its generators made (`posttrain.data.generated`).

It runs in an interpreter that has the package: `posttrain environments install reasoning_gym`.
"""

import json
from functools import cache
from typing import Any

from posttrain.records import RewardResult, Rollout, Row

REQUIRES = {"score": ["reasoning_gym"]}
PACKAGES = ["reasoning-gym==0.1.25"]  # what `posttrain environments install reasoning_gym` installs


def score(rollout: Rollout, row: Row, *, marker: str = "") -> RewardResult:
    """What the generator's own scorer gives for the answer, between 0 and 1.

    marker: the text after which the answer stands, such as "Answer:"; "" takes the text between <answer> tags, or the
    whole reply if there are none.
    """
    from reasoning_gym.utils import extract_answer  # pyright: ignore[reportMissingImports]

    said = rollout.text
    answer = said.rpartition(marker)[2] if marker else (extract_answer(said) or said)
    made = row.fields["reasoning_gym"]
    data = _dataset(made["dataset"], made["size"], made["seed"], settings=json.dumps(made["settings"], sort_keys=True))
    return RewardResult(float(data.score_answer(answer.strip(), data[made["index"]])))


def warm_up() -> None:
    """Import the package, which takes seconds, before the first reply has a deadline."""
    import reasoning_gym  # noqa: F401


@cache
def _dataset(name: str, size: int, seed: int, *, settings: str) -> Any:
    import reasoning_gym

    create: Any = vars(reasoning_gym)["create_dataset"]
    return create(name, size=size, seed=seed, **json.loads(settings))
