"""Finds out whether a reply states its answer, or only asks for it, supposes it, doubts it or takes it back.

A reward that took such an answer would teach a policy to name an answer without standing by it.
"""

import re

from .hedges import is_left_open, is_left_open_after

_NEAR = 120  # characters before a statement that are looked at
_ARTICLES = r"(?:(?:the|my|our|your|an?|this|its|final|correct|right|best|only|actual|possible|likely)\s+)*"
_BEFORE = re.compile(
    r"(?:\b(?:not|never|hardly|maybe|perhaps|possibly|probably|if|unless|whether|suppose|supposing|assume|assuming|"
    r"imagine|guess|(?:false|untrue|wrong)\s+that|(?<!\bno\s)(?<!\bany\s)(?<!\bout\s)(?<!\byond\s)doubt)|n['’]t"
    r"|\b(?:could|might|may)\s+(?:\w+\s+)?be"
    r"|\b(?:guess|guessing)(?:\s+(?:is|was|would\s+be))?"
    r"|(?:\bnot|n['’]t)\s+(?:\w+\s+){0,2}(?:sure|certain|clear|true|convinced|believe|think|claim|say)"
    r"|\b(?:unsure|uncertain|unclear|unlikely|false|untrue|wrong|incorrect)\s+(?:that|if|whether)"
    r"|\b(?:wonder|wondering|ask|asked)\s+(?:if|whether))"
    rf"[\s,:*_$(]*(?:(?:that|if|whether|be|to\s+be)\s+)?{_ARTICLES}[*_$\\(\[\s]*\Z",
    re.IGNORECASE,
)
_ASKED = re.compile(r"[\s$*_()\]}\\'\"]*\?")
# What takes an answer back when it directly follows it: "\\boxed{4} is wrong", "4 is not the answer", "4 (wrong)".
TAKEN_BACK = re.compile(
    r"[\s$*_.)\\\]]*(?:\b(?:is|was|seems|looks|would be|must be)\s+(?:(?:clearly|also|definitely)\s+)?"
    r"(?:wrong|incorrect|false|not\s+(?:right|correct|true|the\s+(?:right\s+|correct\s+)?answer)\b)"
    r"|\(\s*(?:wrong|incorrect|false)\b)",
    re.IGNORECASE,
)
# What takes it back in the rest of the reply, at the beginning of a sentence or of a part of one.
_LATER = re.compile(
    r"(?:^|[.!?,;:(\n—–-]|\band\b|\bbut\b|\bor\b)[\s*_$)\]}\\\"']*(?:"
    r"wait\b|hmm+\b|oops\b|scratch that|correction\b|on second thoughts?\b|never ?mind|no,|nope\b"
    r"|actually,?\s+(?:no\b|it|that|the (?:right |correct )?answer|this)\s+(?:is|was|should|must|might|could)\b"
    r"(?!\s+(?:also|right|correct|true|exactly|the same|indeed))"
    r"|(?:that|this|it|which)\s+(?:(?:is|was|seems|looks|must\s+be)\s+(?:\w+\s+)?(?:wrong|incorrect|false|mistaken|a\s+mistake"
    r"|a\s+guess|not\s+(?:right|correct))|(?:may|might|could)\s+be\s+wrong|(?:can['’]t|cannot)\s+be\s+(?:right|correct))\b"
    r"|(?:or|maybe|perhaps|possibly)\s+(?:(?:is|was)\s+it\s+|it\s+(?:is|could be|might be)\s+|maybe\s+|perhaps\s+)*"
    r"[$\\(*]*(?:[-−]?\d|(?-i:[B-HJ-Z])\b(?!['’\w]))"
    r"|(?:i(?: a|['’])m\s+)?(?:not\s+(?:\w+\s+)?(?:sure|certain)|unsure|uncertain)\b"
    r"|(?:(?:this|that|it)\s+is\s+)?(?:just|only|merely)\s+(?:a|my)\s+guess\b"
    r"|i\s+(?:don['’]t|do\s+not)\s+know\b|i(?: a|['’])m\s+(?:just\s+|only\s+)?guessing\b)",
    re.IGNORECASE,
)
_HEDGED = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|could|might|may\s+be|guess|doubt|unsure|suppose|assume|unclear|or\s+so|"
    r"or\s+(?:more|less|fewer)|at\s+(?:least|most)|(?:more|less|fewer|greater|smaller|larger)\s+than|up\s+to|between)\b",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(
    r"\b(?:i\s+)?(?:don['’]t|do\s+not)\s+know\b|\b(?:not|n['’]t)\s+(?:\w+\s+)?(?:sure|certain)\b|\bunknown\b"
    r"|\bno idea\b|\b(?:can['’]t|cannot|can\s+not)\s+(?:\w+\s+)?(?:tell|say|solve|determine)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|cannot|hardly|neither)|n['’]t)(?:\s+(?:be|equal|to|exactly|really|the|simply|just))*[\s$*=:]*\Z",
    re.IGNORECASE,
)
# Denials in other languages, for a number or letter that no English words announce.
_FOREIGN_DENIAL = re.compile(
    r"\bnicht\b|\bkeine?[rnms]?\b|\bn['’](?:est|a)\b|\bpas\b|\bno\s+(?:es|son)\b|\bnon\s+(?:è|sono)\b|\bnão\b|\bне\b"
    r"|不是|不等|ではな|じゃな|아니",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_BREAK = re.compile(r"[,;:]\s|\s[—–-]\s|[.?!](?=\s|$)")


def is_doubted(text: str, start: int) -> bool:
    """Whether what stands directly before the place `start` keeps it from being a statement: "perhaps the answer is",
    "not \\boxed{4}"."""
    before = text[max(0, start - _NEAR) : start].rpartition("\n")[2]
    return _BEFORE.search(before) is not None or is_left_open(text, start)


def is_asked(text: str, end: int) -> bool:
    """Whether a question mark directly follows the place `end`."""
    return _ASKED.match(text, end) is not None


def is_taken_back(text: str, end: int) -> bool:
    """Whether the text after the last statement, which begins or ends at `end`, takes it back."""
    return _LATER.search(text, end) is not None or is_left_open_after(text, end)


def is_hedged(line: str, start: int, end: int) -> bool:
    """Whether the part of the sentence around line[start:end] is unsure of it, or the sentence is a question.

    For an answer that no words announce, such as the only number of the last line.
    """
    before = max((match.end() for match in _BREAK.finditer(line, 0, start)), default=0)
    after = _BREAK.search(line, end)
    part = line[before:start] + " " + line[end : after.start() if after else len(line)]
    question = _SENTENCE_END.search(line, end)
    return bool(
        _UNKNOWN.search(line)
        or _HEDGED.search(part)
        or _FOREIGN_DENIAL.search(part)
        or _DENIED.search(line[max(before, start - _NEAR) : start])
        or (question and question[0] == "?")
        or is_left_open(line, start)
        or is_taken_back(line, end)
    )
