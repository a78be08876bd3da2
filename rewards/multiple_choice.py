"""Expects the letter of one of several choices. A reply that names two different letters as its answer gets 0."""

import json
import re
import unicodedata
from collections.abc import Mapping

from posttrain.records import RewardResult, Rollout, Row

from .doubts import is_asked, is_doubted, is_hedged, is_taken_back
from .stated import MARK, MOST, boxes, end_of_marks, prose, states_too_often, tagged

REQUIRES = {"multiple_choice": ["answer"]}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NEAR = 400  # characters after a mark in which the letter and what is said about it are looked for
_LONGEST = 4000  # characters of a last line in which an unmarked letter is looked for
_OPTION = re.compile(r"\b(?:option|choice|letter)\b[*_]{0,3}(?:\s+(?:is|would be)\b|\s*[:：])[\s:*]*", re.IGNORECASE)
_MACRO = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathsf|bf|rm)\b\s*")
_BEFORE = re.compile(
    r"(?:[\s*_$:({\[\"'`✅✔☑👉➡→⇒∴•★⭐🎯\ufe0f]|\\\(|\\\[|(?:the|correct|right|best|answer|option|choice|letter|therefore|thus|clearly|indeed|"
    r"simply|definitely|probably|most likely|likely|hence|so|still|again|is|i think|i believe|i would say|"
    r"it is|it's)\b,?)*",
    re.IGNORECASE,
)
_JOINT = re.compile(r"[\s*_$)\]{}]*(?:\bor\b|\band\b|/|,|\||&)[\s*_$(\[{}]*", re.IGNORECASE)
# What may follow the letter: the end, a closing sign, or the beginning of a reason or of the choice's own text.
_CLOSED = re.compile(r"[*_$)\]}\"'`]*\s*(?:$|\n|[.,;:!)\]}(*|/—–-](?!\w)|\\|<)")
_REASON = re.compile(r"[*_$)\]}\"'`]*\s+(?:because|since|as|for|given|or|and|with|which|where|by|due|not|but)\b")
_OPERATOR = re.compile(r"[*_$)\]}]*\s*(?:=(?!>)|[<>^+])|\.[A-Z]\.|[-–]\w|\s*\\(?:le|ge|ne|in|times|cdot|rangle)\b|_|\^")
_DENIED = re.compile(r"\s*not\b", re.IGNORECASE)
_RULED_OUT = re.compile(
    r"[\s*_$)\]}\"'`]*(?:is|was|seems|looks|must be|would be|has to be)?(?:\s+(?:also|clearly|definitely|simply))?\s*"
    r"(?:\bnot\b|\bcannot\b|\bcan['’]t\b|n['’]t\b|\bnever\b|\bwrong\b|\bincorrect\b|\bfalse\b|\bimpossible\b|\bout\b|"
    r"\bruled out\b|\bexcluded\b|\beliminated\b)",
    re.IGNORECASE,
)
# Another letter later in the sentence: "B, or maybe A", "B, though it could be (A)", "B. C is also correct".
_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|alternatively|could be|might be|may be)\b(?:\W|\b(?:option|choice|the|answer)\b)*"
    r"\b([A-Z])\b(?!['’\w])|\b([A-Z])\b\W*\b(?:is|are|would be|could be|might be)\s+(?:also|equally|just as)\b"
)
# Another letter as the answer to another part: "B for one and C for two", "B if x > 0, else C", "B. For the rest, C".
# Letters beside other letters are those that a reason is about: "B, since A and C are too small".
_OTHER = re.compile(
    r"(?<![A-Z])(?<![A-Z][ ,])(?<![A-Z], )(?:(?i:\b(?:and|or|plus|also|as\s+well\s+as|with|then|otherwise|else|but|"
    r"alongside|partly|oder|und|ou|et|o|y)\b)|[,;:→]|[-=]>|或者?|和|及)[\s,:]*"
    r"(?i:(?:the|option|choice|answer|letter|also|partly|it|is|would|be)\s+)*([A-Z])\b(?!['’\w])"
    r"(?=\s*(?:[.,;:!)\n]|$|(?:for|if|in|on|when|where|otherwise|else|as\s+well|too|also|respectively|together|both)\b))"
    r"|\b(?i:for|in|on|if)\s+(?:the\s+)?(?:other|others|rest|second|latter|next|part|case|question|problem|item)\b"
    r"[^.\n]{0,60}?[\s,:(]([A-Z])\b(?!['’\w])(?=\s*(?:[.,;:!)\n]|$))"
)
_NEXT = re.compile(r"[\s.*_$)\]]*(?:\b(?:and|or)\b|[,;/&|])\s*(?:also\s+)?[*_$(\[]*[A-Z](?=[).:\]*])")
_SENTENCE = re.compile(r"[^\n?!]*?(?=[.]\s|[\n?!]|$)")
_EXCEPT = re.compile(
    r"\b(?:except|eliminate|exclude|discard|reject|rule\s+out|ruled\s+out|not)\b[^,;.]*\Z", re.IGNORECASE
)
# How a reply names its choice without the word "answer", in its last line.
_CHOSEN = re.compile(
    r"\b(?:(?:i|we)(?:['’](?:d|ll))?\s+(?:would\s+|will\s+)?(?:choose|pick|select|go\s+with)"
    r"|(?:it|this)\s+(?:must|has\s+to)\s+be)\s+",
    re.IGNORECASE,
)
_ALONE = re.compile(r"[\s*_$(\[{`]*([A-Za-z])[\s*_$)\]}.`]*")
_SHOWN = re.compile(r"\*\*\s*\(?([A-Z])\)?(?:[.:)][^*\n]*)?\s*\*\*|(?<!\w)\(([A-Z])\)")


