"""The prior belief about a prompt's pass rate: the Beta distribution that fits the prompts that were seen so far.

If most prompts are passed always or never, two equal replies already make a belief strong. With a uniform prior they
would hardly change it. The method is empirical Bayes: the counts of the prompts are taken as draws of a beta-binomial
distribution, whose parameters are fitted.
"""

from collections.abc import Mapping

import numpy as np

Prior = tuple[float, float]  # the parameters (a, b) of a Beta distribution
UNIFORM: Prior = (1.0, 1.0)
# Of a prompt: how many of how many replies passed. The weight says how many prompts had this count.
Counts = Mapping[tuple[int, int], float]
_VALUES = 2.0 ** (np.arange(-20, 17) / 4)  # from 1/32 to 16


def fit_prior(counts: Counts, near: Prior = UNIFORM, spread: float = 1.0) -> Prior:
    """The likeliest (a, b), each from 1/32 to 16, for the counts.

    log a and log b have a normal prior with the mean `near` (its logarithms) and the standard deviation `spread`. So
    the result is close to `near` if there are few prompts, or only one reply to each, which tells no more than the mean
    pass rate.
    """
    log_a, log_b = np.log(_VALUES)[:, None], np.log(_VALUES)[None, :]
    total = -((log_a - np.log(near[0])) ** 2 + (log_b - np.log(near[1])) ** 2) / (2 * spread**2)
    most = max((n for _, n in counts), default=0)
    single = _log_rising(_VALUES, most)
    both = _log_rising(_VALUES[:, None] + _VALUES[None, :], most)
    for (passes, n), weight in sorted(counts.items()):
        total = total + weight * (single[:, passes][:, None] + single[:, n - passes][None, :] - both[..., n])
    a, b = np.unravel_index(int(np.argmax(total)), total.shape)
    return float(_VALUES[a]), float(_VALUES[b])


def _log_rising(values: np.ndarray, most: int) -> np.ndarray:
    """log Gamma(x + n) - log Gamma(x) for n = 0 to `most`, as the last axis."""
    steps = np.log(values[..., None] + np.arange(most))
    return np.concatenate([np.zeros((*values.shape, 1)), np.cumsum(steps, axis=-1)], axis=-1)
