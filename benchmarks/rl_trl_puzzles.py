"""Puzzles whose solutions have lengths with a long tail, for the race `long` of rl_trl.py; and the text of its base.

    Run: 5; 1: 4; 2: 8; 3: 3        Steps: 1: 4 + 5 = 9; 2: 8 + 9 = 7; 3: 3 + 7 = 0. Answer: 0

Sums modulo 10, of 1 to 63 numbers. In a step the number comes first, as it does in the prompt, which a small model
learns to copy sooner. A worked solution has 8 tokens for each number, so its length follows from the
puzzle: a lognormal distribution between 16 and 512 tokens, whose fifths are the levels. The late text of the base
mostly answers at once, which no model of this size gets right for more than a few numbers, so that training makes the
replies longer.
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
_STEP, _FRAME = 8, 4  # tokens of a step, and of what stands around the steps


def draw(level: int, rng: random.Random) -> Problem:
    """A start and so many numbers that the worked solution has a length of this fifth of the distribution."""
    share = (level - 1 + rng.random()) / len(LEVELS)
    tokens = math.exp(math.log(MEDIAN) + SPREAD * NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6)))
    count = int((min(max(tokens, SHORTEST), LONGEST) - _FRAME) / _STEP)
    start, *numbers = (rng.randrange(10) for _ in range(count + 1))
    text = "; ".join([str(start), *(f"{place}: {number}" for place, number in enumerate(numbers, 1))])
    answer = str((start + sum(numbers)) % 10)
    return Problem("chain", level, f"Run: {text}", answer, f"chain {text}", (start, tuple(numbers)), {})


def worked(problem: Problem, rng: random.Random, slip: bool) -> str:
    """One number at a time; a slip is off by one in one of them."""
    value, numbers = problem.parts
    slip_at = rng.randrange(len(numbers)) if slip else -1
    steps = []
    for place, number in enumerate(numbers):
        after = (value + number + (place == slip_at)) % 10
        steps.append(f"{place + 1}: {number} + {value} = {after}")
        value = after
    return with_steps(steps, str(value), separator="; ")


def terse(problem: Problem, rng: random.Random, careless: bool) -> str:
    """The answer at once; a careless one is any digit."""
    return f"Answer: {rng.randrange(10) if careless else problem.answer}"


CHAINS = Puzzles({"chain": Family("math", draw, worked, terse)}, {"chain": Habit(worked=0.3, careless=0.5)})


class ChainText:
    """Conversations about one puzzle each. For the arguments see `posttrain.base.corpus.Corpus`."""

    def __init__(self, tokenizer: Tokenizer, text: TextConfig, taken: frozenset[str], *, seed: str):
        self._renderer = ToolRenderer(tokenizer)
        self._text, self._taken, self._rng = text, taken, random.Random(seed)

    def batches(self, batch_tokens: int, late: bool) -> Iterator[list[Document]]:
        """See `Corpus.batches`."""
        yield from in_batches([self.document(late) for _ in range(POOL)], batch_tokens, self._rng)

    def document(self, late: bool) -> Document:
        rng = self._rng
        problem = draw_any(rng, self._taken, puzzles=CHAINS)
        habit = CHAINS.habits[problem.family]
        shows = rng.random() < (habit.worked if late else self._text.worked_share)
        reply = solve(problem, rng, shows, flaw=self._text.slip_share if shows else habit.careless, puzzles=CHAINS)
        turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": reply}]
        return self._renderer.document(turns, ())


CHAIN_COURSE = Course(CHAINS, build_tokenizer, ChainText, with_systems=False)
