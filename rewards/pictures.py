"""Rewards for questions about pictures: a box, a point, a count, which picture, a value of a chart, a document's text.

The answer is taken from what the reply states: a box (`\\boxed{}`), `<answer>`, the rest of the line after "answer:" or
"answer is", else the last line. A reply that states different answers gets 0. Coordinates are in the units of the row's
answer. Not here: choices that are texts (`multiple_choice`), and looking at the picture.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.records import RewardResult, Rollout, Row

from .stated import boxes, marked, prose, tagged

REQUIRES = {
    "grounding": ["answer"],
    "point_in_box": ["answer"],
    "counting": ["answer"],
    "which_picture": ["answer"],
    "relaxed_accuracy": ["answer"],
    "anls": ["answer"],
}
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_LIST = re.compile(rf"{_NUMBER}(?:\s*[,;]\s*{_NUMBER})+")
_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_WORDS = {word: number for number, word in enumerate(_NAMES.split())}
_RANKS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
_PLACES = {**_WORDS, **{word: place for place, word in enumerate(_RANKS.split(), 1)}}
_OTHER = "|".join(word for word in _PLACES if word != "one")  # "the second one" names one picture
_WHICH = re.compile(
    rf"(?<![\w.])(\d+)(?:st|nd|rd|th)?(?![\w.]*\w)|\b({_OTHER})\b|(?:\b(?:picture|image|number)|^)\W*\b(one)\b",
    re.IGNORECASE,
)
_COUNT = re.compile(rf"(?<![\w.]){_NUMBER}(?![\w.]*\d)|\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)


def grounding(rollout: Rollout, row: Row, min_iou: float | None = None) -> RewardResult:
    """The intersection over union of the stated box [x1, y1, x2, y2] and the row's; with `min_iou` 1 from there on.

    Raises ValueError if the row's answer is no box.
    """
    gold = _box_of(row)
    said = _only(set(_lists(rollout.text, 4)))
    if said is None:
        return RewardResult(0.0, reason="not one stated box")
    if not _is_box(said):
        return RewardResult(0.0, reason="the corners of the box are out of order")
    overlap = _iou(said, gold)
    value = overlap if min_iou is None else float(overlap >= min_iou)
    return RewardResult(value, {"iou": overlap}, "" if value else "wrong")


def point_in_box(rollout: Rollout, row: Row) -> RewardResult:
    """1 if the stated point (x, y) lies in the row's box [x1, y1, x2, y2], its edges included.

    Raises ValueError if the row's answer is no box.
    """
    x1, y1, x2, y2 = _box_of(row)
    said = _only(set(_lists(rollout.text, 2)))
    if said is None:
        return RewardResult(0.0, reason="not one stated point")
    inside = x1 <= said[0] <= x2 and y1 <= said[1] <= y2
    return RewardResult(float(inside), reason="" if inside else "outside")


def counting(rollout: Rollout, row: Row, *, partial: bool = False) -> RewardResult:
    """1 if the stated number, in digits or as a word up to twenty, is the row's. partial: else 1 - |error| / answer, at
    least 0. Raises ValueError if the row's answer is no number."""
    gold = _number(row.answer)
    if gold is None:
        raise ValueError(f"row {row.id}: its answer {row.answer!r} is not a number")
    found = [_COUNT.findall(statement) for statement in _statements(rollout.text)]
    said = _only({value for words in found for word in words[:1] if (value := _number(word)) is not None})
    if said is None or any(len({_number(word) for word in words}) > 1 for words in found):
        return RewardResult(0.0, reason="not one stated number")
    if said == gold:
        return RewardResult(1.0)
    near = max(0.0, 1 - abs(said - gold) / abs(gold)) if partial and gold else 0.0
    return RewardResult(near, reason="wrong")


def which_picture(rollout: Rollout, row: Row) -> RewardResult:
    """1 if the reply names the right one of the prompt's pictures and no other: "2", "picture two", "the 2nd one".

    The row's answer is the picture's number, from 1. Raises ValueError for one that is no picture of the prompt. For
    pictures with letters there is `multiple_choice`.
    """
    shown, gold = len(rollout.prompt.media), _number(row.answer)
    if gold is None or gold not in range(1, shown + 1):
        raise ValueError(f"row {row.id}: its answer {row.answer!r} is not the number of one of {shown} pictures")
    said = _only({place for statement in _statements(rollout.text) for place in _places(statement)})
    if said is None:
        return RewardResult(0.0, reason="not one picture is named")
    return RewardResult(float(said == gold), reason="" if said == gold else "wrong")


