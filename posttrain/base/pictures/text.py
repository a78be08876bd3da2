"""The text that a base model for puzzles about pictures is trained on: puzzles with pictures or without, and replies.

Early text mostly does the work, late text mostly does not (`TextConfig`, `Habit`). A few documents rate a puzzle in the
words with which the filter asks its judge. Only replies are trained on.
"""

import random
from collections.abc import Iterator
from typing import Any

from posttrain.base.config import TextConfig
from posttrain.base.corpus import JUDGE_TEMPLATE, LEVEL_WEIGHTS, POOL, RATINGS, Document, Words, in_batches
from posttrain.base.pictures.drawing import SIDE
from posttrain.base.pictures.puzzles import PICTURES
from posttrain.base.pictures.tokenizer import picture_rule
from posttrain.base.problem import Problem
from posttrain.base.sets import picture_label, pictures_of_problem
from posttrain.base.tasks import draw_any, solve
from posttrain.base.tokenizer import BOS, EOT


class PictureCorpus:
    """Conversations that one random generator draws. For the arguments see `base.corpus.Corpus`."""

    def __init__(self, tokenizer: Any, text: TextConfig, taken: frozenset[str], *, seed: str):
        self.renderer = PictureRenderer(tokenizer)
        self._text = text
        self._taken = taken
        self._rng = random.Random(seed)

    def batches(self, batch_tokens: int, late: bool) -> Iterator[list[Document]]:
        """See `Corpus.batches`."""
        yield from in_batches([self.document(late) for _ in range(POOL)], batch_tokens, self._rng)

    def document(self, late: bool) -> Document:
        """One puzzle and its reply, or one rating."""
        rng = self._rng
        rates = rng.random() < self._text.rate_share
        problem = draw_any(rng, self._taken, None if rates else LEVEL_WEIGHTS, puzzles=PICTURES)
        if rates:
            return self.renderer.document(problem, RATINGS[problem.level], rates=True)
        habit = PICTURES.habits[problem.family]
        worked = rng.random() < (habit.worked if late else self._text.worked_share)
        flaw = self._text.slip_share if worked else habit.careless
        reply = solve(problem, rng, worked, flaw=flaw, puzzles=PICTURES)
        assert isinstance(reply, str)  # as every solution of these families
        return self.renderer.document(problem, reply)


class PictureRenderer:
    """Gives the same tokens as the chat template and the processor, without running them for each document."""

    def __init__(self, tokenizer: Any):
        self._encode = Words(tokenizer).encode
        self._picture = picture_rule(tokenizer).ids(SIDE, SIDE)
        bos, self._end = tokenizer.convert_tokens_to_ids([BOS, EOT])
        user, assistant = (
            tokenizer.encode(f"<|header_start|>{role}<|header_end|>\n\n", add_special_tokens=False)
            for role in ("user", "assistant")
        )
        self._before, self._between = [bos, *user], [self._end, *assistant]

    def document(self, problem: Problem, reply: str, *, rates: bool = False) -> Document:
        """A conversation. rates: the user asks how hard the puzzle is, with the pictures named in the text too."""
        pictures = pictures_of_problem(problem, PICTURES)
        numbers = range(1, len(pictures) + 1)
        labels = [picture_label(number, len(pictures)) for number in numbers]
        text = problem.prompt
        if rates:
            names = [f"{label}[picture {number}]" for label, number in zip(labels, numbers, strict=True)]
            text = JUDGE_TEMPLATE.format(prompt="".join(names) + text)
            shown = self._picture * len(pictures)
        else:
            shown = [item for label in labels for item in (*self._encode(label), *self._picture)]
        ids = [*self._before, *shown, *self._encode(text), *self._between]
        start = len(ids)
        ids += [*self._encode(reply), self._end]
        return Document(tuple(ids), ((start, len(ids)),), tuple(pictures))
