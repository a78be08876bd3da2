"""Finds the places where a reply states its answer: in a box, in a tag, or after words such as "answer is"."""

import re

from .doubts import TAKEN_BACK, is_asked, is_doubted

_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(r"<(?:think|thinking|thought|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE)
_CLOSE = re.compile(r"\A.*</(?:think|thinking|thought|reasoning)>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed?(?![A-Za-z])\s*")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_FOREIGN = "Antwort|Réponse|Respuesta|Risposta|Resposta|Ответ|答案|答え|정답"
MARK = re.compile(
    rf"(?:\banswers?\b[*_ ]*(?:\s+(?:is|are|equals|must be|would be|should be|seems to be)\b|\s*[:=：])"
    rf"|\b(?:{_FOREIGN})\b[*_ ]*\s*[:：]|(?:答案|答え|정답)\s*[:：]|####)[*_ \t]*[:：]?[*_ \t]*",
    re.IGNORECASE,
)

# What may stand between two marks without being an answer: "Final answer: The final answer is 4".
_LEADING = re.compile(r"(?:(?:so|thus|therefore|hence|the|my|our|final|correct|right)\b[\s,:*_]*)+", re.IGNORECASE)


def without_reasoning(text: str) -> str:
    """The text without the reasoning in `<think>`, even if that block never ends. Reasoning states no answer."""
    text = _THOUGHT.sub("\n", text)
    return _OPEN.sub("", _CLOSE.sub("", text))


def boxes(text: str) -> list[str]:
    """The contents of each outermost `\\boxed{...}` and `\\fbox{...}`, braces counted; of `\\boxed 12` the word.

    A box that is taken back, doubted or asked for, as in `\\boxed{4} is wrong` or `\\boxed{4}?`, states nothing.
    """
    found, place = [], 0
    while match := _BOX.search(text, place):
        place = match.end()
        if not text.startswith("{", place):
            word = re.match(r"[^\s$.,;]+(?:\.\d+)?", text[place:])
            if word and match[0].endswith(" ") and not _is_withheld(text, match.start(), place + word.end()):
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
    return [content.strip() for content in _TAG.findall(text)]


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
    return max((match.end() for pattern in (_BOX, _TAG, MARK) for match in pattern.finditer(text)), default=0)
