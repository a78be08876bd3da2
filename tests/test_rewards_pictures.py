"""Rewards for questions about pictures, with values worked out by hand, and replies that hedge."""

import pytest

from posttrain.records import FinishReason, Media, Message, Prompt, Rollout, Row
from posttrain.rewards.pictures import anls, counting, grounding, point_in_box, relaxed_accuracy, which_picture
from posttrain.scoring.plugins.lookup import RewardSpec
from posttrain.scoring.plugins.requirements import required_fields


def reply(text: str) -> Rollout:
    return Rollout("p", "g", 0, Prompt((Message("user", "?"),), ()), (), text, FinishReason.STOP)


def row(answer: object) -> Row:
    return Row("p", "image", (Message("user", "?"),), answer)


BOX = [10, 10, 20, 30]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The box is [10, 10, 20, 30]", 1.0),
        ("Answer: (10, 20, 20, 40)", 100 / 300),
        ("<answer>[15.0, 10, 25, 30]</answer>", 100 / 300),
        ("\\boxed{[100, 100, 110, 110]}", 0.0),
        ("Answer: [20, 30, 10, 10]", 0.0),  # corners out of order
        ("Answer: [10, 10, 20, 30] or [0, 0, 5, 5]", 0.0),
        ("Answer: [10, 10, 20]", 0.0),
        ("<think>[10, 10, 20, 30]</think> I see no box", 0.0),
        ("", 0.0),
    ],
)
def test_a_box_is_paid_by_its_overlap(text, value):
    assert grounding(reply(text), row(BOX)).value == pytest.approx(value)
    assert grounding(reply(text), row(str(BOX)), min_iou=0.3).value == float(value >= 0.3)


@pytest.mark.parametrize("answer", [None, "no", [1, 2, 3], [5, 5, 1, 9], [True, 0, 2, 2], {"x": 1}])
def test_an_answer_that_is_no_box_is_an_error_of_the_row(answer):
    with pytest.raises(ValueError, match=r"is not a box"):
        grounding(reply("[1, 2, 3, 4]"), row(answer))


@pytest.mark.parametrize(
    ("text", "value"),
    [("(15, 20)", 1.0), ("Answer: 10, 30", 1.0), ("(9.9, 20)", 0.0), ("(15, 20), (1, 1)", 0.0), ("15", 0.0)],
)
def test_a_point_in_the_box(text, value):
    assert point_in_box(reply(text), row(BOX)).value == value


@pytest.mark.parametrize(
    ("text", "exact", "partial"),
    [
        ("There are 4 dots. Answer: 4", 1.0, 1.0),
        ("Answer: four", 1.0, 1.0),
        ("I count\n4 red dots", 1.0, 1.0),
        ("Answer: 5", 0.0, 0.75),
        ("Answer: 12", 0.0, 0.0),
        ("Answer: 4 or 5", 0.0, 0.0),
        ("Answer: 4\nAnswer: 5", 0.0, 0.0),
        ("many", 0.0, 0.0),
    ],
)
def test_a_count(text, exact, partial):
    assert counting(reply(text), row("4")).value == exact
    assert counting(reply(text), row(4), partial=True).value == pytest.approx(partial)


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("Answer: 104", 100, 1.0),
        ("Answer: 105.1", 100, 0.0),
        ("Answer: 1,050", "1000", 1.0),
        ("Answer: 25%", "0.25", 1.0),
        ("Answer: 25%", "25", 0.0),
        ("Answer: Brazil.", "brazil", 1.0),
        ("Answer: Chile", ["Brazil", "chile"], 1.0),
        ("Answer: 0", 0, 1.0),
        ("Answer: 0.001", 0, 0.0),
        ("Answer: 100\nAnswer: 90", 100, 0.0),
    ],
)
def test_a_value_read_off_a_chart(text, answer, value):
    assert relaxed_accuracy(reply(text), row(answer)).value == value


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("Answer: Invoice 42", "invoice  42", 1.0),
        ("Answer: abcd", "abcf", 0.75),
        ("Answer: abxy", "abcd", 0.0),  # a distance of one half
        ("Answer: abcd", ["zzzz", "abcd"], 1.0),
        ("Answer: a long answer that holds abcd", "abcd", 0.0),
    ],
)
def test_a_text_of_a_document(text, answer, value):
    assert anls(reply(text), row(answer)).value == pytest.approx(value)


def shown(text: str, pictures: int = 3) -> Rollout:
    media = tuple(Media(f"file#{number}") for number in range(pictures))
    return Rollout("p", "g", 0, Prompt((Message("user", "?"),), (), media), (), text, FinishReason.STOP)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer: 2", 1.0),
        ("The first has three dots.\nAnswer: picture 2.", 1.0),
        ("It is the second one", 1.0),
        ("The 2nd picture differs", 1.0),
        ("<answer>Image two</answer>", 1.0),
        ("Answer: 1", 0.0),
        ("Answer: one", 0.0),
        ("Answer: 1 or 2", 0.0),
        ("Answer: 2\nAnswer: 3", 0.0),
        ("\\boxed{22}", 0.0),
        ("The one that differs", 0.0),
        ("<think>2</think>I cannot say", 0.0),
        ("", 0.0),
    ],
)
def test_the_picture_that_is_named(text, value):
    assert which_picture(shown(text), row(2)).value == value
    assert which_picture(shown(text), row("2")).value == value
    first = text.replace("2nd", "1st").replace("2", "1").replace("second", "first").replace("two", "one")
    assert which_picture(shown(first), row(1)).value >= value


@pytest.mark.parametrize("answer", [0, 4, "B", None, 1.5, True])
def test_an_answer_that_is_no_picture_is_an_error_of_the_row(answer):
    with pytest.raises(ValueError, match="is not the number of one of 3 pictures"):
        which_picture(shown("2"), row(answer))


@pytest.mark.parametrize("name", ["grounding", "point_in_box", "counting", "which_picture", "relaxed_accuracy", "anls"])
def test_the_fields_that_a_row_needs_are_read_without_running_the_reward(name):
    assert required_fields(RewardSpec(f"posttrain.rewards.pictures:{name}"), "image") == ["answer"]
