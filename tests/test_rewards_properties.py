"""Every built-in reward of an answer gives its own gold 1 and each corruption of it 0, on 500 generated rows."""

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_records import one_turn

from posttrain.records import Message, Rollout, Row
from posttrain.rewards.coding import code
from posttrain.rewards.constraints import CONSTRAINTS
from posttrain.rewards.exact_match import exact_match
from posttrain.rewards.final_answer import final_answer
from posttrain.rewards.instructions import instructions
from posttrain.rewards.mathematics import math
from posttrain.rewards.multiple_choice import multiple_choice
from posttrain.rewards.valid_json import valid_json

ROWS = settings(max_examples=500, derandomize=True, deadline=None, database=None)
WORDS = st.text("bcdfghklmnprstvwz", min_size=3, max_size=9)
LEAVES = st.none() | st.booleans() | st.integers(-99, 99) | st.text("xyz ", max_size=4)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))


def reply(text: str) -> Rollout:
    return one_turn("p", "g", 0, (1, 2), (3,), text, (0.0,), (), "stop")


def row(answer: Any = None, **fields: Any) -> Row:
    return Row("r1", "any", (Message("user", "?"),), answer, fields)


def latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    value = abs(value)
    return sign + (str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}")


@ROWS
@given(st.fractions(max_denominator=500).filter(lambda value: abs(value) < 10**9), st.integers(1, 50))
def test_numbers_and_their_corruptions_under_math(value: Fraction, step: int) -> None:
    gold = latex(value)
    assert math(reply(rf"So \boxed{{{gold}}}."), row(gold)).value == 1.0
    assert math(reply(f"The answer is {value}."), row(gold)).value == 1.0
    wrong = [
        latex(value + Fraction(1, step)),
        gold + r"\sqrt(2)",
        gold + ")(7",
        gold + r"\foo",
        gold + r" \text{ or } 7",
    ]
    wrong += [gold + "+i", gold + r"\mathrm{x}"] if value else []
    for text in wrong:
        assert math(reply(rf"So \boxed{{{text}}}."), row(gold)).value == 0.0, text


@ROWS
@given(st.integers(-40, 40), st.integers(1, 40), st.sampled_from(["()", "[]", "[)", "(]"]))
def test_intervals_and_their_corruptions_under_math(low: int, width: int, kind: str) -> None:
    high = low + width
    gold = f"{kind[0]}{low},{high}{kind[1]}"
    less = {"(": "<", "[": r"\le", ")": "<", "]": r"\le"}
    condition = f"{low} {less[kind[0]]} x {less[kind[1]]} {high}"
    french = f"{']' if kind[0] == '(' else '['}{low};{high}{'[' if kind[1] == ')' else ']'}"
    for text in (gold, condition, french, rf"\{{x \mid {condition}\}}"):
        assert math(reply(rf"\boxed{{{text}}}"), row(gold)).value == 1.0, text
    other = f"{'[' if kind[0] == '(' else '('}{low},{high}{kind[1]}"
    for text in (other, f"{kind[0]}{low},{high + 1}{kind[1]}", condition.replace("x", "x + 1")):
        assert math(reply(rf"\boxed{{{text}}}"), row(gold)).value == 0.0, text


@ROWS
@given(st.integers(2, 10), st.data())
def test_choices_and_their_corruptions_under_multiple_choice(count: int, data: st.DataObject) -> None:
    letters = "ABCDEFGHIJ"[:count]
    gold = data.draw(st.sampled_from(letters))
    other = data.draw(st.sampled_from([letter for letter in letters if letter != gold]))
    choices = [f"choice {letter.lower()}" for letter in letters]
    for form in (
        "{}",
        "({})",
        "**{}**",
        "Answer: {}",
        "The answer is **({})**.",
        r"\boxed{{\text{{{}}}}}",
        "<answer>{}</answer>",
    ):
        assert multiple_choice(reply(form.format(gold)), row(gold, choices=choices)).value == 1.0, form
        assert multiple_choice(reply(form.format(other)), row(gold, choices=choices)).value == 0.0, form
    both = f"Answer: {gold} or {other}"
    assert multiple_choice(reply(both), row(gold, choices=choices)).value == 0.0


@ROWS
@given(WORDS | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(), WORDS)
def test_texts_and_their_corruptions_under_exact_match(gold: Any, other: str) -> None:
    assert exact_match(reply(f"So:\n{gold}"), row(gold)).value == 1.0
    assert final_answer(reply(f"Answer: {gold}"), row(gold)).value == 1.0
    for text in (f"{gold}{other}", f"{other} {gold}", "", "None"):
        assert exact_match(reply(text), row(gold)).value == 0.0
        assert final_answer(reply(f"Answer: {text}"), row(gold)).value == 0.0


