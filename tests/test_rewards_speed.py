"""The time of a built-in reward grows with the length of a reply, and no faster, however hostile the reply is.

Work is compared between a reply and one of four times its length, in CPU time of this thread: it is about 4 times as
much where it is proportional, and 16 times where it grows with the square. So no speed of a machine decides.
"""

import time
from contextlib import suppress

import pytest
from rollout_records import one_turn

from posttrain.records import Message, Row
from posttrain.scoring.plugins.lookup import load_reward

CONSTRAINTS = {
    "max_sentences": 3, "num_paragraphs": 1, "num_sections": 1, "bullet_count": 2, "min_highlights": 1, "title": True,
    "min_placeholders": 1, "postscript": "P.S.", "json": True, "num_responses": 2, "min_occurrences": {"a": 1},
}  # fmt: skip
FIELDS = {"multiple_choice": {"choices": ["p", "q"]}, "instructions": {"constraints": CONSTRAINTS}}
ANSWERS = {
    "math": "4",
    "multiple_choice": "B",
    "exact_match": "4",
    "final_answer": "4",
    "valid_json": {"a": 1},
    "instructions": None,
}
REPEATED = [
    "answer is ", "ANSWER:", "\\boxed{4} ", "\\boxed{", "<answer>", "<think>", "<think></think>", "```python\n", "\n",
    " \n", "*", "\\", "\\(", "$", "]", "{", "(", "1,", "maybe ", "unless I ", "A or ", "not ", "if i am ", "**B** ",
    ". ", "a.", ".", "[a ", "<<a ", "**a ", "- \n", "# ", "```\n",
]  # fmt: skip
SHORT = 2_000
FLOOR_S = 0.02  # less than this is not compared: it is too little to be measured
LIMIT = 9.0  # between 4 and 16


def work_s(name: str, text: str) -> float:
    rollout = one_turn("p", "g", 0, (1, 2), (3,), text, (0.0,), (), "stop")
    row = Row("r1", "any", (Message("user", "?"),), ANSWERS[name], FIELDS.get(name, {}))
    reward = load_reward(name, None)
    began = time.thread_time()
    with suppress(RecursionError):
        reward(rollout, row)
    return time.thread_time() - began


@pytest.mark.parametrize("name", ANSWERS)
def test_work_is_proportional_to_the_length_of_a_reply(name: str) -> None:
    work_s(name, "The answer is 4.")  # imports
    for unit in REPEATED:
        short, long = ("The answer is " + unit * (size // len(unit)) for size in (SHORT, 4 * SHORT))
        if work_s(name, long) < FLOOR_S:
            continue
        ratio = min(work_s(name, long) for _ in range(3)) / min(work_s(name, short) for _ in range(3))
        assert ratio < LIMIT, (unit, ratio)
