"""Finds the places where a reply states its answer: in a box, in a tag, or after words such as "answer is"."""

import json
import re
from itertools import chain, islice

from .doubts import TAKEN_BACK, is_asked, is_doubted

_REASONING = re.compile(r"<(/?)(think|thinking|thought|reasoning)>", re.IGNORECASE)
MOST = 500  # boxes and marks in a reply
_SIGNS = re.compile(r"[\W_]{81,}")  # so many signs in a row belong to no answer
_BOX = re.compile(r"\\f?boxed?(?![A-Za-z])\s*")
_WORD = re.compile(r"[^\s$.,;]+(?:\.\d+)?")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_FOREIGN = "Antwort|Lösung|Ergebnis|Réponse|Respuesta|Risposta|Resposta|Ответ"
MARK = re.compile(
    rf"(?:\banswers?\b[*_ ]*(?:\s+(?:is|are|equals|must be|would be|should be|seems to be)\b|\s*(?:[:=：→⇒]|->))"
    rf"|\b(?:{_FOREIGN})\b[*_ ]*(?:\s*[:：]|\s+(?:(?:finale?|correct[ea]|corretta)\s+)?(?:ist|lautet|est|es|è|é)\b)"
    rf"|(?:答案|答え|정답)\s*(?:[:：是为は은는])|####)[*_ \t]*[:：]?[*_ \t]*",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]{0,3}(?:`{3,}|~{3,})[ \t]*\w{0,20}[ \t]*\r?$", re.MULTILINE)
_HTML = re.compile(r"<(b|strong|i|em|u|mark|code|kbd|span)>([^<>]{0,200})</\1>", re.IGNORECASE)
_ANSWER_KEYS = ("answer", "final_answer", "final answer")
_LONGEST_JSON = 20_000

# What may stand between two marks without being an answer: "Final answer: The final answer is 4".
_LEADING = re.compile(r"(?:(?:so|thus|therefore|hence|the|my|our|final|correct|right)\b[\s,:*_]*)+", re.IGNORECASE)


def without_reasoning(text: str) -> str:
    """The text without the reasoning in `<think>`, even if that block never ends. Reasoning states no answer."""
    tags = list(_REASONING.finditer(text))
    closed: dict[str, int] = {}  # of each name, where the next closing tag ends
    ends = [0] * len(tags)
    for number in reversed(range(len(tags))):
        name = tags[number][2].lower()
        if tags[number][1]:
            closed[name] = number
        ends[number] = closed.get(name, -1)
    parts, place, left = [], 0, []
    for number, tag in enumerate(tags):
        if tag.start() < place:
            continue  # inside a block
        if not tag[1] and ends[number] >= 0:
            parts += [text[place : tag.start()], "\n"]
            place = tags[ends[number]].end()
        else:
            left.append(tag)
    text = "".join([*parts, text[place:]])
    return _outside(text) if left else text


def prose(text: str) -> str:
    """The text without its reasoning, without fences and tags of style, and of a JSON object only its answer.

    Only both ends are left of a long run of signs, so patterns that skip signs take a time that grows with the length
    of the text and no faster.
    """
    text = _HTML.sub(r"\2", _FENCE.sub("", without_reasoning(text)))
    return _SIGNS.sub(lambda run: run[0][:40] + run[0][-40:], _from_json(text))


def _from_json(text: str) -> str:
    """The answer that a reply states as a JSON object, as text; any other text as it is."""
    stripped = text.strip()
    if not (stripped.startswith("{") and stripped.endswith("}")) or len(stripped) > _LONGEST_JSON:
        return text
    try:
        pairs = json.loads(stripped, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return text
    found = [value for key, value in pairs if key.strip().casefold() in _ANSWER_KEYS]
    return f"Answer: {found[0]}" if len(found) == 1 and isinstance(found[0], str | int | float) else text


def _outside(text: str) -> str:
    """The text after the last closing tag of reasoning that was not opened, and before the first that is not closed."""
    last = max((tag.end() for tag in _REASONING.finditer(text) if tag[1]), default=0)
    first = next((tag.start() for tag in _REASONING.finditer(text, last) if not tag[1]), len(text))
    return text[last:first]


def states_too_often(text: str) -> bool:
    """Whether there are more than `MOST` boxes and marks: a reply that repeats answers without end states none."""
    found = chain(_BOX.finditer(text), MARK.finditer(text))
    return next(islice(found, MOST, None), None) is not None


def boxes(text: str) -> list[str]:
    """The contents of each outermost `\\boxed{...}` and `\\fbox{...}`, braces counted; of `\\boxed 12` the word.

    A box that is taken back, doubted or asked for, as in `\\boxed{4} is wrong` or `\\boxed{4}?`, states nothing.
    """
    found, place = [], 0
    while match := _BOX.search(text, place):
        place = match.end()
        if not text.startswith("{", place):
            word = _WORD.match(text, place)
            if word and match[0].endswith(" ") and not _is_withheld(text, match.start(), word.end()):
                found.append(word[0])
            continue
        depth, start = 1, place + 1
        place = start
        while place < len(text) and depth:
            depth += 0 if text[place - 1] == "\\" else {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if not depth and not _is_withheld(text, match.start(), place):
            found.append(text[start : place - 1])
    return found


def _is_withheld(text: str, start: int, end: int) -> bool:
    return is_doubted(text, start) or is_asked(text, end) or TAKEN_BACK.match(text, end) is not None


def tagged(text: str) -> list[str]:
    """The contents of each `<answer>...</answer>`."""
    return [text[start:end].strip() for start, end in _tags(text)]


def _tags(text: str) -> list[tuple[int, int]]:
    """The place of the contents of each `<answer>...</answer>`."""
    found, start = [], -1
    for tag in _TAG.finditer(text):
        if not tag[1] and start < 0:
            start = tag.end()
        elif tag[1] and start >= 0:
            found.append((start, tag.start()))
            start = -1
    return found


def marked(text: str) -> list[str]:
    """The text after each mark, up to the next mark: the rest of its line, or if that is empty the next lines.

    A mark that is doubted, as in "perhaps the answer is", marks nothing.
    """
    found = []
    marks = list(MARK.finditer(text))
    for number, mark in enumerate(marks):
        end = marks[number + 1].start() if number + 1 < len(marks) else len(text)
        rest = text[mark.end() : end].strip()
        if rest and not _LEADING.fullmatch(rest) and not is_doubted(text, mark.start()):
            found.append(rest)
    return found


def end_of_marks(text: str) -> int:
    """The place after the last box, tag or mark; 0 without any. What follows may take the answer back."""
    tags = [text.index(">", end) + 1 for _, end in _tags(text)]
    return max((*tags, *(match.end() for pattern in (_BOX, MARK) for match in pattern.finditer(text))), default=0)
