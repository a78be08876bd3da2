"""pass@k: the chance that at least one of k samples is right, estimated without bias from n samples."""

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of pass@k from `n` samples of one prompt, `c` of them right: 1 - C(n-c, k) / C(n, k).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): needs 0 <= c <= n and 1 <= k <= n")
    # Exact integers: the product form of the paper loses digits, and big binomials are cheap at these sizes.
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
