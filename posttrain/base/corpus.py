"""The base model's training text: an endless stream of puzzles with replies, drawn from a seed and batched by length.

Most replies of the early text show their steps, and most replies of the late text do not. So the model can solve
puzzles step by step but rarely does, which leaves RL something to bring back. A few documents rate how hard a puzzle
is, so that the filter of the quick start has a judge: a user turn `Rate: {prompt}` (`JUDGE_TEMPLATE`) and the reply
easy, medium or hard. Only replies are trained on, because a model this small cannot learn the prompts too.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from posttrain.base.config import TextConfig
from posttrain.base.problem import Picture
from posttrain.base.sets import with_system
from posttrain.base.tasks import HABITS, draw_any, solve
from posttrain.base.tokenizer import BOS, EOT
from posttrain.data.chat import render_prompt
from posttrain.data.tokenizer import Tokenizer

JUDGE_TEMPLATE = "Rate: {prompt}"
RATINGS = {1: "easy", 2: "easy", 3: "medium", 4: "hard", 5: "hard"}
LEVEL_WEIGHTS = (0.28, 0.24, 0.20, 0.16, 0.12)

POOL = 640  # documents that are sorted by length together
_PLACEHOLDERS = ("1", "2")  # each is one token
# How text is cut into pieces that are encoded one by one. A piece must never end inside a piece of the tokenizer.
_PIECE = re.compile(r" ?x [-+*]?=[^ ]*| ?[^ ]+| ")


@dataclass(frozen=True, slots=True)
class Document:
    """The token ids of a conversation. replies: where each turn that is trained on begins and ends in them. pictures:
    what its tokens show, in order.
    """

    ids: tuple[int, ...]
    replies: tuple[tuple[int, int], ...]
    pictures: tuple[Picture, ...] = ()


class Corpus:
    """Documents that one random generator draws.

    taken: keys of the problems in the datasets of the later stages, which the text must not hold.
    """

    def __init__(self, tokenizer: Tokenizer, text: TextConfig, taken: frozenset[str], *, seed: str):
        self.renderer = _Renderer(tokenizer)
        self._text = text
        self._taken = taken
        self._rng = random.Random(seed)

    def batches(self, batch_tokens: int, late: bool) -> Iterator[list[Document]]:
        """Draw a pool of documents and yield it in batches, in random order.

        Documents of similar length share a batch, so that there is little padding. A batch has at most `batch_tokens`
        tokens with its padding. late: whether the text is that after the switch.
        """
        yield from in_batches([self.document(late) for _ in range(POOL)], batch_tokens, self._rng)

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
        assert isinstance(reply, str)  # as every solution of these families
        if not late and rng.random() < self._text.plain_share:
            return self.renderer.plain(problem.prompt, reply)
        return self.renderer.document(with_system(problem.prompt, rng), reply)


def in_batches(documents: list[Document], batch_tokens: int, rng: random.Random) -> list[list[Document]]:
    """Documents of similar length together, in random order."""
    documents.sort(key=lambda document: len(document.ids) + rng.random())
    batches: list[list[Document]] = [[]]
    for document in documents:
        if batches[-1] and len(document.ids) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(document)
    rng.shuffle(batches)
    return batches


class Words:
    """Encodes text whose words are known, by looking each up."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            if piece not in self._words:
                self._words[piece] = self._tokenizer.encode(piece, add_special_tokens=False)
            ids += self._words[piece]
        return ids


class _Renderer:
    """Gives the same tokens as `render_conversation` for a prompt and a reply, thirty times faster.

    A step of this small model is so short that rendering the chat template for every document would take longer. So
    each system turn is rendered twice, with two different placeholders as the prompt. The two results differ only at
    the place of the prompt, which splits them into the tokens before and after it. The tokenizer splits text at spaces,
    so the tokens of each word are kept and looked up.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._bos, self._end = tokenizer.convert_tokens_to_ids([BOS, EOT])
        self._encode = Words(tokenizer).encode
        self._frames: dict[str | None, tuple[list[int], list[int]]] = {}

    def document(self, turns: list[dict[str, str]], reply: str) -> Document:
        """The token ids of a conversation that ends with `reply`. turns: an optional system turn, and a user turn."""
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
        return _document(prompt, [*self._encode(reply), self._end])

    def plain(self, prompt: str, reply: str) -> Document:
        """A document without the turns of a chat, like most text that a base model reads. It is a third shorter."""
        start = [self._bos, *self._encode(prompt + "\n")]
        return _document(start, [*self._encode(reply), self._end])


def _document(prompt: list[int], reply: list[int]) -> Document:
    return Document((*prompt, *reply), ((len(prompt), len(prompt) + len(reply)),))
