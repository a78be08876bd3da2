"""95% intervals: Wilson's for a share of yes-or-no outcomes, the bootstrap for a mean over prompts.

Left out: the difference between two policies on the same prompts (paired.py).
"""

from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
NUM_RESAMPLES = 2000
_MAX_DRAWS = 1 << 22  # indices held at once, so that 100,000 prompts do not need gigabytes


def wilson_ci95(successes: float, n: int) -> tuple[float, float]:
    """Wilson score interval of a share: `successes` out of `n` independent trials. Returns (low, high) in [0, 1].

    Raises ValueError unless n >= 1 and 0 <= successes <= n.
    Source: Wilson 1927, Journal of the American Statistical Association 22(158).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_ci95({successes}, {n}): needs n >= 1 and 0 <= successes <= n")
    share, z2n = successes / n, Z95**2 / n
    center = (share + z2n / 2) / (1 + z2n)
    half = Z95 * (share * (1 - share) / n + z2n / (4 * n)) ** 0.5 / (1 + z2n)
    low, high = max(0.0, center - half), min(1.0, center + half)
    # Rounding must not push the share itself, at 0 or 1, out of its interval.
    return min(low, share), max(high, share)


def bootstrap_ci95(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean of `values`, one number in [0, 1] for each prompt. Returns (low, high).

    If all values are equal, resampling shows no spread and the interval would have width 0. Then Wilson's interval is
    returned, which is wide enough for any numbers in [0, 1] with that mean. Raises ValueError if there are no values or
    one is outside of [0, 1].
    Source: Efron 1979, Annals of Statistics 7(1).
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or not bool(np.all((data >= 0) & (data <= 1))):
        raise ValueError(f"bootstrap_ci95 of {data.size} values: needs at least one, each in [0, 1]")
    if data.min() == data.max():
        return wilson_ci95(float(data[0]) * data.size, data.size)
    generator = np.random.default_rng(seed)
    rows = max(1, _MAX_DRAWS // data.size)
    means = [
        data[generator.integers(data.size, size=(min(rows, NUM_RESAMPLES - start), data.size))].mean(axis=1)
        for start in range(0, NUM_RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