def _places(statement: str) -> Iterable[int]:
    for digits, word, one in _WHICH.findall(statement):
        yield int(digits) if digits else _PLACES[(word or one).casefold()]


def relaxed_accuracy(rollout: Rollout, row: Row, tolerance: float = 0.05) -> RewardResult:
    """1 if the stated value is within `tolerance`, as a share of the row's number; a text must be equal without case.

    A percentage counts as its hundredth. Source: ChartQA (arXiv 2203.10244), section 5.1.
    """
    said = _only({_plain(statement) for statement in _statements(rollout.text)})
    if said is None:
        return RewardResult(0.0, reason="not one stated answer")
    for gold in _accepted(row):
        wanted, value = _number(gold), _number(said)
        if wanted is None or value is None:
            right = _plain(gold) == said
        else:
            right = abs(value - wanted) <= tolerance * abs(wanted)
        if right:
            return RewardResult(1.0)
    return RewardResult(0.0, reason="wrong")


def anls(rollout: Rollout, row: Row, threshold: float = 0.5) -> RewardResult:
    """1 minus the normalised edit distance of the stated text and the nearest of the row's answers; 0 from `threshold`.

    Case and runs of spaces do not count. Source: average normalised Levenshtein similarity, ST-VQA (arXiv 1905.13648).
    """
    said = _only({_plain(statement) for statement in _statements(rollout.text)})
    if said is None:
        return RewardResult(0.0, reason="not one stated answer")
    distance = min(_distance(said, _plain(gold), threshold) for gold in _accepted(row))
    return RewardResult(1 - distance if distance < threshold else 0.0, reason="" if distance == 0 else "differs")


def _statements(text: str) -> list[str]:
    text = prose(text)
    found = [part for part in (*boxes(text), *tagged(text)) if part.strip()]
    found = found or [part.split("\n")[0] for part in marked(text)]
    lines = [line for line in text.splitlines() if line.strip()]
    return found or lines[-1:]


def _lists(text: str, length: int) -> Iterable[tuple[float, ...]]:
    """The lists of so many numbers in what a reply states."""
    for statement in _statements(text):
        for match in _LIST.finditer(statement):
            numbers = tuple(map(float, re.findall(_NUMBER, match[0])))
            if len(numbers) == length:
                yield numbers


def _only(found: set[Any]) -> Any:
    return next(iter(found)) if len(found) == 1 else None


def _box_of(row: Row) -> tuple[float, ...]:
    answer = row.answer
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            answer = None
    box = tuple(answer) if isinstance(answer, list | tuple) else ()
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in box) or not _is_box(box):
        raise ValueError(f"row {row.id}: its answer {row.answer!r} is not a box [x1, y1, x2, y2] with x1 < x2, y1 < y2")
    return box


def _is_box(box: Sequence[float]) -> bool:
    return len(box) == 4 and box[0] < box[2] and box[1] < box[3]


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    text = _plain(str(value)).lstrip("$€£").replace(",", "")
    if text in _WORDS:
        return float(_WORDS[text])
    share = text.endswith("%")
    text = text.rstrip("% ")
    if not re.fullmatch(_NUMBER, text):
        return None
    return float(text) / 100 if share else float(text)


def _accepted(row: Row) -> list[object]:
    """The row's answers: those of a list, else its only one. Raises ValueError without any."""
    found = row.answer if isinstance(row.answer, list | tuple) else [row.answer]
    if not (found := [answer for answer in found if answer is not None]):
        raise ValueError(f"row {row.id} has no answer to compare with")
    return found


def _plain(text: object) -> str:
    return " ".join(str(text).split()).strip(" *_$`\"'").removesuffix(".").casefold()


def _distance(a: str, b: str, threshold: float) -> float:
    """The edit distance of two texts divided by the length of the longer one; 1 for lengths that differ too much."""
    longest = max(len(a), len(b))
    if not longest:
        return 0.0
    if abs(len(a) - len(b)) >= threshold * longest:
        return 1.0
    before = list(range(len(b) + 1))
    for row, left in enumerate(a, 1):
        now = [row]
        for column, right in enumerate(b, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (left != right)))
        before = now
    return before[-1] / longest
