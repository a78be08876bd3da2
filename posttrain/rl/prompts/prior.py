"""The prior belief about a prompt's pass rate: the Beta distribution that fits the whole profile.

If most prompts are passed always or never, two equal replies already make a belief strong. With a uniform prior they
would hardly change it, and the profile would have little effect on the draw of prompts. The method is empirical Bayes:
the counts of all prompts are taken as draws of a beta-binomial distribution, whose parameters are fitted.
"""

import math
from collections import Counter
from collections.abc import Iterable

from posttrain.rl.prompts.difficulty import Difficulty

Prior = tuple[float, float]  # the parameters (a, b) of a Beta distribution
UNIFORM: Prior = (1.0, 1.0)
_VALUES = [2.0 ** (exponent / 4) for exponent in range(-16, 9)]  # from 1/16 to 4


def fit_prior(difficulties: Iterable[Difficulty]) -> Prior:
    """The likeliest (a, b), each from 1/16 to 4, for the counts of passes among n replies of each prompt.

    log a and log b have a normal prior with mean 0 and standard deviation 1. So the result is near the uniform prior if
    there are few prompts, or only one reply to each, which tells no more than the mean pass rate.
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