def multiple_choice(rollout: Rollout, row: Row, num_choices: int = 26) -> RewardResult:
    """1 if the reply names the row's letter, and no other, as its answer.

    A letter is named after "answer is", "answer:" or "option is", in `\\boxed{}` or `<answer>`. In a reply without any
    of these, it is named as the beginning of a reply of one line ("B", "(B) red"), as the last line, or as the only
    letter in bold or brackets. Text inside `<think>` does not count. The letters are those of the row's `choices` (a
    list in its fields, also as JSON text or as {label, text}), else the first `num_choices`. The row's answer is a
    letter, the index of a choice from 0, or the text of a choice; for any other answer ValueError is raised. A letter
    that is ruled out ("B is wrong") is not named, and one that is hedged ("B, or maybe A") is not the only one.
    """
    labels, texts = _choices(row.fields.get("choices"), num_choices)
    gold = _gold(row.answer, labels, texts)
    if gold is None:
        raise ValueError(f"row {row.id}: its answer {row.answer!r} is none of the letters {labels}")
    named = named_letters(rollout.text, labels)
    if len(named) != 1:
        return RewardResult(0.0, reason="several answers" if named else "no stated answer")
    if named != {gold}:
        return RewardResult(0.0, reason="wrong")
    if _contradicts(rollout.text, labels.index(gold), texts):
        return RewardResult(0.0, reason="the letter of one choice with the text of another")
    return RewardResult(1.0)


def _contradicts(text: str, gold: int, texts: list[str]) -> bool:
    """Whether the letter of a choice stands before the whole text of another, as in "(B) red" where B is blue."""
    others = {choice for choice in texts if choice != texts[gold]} if texts else set()
    lines = re.findall(rf"\b{_LETTERS[gold]}\b[\s).:*\]]+([^\n]+)", prose(text))
    return any(line.strip(" .*_$)]") in others or _goes_on(line, texts[gold]) for line in lines if texts)


def _goes_on(line: str, own: str) -> bool:
    """Whether another letter is joined to the text of the choice, as in "(B) red and (C) blue"."""
    return line.startswith(own) and _NEXT.match(line, len(own)) is not None


