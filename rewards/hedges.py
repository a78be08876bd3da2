"""The words by which a reply says an answer without standing by it: it doubts itself, or lets somebody else say it.

"Unless I am wrong the answer is 4", "My friend says the answer is 4", "The answer is 4, I hope". Conditions on the
problem are none of these: "If x is even, the answer is 4".
"""

import re

_NEAR = 200  # characters around a statement that are looked at
_END = (
    r"(?=\s{0,9}(?:[,;:.!?)\n—–]|\s-|\Z|(?:then|the|my|our|here|about|in|on|so|somewhere|this|that|it|was|were|me)\b))"
)
_SLIP = (
    r"(?:(?:ma[dk]e|making|committed|no|any|an?|some|my|without)\s+(?:\w+\s+){0,2}"
    r"(?:errors?|mistakes?|slips?|blunders?|typos?|oversights?))"
)
_WRONG = (
    r"(?:wrong|mistaken|confused|in\s+error|err|erred|slipped|blundered|misread|miscounted|miscount|miscalculated|"
    r"misunderstood|misunderstand|misremember\w{0,3}|misheard|overlooked\s+\w+|missed\s+(?:something|anything|a\s+\w+)|"
    r"forgotten\s+\w+|correctly|properly|fool(?:ed|s|ing)?\s+me|deceiv(?:ed|es)\s+me|fails?\s+me|serves?(?:\s+me)?)"
)
_RIGHT = (
    r"(?:(?:am|is|are|be|was|were|['’]m|['’]re|did|read|got|have|counted|understood|add(?:ed)?\s+up|worked\s+out)\b"
    r"[^.!?\n]{0,30}?\b(?:right|correct|sound|reliable|trusted|fine))"
)
_HOLDS = (
    r"(?:(?:arithmetic|reasoning|working|logic|calculations?|sums?|memory|maths?|steps?)\s+(?:still\s+)?"
    r"(?:holds?|works?|stands?))"
)
_RECALLED = r"(?:(?:recall|remember)(?:\s+(?:right|rightly|well))?(?=\s*(?:[,;:.!?)]|\Z|the\s+(?:\w+\s+)?answer\b)))"
_IF = (
    r"\b(?:unless|if|provided|providing|assuming|supposing|presuming|as\s+long\s+as|so\s+long\s+as|in\s+case|"
    r"insofar\s+as|granted)"
)
_SELF = r"(?:i|i['’](?:m|ve)|we|we['’](?:re|ve)|my|our|memory|nobody|no|nothing|everything)"
_THAT = r"(?:(?:all\s+(?:of\s+)?)?(?:this|that|it)|all|the\s+above)"
# A condition on the speaker: that no mistake was made, that memory serves.
_CONDITION = (
    rf"(?:{_IF}[\s,]{{1,9}}(?:that\s+)?(?:(?={_SELF}\b)[^.!?\n]{{0,60}}?\b(?:{_WRONG}{_END}|{_SLIP}{_END}|{_RIGHT}{_END}|"
    rf"{_HOLDS}{_END}|{_RECALLED})|{_THAT}\s+(?:is|was|are|be|proves?)\s+(?:\w+\s+){{0,2}}"
    rf"(?:right|correct|mistaken){_END})"
    rf"|\b(?:barring|absent|short\s+of)\s+(?:\w+\s+){{0,2}}(?:errors?|mistakes?|slips?|blunders?|oversights?|accidents?))"
)
_OF_SELF = re.compile(_CONDITION, re.IGNORECASE)
# Conditions that turn the words around, and words of little trust, anywhere in the sentence before the statement.
_EARLIER = re.compile(
    r"(?:(?:\A|[,;:]\s{0,9})(?:should|were|had)\s+i\b"
    r"|\b(?:do\s+not|don['’]t|never)\s+(?:trust|quote|believe)\s+me\b|\b(?:grain|pinch)\s+of\s+salt\b"
    r"|\bi(?:\s+am|['’]m)\s+(?:only\s+)?(?:half|hardly|barely|scarcely|not\s+(?:quite|really|very|too|so))\s+"
    r"(?:sure|certain|convinced)\b|\bnot\s+that\s+i\b)[^.!?\n]{0,200}\Z",
    re.IGNORECASE,
)
_PEOPLE = (
    r"(?:some|many|most|one|people|someone|somebody|anyone|anybody|everyone|everybody|nobody|no\s+one|none|they|he|she|you|"
    r"others?|(?:reader|student|friend|teacher|colleague|person|user|man|woman|child|brother|sister|mother|father)s?|"
    r"gut|intuition|instinct|hunch|rumou?rs?|legend)"
)
_TELL = (
    r"(?:says?|said|claims?|claimed|thinks?|thought|believes?|believed|argues?|argued|reckons?|insists?|tells?|told)"
)
_LEFT_OPEN = (
    rf"(?:\b{_PEOPLE}\s+(?:\w+\s+){{0,3}}?{_TELL}(?:\s+(?:me|us|it))?"
    r"|\brumou?r\s+has\s+it|\b(?:instead|rather)\s+of|\bfar\s+from\s+it\s+being\s+true|\b(?:hope|hopes|hoping|hopefully|pray|wish|bet|betting|wager|gamble|pretend|imagine)"
    r"|\b(?:hunch|feeling|suspicion|bet|intuition|hope|impression|theory)\s+(?:is|was|says|tells\s+me)"
    r"|\b(?:have|had|got)\s+(?:a|the)\s+(?:\w+\s+)?(?:feeling|hunch|suspicion|impression)"
    r"|\b(?:feeling|hunch|suspicion)"
    r"|\btempt(?:ing|ed)\s+to\s+(?:say|think|believe|answer|claim)|\b(?:refuse|decline|hesitate|reluctant)\s+to\s+\w+"
    r"|\b(?:deny|denies|denied|dispute)|\bno\s+way|\bas\s+(?:if|though)|\brule\s+out|\bused\s+to\s+be"
    r"|\b(?:chances?|odds|likelihood|possibility|probability|risk)(?:\s+(?:is|are|was))?|\bluck|\bto\s+say"
    r"|(?:\A|[.;:]\s{0,9})say)"
)
_DIRECTLY = re.compile(
    rf"{_LEFT_OPEN}[\s,:]{{0,9}}(?:that\s+|it\s+)?"
    r"(?:(?:the|my|our|your|an?|this|its|final|correct|right|best|only|actual|possible|likely)\s+){0,6}[*_$\\(\[\s]{0,9}\Z",
    re.IGNORECASE,
)
_WORDS = re.compile(r"(?:answers?|option|choice|letter)\b", re.IGNORECASE)  # with which a statement begins
# What follows the statement in its sentence, or as a sentence of its own.
_SAME = re.compile(
    rf"{_CONDITION}|\bif\s+you\s+(?:ask|press|force|make)\s+me\b|\bbut\s+not\s+really\b|\b(?:in\s+a\s+(?:way|sense)|sort\s+of|kind\s+of)(?=\s{{0,9}}(?:[.,;!?)]|\Z))"
    r"|\bor\s+(?:so|thereabouts|something|similar|the\s+like)\b|\bgive\s+or\s+take\b|^[\s*_$]{0,9}.{1,20}?-ish\b|\(\s*\?+\s*\)",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"(?:[.!?,;:(\n—–-]|\band\b|\bbut\b)[\s*_$)\]}\\\"']{0,20}(?:"
    r"(?:though\s+|although\s+|but\s+|however,?\s+)?i\s+(?:may|might|could)\s+(?:\w+\s+)?(?:"
    r"be\s+(?:\w+\s+)?(?:wrong|mistaken|off|confused|misremembering|missing\s+\w+|lying)"
    r"|have\s+(?:\w+\s+)?(?:erred|slipped|miscounted|misread|miscalculated|misunderstood|missed|forgotten|made\s+(?:an?|some)\s+\w+))\b"
    r"|(?:but\s+)?(?:do\s+not|don['’]t)\s+(?:quote|trust|believe|rely\s+on|hold)\s+(?:me|that|this|it)\b"
    r"|(?:so\s+)?(?:take|with)\s+(?:it\s+|this\s+|that\s+)?(?:with\s+)?a\s+(?:big\s+|large\s+)?(?:grain|pinch)\s+of\s+salt\b"
    r"|(?:or\s+)?(?:i\s+hope(?:\s+so)?|hopefully|fingers\s+crossed|maybe|perhaps|presumably|supposedly|possibly|probably|"
    r"i\s+(?:guess|suppose|presume|reckon)|at\s+least\s+(?:i\s+)?(?:think|hope|believe)(?:\s+so)?|at\s+a\s+guess)"
    r"[\s.!*_)\]]{0,20}(?:\Z|\n)"
    r"|(?:just|only)\s+(?:kidding|joking)\b|jk\b|strike\s+that\b|ignore\s+(?:that|this|it|the\s+above)\b|disregard\s+(?:that|this|it)\b|forget\s+(?:it|that)\b"
    r"|scrap\s+that\b|i\s+take\s+(?:that|it|this)\s+back\b|i\s+(?:made|am\s+making)\s+(?:that|this|it)\s+up\b"
    r"|(?:that|this|it|which)\s+(?:is|was)\s+(?:\w+\s+){0,3}?(?:guess|random\s+(?:pick|choice)|hunch|coin\s+(?:flip|toss)|"
    r"shot\s+in\s+the\s+dark)\b)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|\n")


def is_left_open(text: str, start: int) -> bool:
    """Whether the sentence before the place `start` leaves open whether what follows is the speaker's answer."""
    before = text[max(0, start - _NEAR) : start]
    ends = [match.end() for match in _SENTENCE_END.finditer(before)]
    sentence = before[ends[-1] :].lstrip() if ends else before
    if _OF_SELF.search(sentence) or _EARLIER.search(sentence):
        return True
    # "They said the answer is 4" leaves it open, "the probability is 4" and "she has \\boxed{4}" do not.
    return _WORDS.match(text, start) is not None and _DIRECTLY.search(sentence) is not None


def is_left_open_after(text: str, end: int) -> bool:
    """Whether the text after the place `end`, at which an answer begins or ends, leaves it open."""
    stop = _SENTENCE_END.search(text, end)
    sentence = text[end : min(stop.end() if stop else len(text), end + _NEAR)]
    return _SAME.search(sentence) is not None or _AFTER.search(text, end) is not None