@ROWS
@given(VALUES.filter(lambda value: value is not None and not isinstance(value, str)))
def test_values_and_their_corruptions_under_valid_json(gold: Any) -> None:
    text = json.dumps(gold)
    for form in ("{}", "```json\n{}\n```", "```sh\nls\n```\n~~~json\r\n{}\r\n~~~"):
        assert valid_json(reply(form.format(text)), row(gold)).value == 1.0, form
    swapped = json.dumps(swap(gold))
    for wrong in (f"[{text}]", text + ",", "NaN", *([swapped] if swapped != text else [])):
        assert valid_json(reply(wrong), row(gold)).value == 0.0, wrong


def swap(value: Any) -> Any:
    """The value with true as 1 and 1 as true, at any depth."""
    if isinstance(value, dict):
        return {key: swap(item) for key, item in value.items()}
    if isinstance(value, list):
        return [swap(item) for item in value]
    return {True: 1, False: 0}[value] if isinstance(value, bool) else value


KEPT: dict[str, tuple[Any, str, str]] = {
    "max_words": (3, "{0} {1}", "{0} {1} {0} {1}"), "min_words": (2, "{0} {1}", "{0}"),
    "max_sentences": (1, "{0}.", "{0}. {1}."), "min_sentences": (2, "{0}. {1}.", "{0}."),
    "max_chars": (30, "{0}", "{0} " * 12), "min_chars": (20, "{0} " * 9, "{0}"),
    "num_lines": (2, "{0}\n{1}", "{0}"), "num_paragraphs": (2, "{0}\n\n{1}", "{0}\n{1}"),
    "paragraph_starts_with": ({"2": "so"}, "{0}\n\nSo {1}", "so {0}\n\n{1}"),
    "num_sections": (1, "# {0}\n{1}", "{0}"), "bullet_count": (2, "- {0}\n* {1}", "- {0}"),
    "min_highlights": (1, "**{0}**", "{0}"), "min_placeholders": (1, "[{0}]", "{0}"),
    "must_include": ("a e", "{0} a e", "{0}"), "forbid": ("a", "{0}", "{0} a"),
    "one_of": (["a!", "e!"], "{0} e!", "{0}"),
    "min_occurrences": ({"a": 2}, "a {0} A", "a {0}"), "max_occurrences": ({"a": 1}, "a {0}", "a a {0}"),
    "min_letter": ({"a": 2}, "aa{0}", "a{0}"), "max_letter": ({"a": 1}, "a{0}", "aa{0}"),
    "lowercase": (True, "{0}", "A{0}"), "uppercase": (True, "A E", "A {0}"),
    "min_capital_words": (1, "{0} AE", "{0}"), "max_capital_words": (0, "{0}", "{0} AE"),
    "no_commas": (True, "{0} {1}", "{0}, {1}"), "title": (True, "<<{0}>>\n{1}", "{0}"),
    "postscript": ("P.S.", "{0}\nP.S. {1}", "{0}"), "json": (True, '["{0}"]', "{0}"), "quoted": (True, '"{0}"', "{0}"),
    "num_responses": (2, "{0} one\n******\n{1}", "{0}"), "repeats_first": ("Why?", "Why? {0}", "{0}"),
    "starts_with": ("Dear", "Dear {0}", "{0}"), "ends_with": ("bye", "{0} bye", "{0} bye {1}"),
}  # fmt: skip


@ROWS
@given(st.sampled_from(sorted(CONSTRAINTS)), WORDS, WORDS)
def test_replies_and_their_corruptions_under_instructions(name: str, one: str, other: str) -> None:
    value, kept, broken = KEPT[name]
    for loose in (False, True):
        assert instructions(reply(kept.format(one, other)), row(constraints={name: value}), loose=loose).value == 1.0
    assert instructions(reply(broken.format(one, other)), row(constraints={name: value})).value == 0.0


def test_loose_forgives_a_line_around_the_answer() -> None:
    asked = row(constraints={"starts_with": "Dear"})
    assert instructions(reply("Here it is:\nDear you"), asked).value == 0.0
    assert instructions(reply("Here it is:\nDear you"), asked, loose=True).value == 1.0


@pytest.mark.slow
def test_code_on_500_rows() -> None:
    """One program with 500 functions, so that the sandbox starts three times."""
    program = "\n".join(f"def f{number}(x):\n    return x * {number} + {number % 7}" for number in range(500))
    tests = [{"call": f"f{number}(3)", "expected": 3 * number + number % 7} for number in range(500)]
    wrong = [{**test, "expected": test["expected"] + 1} for test in tests]
    fenced = reply(f"```python\n{program}\n```")
    assert code(fenced, row(tests=tests)).value == 1.0
    assert code(fenced, row(tests=wrong), partial=True).value == 0.0
    assert code(fenced, row(tests=[*tests[:-1], wrong[-1]])).value == 0.0
