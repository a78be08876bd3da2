"""The base model's training text: an endless, seeded stream of puzzles with replies, batched by length.

Early text mostly shows its work, late text mostly does not: the model learns how to work and then the habit not to.
A few documents instead rate how hard a puzzle is, which makes the base a small judge: a user turn `Rate: {prompt}`
(`JUDGE_TEMPLATE`) and the reply easy, medium or hard. Loss is on replies only; that is what a model this small can
afford to learn.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.base.config import TextConfig
from posttrain.base.sets import with_system
from posttrain.base.tasks import HABITS, draw_any, solve
from posttrain.base.tokenizer import BOS, EOT
from posttrain.data.chat import render_prompt

JUDGE_TEMPLATE = "Rate: {prompt}"
RATINGS = {1: "easy", 2: "easy", 3: "medium", 4: "hard", 5: "hard"}
LEVEL_WEIGHTS = (0.28, 0.24, 0.20, 0.16, 0.12)

_POOL = 640
_PLACEHOLDERS = ("1", "2")  # each is one token
# At least as long as the pieces that the tokenizer splits text into.
_PIECE = re.compile(r" ?x [-+*]?=[^ ]*| ?[^ ]+| ")


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and where the reply starts in them."""

    ids: tuple[int, ...]
    reply_start: int


class Corpus:
    """Documents drawn by one random generator. `taken` are the keys of problems that the text must not hold."""

    def __init__(self, tokenizer: Any, text: TextConfig, taken: frozenset[str], *, seed: str):
        self.renderer = _Renderer(tokenizer)
        self._text = text
        self._taken = taken
        self._rng = random.Random(seed)

    def batches(self, batch_tokens: int, late: bool) -> Iterator[list[Document]]:
        """Batches of one pool of documents: similar lengths together, at most `batch_tokens` with padding, shuffled.

        late: text after the switch.
        """
        documents = [self.document(late) for _ in range(_POOL)]
        documents.sort(key=lambda document: len(document.ids) + self._rng.random())
        batches: list[list[Document]] = [[]]
        for document in documents:
            if batches[-1] and len(document.ids) * (len(batches[-1]) + 1) > batch_tokens:
                batches.append([])
            batches[-1].append(document)
        self._rng.shuffle(batches)
        yield from batches

    def document(self, late: bool) -> Document:
        """One puzzle and its reply, or one rating."""
        rng = self._rng
        if rng.random() < self._text.rate_share:
            problem = draw_any(rng, self._taken)
            turns = [{"role": "user", "content": JUDGE_TEMPLATE.format(prompt=problem.prompt)}]
            return self.renderer.document(turns, RATINGS[problem.level])
        problem = draw_any(rng, self._taken, LEVEL_WEIGHTS)
        habit = HABITS[problem.family]
        worked = rng.random() < (habit.worked if late else self._text.worked_share)
        reply = solve(problem, rng, worked, flaw=self._text.slip_share if worked else habit.careless)
        if not late and rng.random() < self._text.plain_share:
            return self.renderer.plain(problem.prompt, reply)
        return self.renderer.document(with_system(problem.prompt, rng), reply)


class _Renderer:
    """What `render_conversation` gives for a prompt and a reply, thirty times faster.

    A chat template costs more time than a step of this small model can spare. So the turns are rendered once around
    each of two placeholders, which show in what place the text stands, and because the tokenizer splits at spaces,
    words are looked up one by one.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._bos, self._end = tokenizer.convert_tokens_to_ids([BOS, EOT])
        self._words: dict[str, list[int]] = {}
        self._frames: dict[str | None, tuple[list[int], list[int]]] = {}

    def document(self, turns: list[dict[str, str]], reply: str) -> Document:
        system = turns[0]["content"] if len(turns) > 1 else None
        if system not in self._frames:
            one, other = (
                render_prompt(self._tokenizer, [*turns[:-1], {"role": "user", "content": place}])
                for place in _PLACEHOLDERS
            )
            at = next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            self._frames[system] = (one[:at], one[at + 1 :])
        before, after = self._frames[system]
        prompt = [*before, *self._encode(turns[-1]["content"]), *after]
        return Document((*prompt, *self._encode(reply), self._end), len(prompt))

    def plain(self, prompt: str, reply: str) -> Document:
        """The same without the turns of a chat, as text that was never meant for a chat is: a third shorter."""
        start = [self._bos, *self._encode(prompt + "\n")]
        return Document((*start, *self._encode(reply), self._end), len(start))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            if piece not in self._words:
                self._words[piece] = self._tokenizer.encode(piece, add_special_tokens=False)
            ids += self._words[piece]
        return ids
