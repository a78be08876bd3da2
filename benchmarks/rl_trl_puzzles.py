"""Puzzles whose solutions have lengths with a long tail, for the race `long` of rl_trl.py; and the text of its base.

    Run: 86 + 7; 4        Steps: 4 86 + 0 = 6; 3 93 + 6 = 9; 2 0 + 9 = 9; 1 7 + 9 = 6. Answer: 6

Four numbers from 86 in steps of 7, modulo 100; their last digits are added up, modulo 10. A step begins with how many
numbers are left. A worked solution has 7 tokens for each number, so its length follows from the puzzle: a lognormal
distribution between 16 and 512 tokens, whose fifths are the levels. Each token of it follows from the last step and the
stride, so a small model learns to write it within minutes. The late text of the base mostly answers at once, which no
model of this size gets right, so that training makes the replies longer.
"""

import math
import random
from collections.abc import Iterator
from statistics import NormalDist

from posttrain.base.config import TextConfig
from posttrain.base.corpus import POOL, Document, in_batches
from posttrain.base.courses import Course
from posttrain.base.problem import LEVELS, Family, Problem, with_steps
from posttrain.base.tasks import Habit, Puzzles, draw_any, solve
from posttrain.base.tokenizer import build_tokenizer
from posttrain.base.tools.text import ToolRenderer
from posttrain.data.tokenizer import Tokenizer

SHORTEST, LONGEST = 16, 512  # tokens of a worked solution
MEDIAN, SPREAD = 72, 0.9  # of the lognormal distribution; the spread is the standard deviation of the logarithm
_STEP, _FRAME = 7, 4  # tokens of a step, and of what stands around the steps
_STRIDES, _MODULUS = (3, 7, 9, 11), 100  # coprime, so that no number comes twice


def draw(level: int, rng: random.Random) -> Problem:
    """So many numbers that the worked solution has a length of this fifth of the distribution."""
    share = (level - 1 + rng.random()) / len(LEVELS)
    tokens = math.exp(math.log(MEDIAN) + SPREAD * NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6)))
    count = int((min(max(tokens, SHORTEST), LONGEST) - _FRAME) / _STEP)
    start, stride = rng.randrange(_MODULUS), rng.choice(_STRIDES)
    numbers = tuple((start + stride * place) % _MODULUS for place in range(count))
    text = f"{start} + {stride}; {count}"
    return Problem("walk", level, f"Run: {text}", str(sum(numbers) % 10), f"walk {text}", numbers, {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """One number at a time; a slip is off by one in one of them."""
    value, slip_at = 0, rng.randrange(len(problem.parts)) if slip else -1
    steps = []
    for place, number in enumerate(problem.parts):
        after = (value + number + (place == slip_at)) % 10
        steps.append(f"{len(problem.parts) - place} {number} + {value} = {after}")
        value = after
    return with_steps(steps, str(value), separator="; ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The answer at once; a careless one is any digit."""
    return f"Answer: {rng.randrange(10) if careless else problem.answer}"


WALKS = Puzzles({"walk": Family("math", draw, worked, terse)}, {"walk": Habit(worked=0.3, careless=0.5)})


class WalkText:
    """Conversations about one puzzle each. For the arguments see `posttrain.base.corpus.Corpus`."""

    def __init__(self, tokenizer: Tokenizer, text: TextConfig, taken: frozenset[str], *, seed: str):
        self._renderer = ToolRenderer(tokenizer)
        self._text, self._taken, self._rng = text, taken, random.Random(seed)

    def batches(self, batch_tokens: int, late: bool) -> Iterator[list[Document]]:
        """See `Corpus.batches`."""
        yield from in_batches([self.document(late) for _ in range(POOL)], batch_tokens, self._rng)

    def document(self, late: bool) -> Document:
        rng = self._rng
        problem = draw_any(rng, self._taken, puzzles=WALKS)
        habit = WALKS.habits[problem.family]
        shows = rng.random() < (habit.worked if late else self._text.worked_share)
        reply = solve(problem, rng, shows, flaw=self._text.slip_share if shows else habit.careless, puzzles=WALKS)
        turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}]
        return self._renderer.document(turns, ())


WALK_COURSE = Course(WALKS, build_tokenizer, WalkText, with_systems=False)