def named_letters(text: str, letters: str = _LETTERS) -> set[str]:
    """Every letter that the text names as its answer; alternatives joined by "or", "and", "/" or a comma count too."""
    text = unicodedata.normalize("NFKC", prose(text).replace("\r\n", "\n"))
    text = _MACRO.sub("", text)
    if states_too_often(text) or sum(1 for _ in _OPTION.finditer(text)) > MOST:
        return set()
    if is_taken_back(text, end_of_marks(text)):
        return set()
    found: set[str] = set()
    for content in dict.fromkeys(content.strip()[:_NEAR] for content in boxes(text) + tagged(text)):
        found |= _letters_at(content, letters)
    marks = [match for pattern in (MARK, _OPTION) for match in pattern.finditer(text)]
    for mark in marks:
        after = text[mark.end() : mark.end() + _NEAR].lstrip()
        if not after.lstrip(" *_").startswith("\\boxed") and not is_doubted(text, mark.start()):
            found |= _letters_at(after, letters)
    if found or end_of_marks(text) or marks:
        return found
    return _unmarked(text.strip(), letters)


def _unmarked(text: str, letters: str) -> set[str]:
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) == 1 and (found := _letters_at(text[:_NEAR], letters)):
        return found
    if lines and (alone := _ALONE.fullmatch(lines[-1])):
        return {alone[1].upper()} & set(letters)
    last = lines[-1] if lines and len(lines[-1]) <= _LONGEST else ""
    shown = [match for match in _SHOWN.finditer(last) if not _RULED_OUT.match(last, match.end())]
    if any(_EXCEPT.search(last, 0, match.start()) or is_hedged(last, *match.span()) for match in shown):
        return set()
    named = {match[1] or match[2] for match in shown} & set(letters)
    if not named and (chosen := _CHOSEN.search(last)) and not is_hedged(last, chosen.end(), chosen.end() + 1):
        return _letters_at(last[chosen.end() :], letters)
    return named


def _letters_at(text: str, letters: str) -> set[str]:
    if _DENIED.match(text):
        return set()
    start = _start(text)
    found: set[str] = set()
    end = start
    while start < len(text) and _is_letter(text, start, letters, first=not found):
        end = start + 1
        if is_asked(text, end):
            return found
        if _RULED_OUT.match(text, start + 1):
            return found
        found.add(text[start].upper())
        joint = _JOINT.match(text, start + 1)
        if joint is None or _DENIED.match(text, joint.end()):
            break
        start = joint.end()
    if found and (rest := _SENTENCE.match(text, end)):
        others = _HEDGE.findall(rest[0]) + _OTHER.findall(text[end : end + _NEAR])
        found |= {sign for pair in others for sign in pair if sign} & set(letters)
    return found


def _start(text: str) -> int:
    """The place of the letter, after any brackets and words such as "therefore option"."""
    match = _BEFORE.match(text)
    return match.end() if match else 0


def _is_letter(text: str, place: int, letters: str, *, first: bool) -> bool:
    """Whether the letter there is one of the choices, and not an article ("A"), a pronoun ("I") or a variable."""
    sign = text[place]
    if sign.upper() not in letters or (
        place + 1 < len(text) and (text[place + 1].isalnum() or re.match(r"['’]\w", text[place + 1 :]))
    ):
        return False
    if _OPERATOR.match(text, place + 1):
        return False
    closed = bool(_CLOSED.match(text, place + 1) or _REASON.match(text, place + 1))
    return closed or (first and sign.isupper() and sign not in "AI")


def _choices(choices: object, num_choices: int) -> tuple[str, list[str]]:
    """The possible letters, and the texts of the choices (empty if they are unknown)."""
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except ValueError:
            choices = None
    if isinstance(choices, Mapping):
        choices = choices.get("text") or choices.get("texts") or list(choices.values())
    if isinstance(choices, list | tuple):
        return _LETTERS[: len(choices)], [str(choice).strip() for choice in choices]
    return _LETTERS[:num_choices], []


def _gold(answer: object, letters: str, texts: list[str]) -> str | None:
    text = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer).strip()
    letter = text.strip("().").upper()
    if len(letter) == 1 and letter in letters:
        return letter
    if texts.count(text) == 1:
        return letters[texts.index(text)]
    if not isinstance(answer, bool) and text.isdigit() and texts and int(text) < len(letters):
        return letters[int(text)]
    return None
