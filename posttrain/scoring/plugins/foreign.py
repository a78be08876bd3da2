"""Recognises a reward that was written for another package by the names of its parameters, and says how to wrap it.

Some such functions can be called with (rollout, row) all the same, and would then score something else.
"""

import inspect
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Foreign:
    """How another package calls a reward. marks: parameters that tell it. values: what a call here gives each."""

    package: str
    marks: frozenset[str]
    values: dict[str, str]
    of_list: bool


FORMS = (
    Foreign(
        "TRL",
        frozenset({"completions", "prompts", "completion_ids"}),
        {
            "prompts": "[row.messages]",
            "completions": "[rollout.text]",
            "completion_ids": "[rollout.token_ids]",
            "answer": "[row.answer]",
            "answers": "[row.answer]",
            "solution": "[row.answer]",
            "ground_truth": "[row.answer]",
        },
        of_list=True,
    ),
    Foreign(
        "verl",
        frozenset({"solution_str", "data_source"}),
        {"data_source": "row.capability", "solution_str": "rollout.text", "ground_truth": "row.answer"},
        of_list=False,
    ),
)
CALLED_WITH = 2  # parameters given by place: rollout and row


def how_to_wrap(name: str, signature: inspect.Signature) -> str:
    """What package a reward was written for and the function that wraps it; "" for a reward of this package."""
    parameters = list(signature.parameters)
    for form in FORMS:
        if form.marks.isdisjoint(parameters[:CALLED_WITH]):
            continue
        given = ", ".join(f"{item}={form.values[item]}" for item in parameters if item in form.values)
        call = f"{name}({given})" + ("[0]" if form.of_list else "")
        return f"it has the parameters of a reward for {form.package}; wrap it: def reward(rollout, row): return {call}"
    return ""
