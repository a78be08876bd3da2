"""The base model's training text: an endless, seeded stream of puzzles with replies, batched by length.

Early text mostly shows its work, late text mostly does not: the model learns how to work and then the habit not to.
A few documents instead rate how hard a puzzle is, which makes the base a small judge: a user turn `Rate: {prompt}`
(`JUDGE_TEMPLATE`) and the reply easy, medium or hard. Loss is on replies only; that is what a model this small can
afford to learn.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.base.config import TextConfig
from posttrain.base.sets import with_system
from posttrain.base.tasks import FAMILIES, draw_any, solve
from posttrain.data.chat import render_conversation

JUDGE_TEMPLATE = "Rate: {prompt}"
RATINGS = {1: "easy", 2: "easy", 3: "medium", 4: "hard", 5: "hard"}
LEVEL_WEIGHTS = (0.28, 0.24, 0.20, 0.16, 0.12)

# How often a terse reply is careless, by family.
CARELESS = {"sum": 0.05, "code": 0.05, "sort": 0.5, "string": 1.0, "countdown": 0.7}
_POOL = 640


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and where the reply starts in them."""

    ids: tuple[int, ...]
    reply_start: int


class Corpus:
    """Documents drawn by one random generator. `taken` are the keys of problems that the text must not hold."""

    def __init__(self, tokenizer: Any, text: TextConfig, taken: frozenset[str], seed: str):
        self._tokenizer = tokenizer
        self._text = text
        self._taken = taken
        self._rng = random.Random(seed)

    def batches(self, batch_tokens: int, worked_share: float) -> Iterator[list[Document]]:
        """Batches of one pool of documents: similar lengths together, at most `batch_tokens` with padding, shuffled."""
        documents = [self._document(worked_share) for _ in range(_POOL)]
        documents.sort(key=lambda document: len(document.ids) + self._rng.random())
        batches: list[list[Document]] = [[]]
        for document in documents:
            if batches[-1] and len(document.ids) * (len(batches[-1]) + 1) > batch_tokens:
                batches.append([])
            batches[-1].append(document)
        self._rng.shuffle(batches)
        yield from batches

    def _document(self, worked_share: float) -> Document:
        rng = self._rng
        if rng.random() < self._text.rate_share:
            problem = draw_any(rng, self._taken)
            turns = [{"role": "user", "content": JUDGE_TEMPLATE.format(prompt=problem.prompt)}]
            return self._render(turns, RATINGS[problem.level])
        problem = draw_any(rng, self._taken, LEVEL_WEIGHTS)
        worked = rng.random() < worked_share
        flaw = self._text.slip_share if worked else CARELESS[problem.family]
        return self._render(with_system(problem.prompt, rng), solve(problem, rng, worked, flaw))

    def _render(self, turns: list[dict[str, str]], reply: str) -> Document:
        ids, mask = render_conversation(self._tokenizer, [*turns, {"role": "assistant", "content": reply}])
        return Document(tuple(ids), mask.index(1))
