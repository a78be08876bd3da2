"""What to believe of a prompt's pass rate before it is sampled: the Beta distribution that fits the whole profile.

Where most prompts are passed always or never, two replies of one kind already say much; with a uniform prior they would
say little, and the profile would be lost on the draw. Empirical Bayes: the counts of all prompts, as draws of a
beta-binomial distribution, choose the prior that each of them starts from.
"""

import math
from collections import Counter
from collections.abc import Iterable

from posttrain.rl.prompts.difficulty import Difficulty

Prior = tuple[float, float]  # of a Beta distribution
UNIFORM: Prior = (1.0, 1.0)
_VALUES = [2.0 ** (exponent / 4) for exponent in range(-16, 9)]  # from 1/16 to 4


def fit_prior(difficulties: Iterable[Difficulty]) -> Prior:
    """The likeliest (a, b), each from 1/16 to 4, for counts of passes among n replies.

    log a and log b are normal around 0 beforehand, with a deviation of 1: few prompts, or one reply each, which tell no
    more than a mean, leave the prior near the uniform one.
    """
    counts = Counter((item.passes, item.n) for item in difficulties if item.n)
    if not counts:
        return UNIFORM

    def log_posterior(prior: Prior) -> float:
        a, b = prior
        likelihood = sum(
            prompts * (_log_beta(a + passes, b + n - passes) - _log_beta(a, b))
            for (passes, n), prompts in counts.items()
        )
        return likelihood - (math.log(a) ** 2 + math.log(b) ** 2) / 2

    return max(((a, b) for a in _VALUES for b in _VALUES), key=log_posterior)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
