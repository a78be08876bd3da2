"""What the first groups of the training say about the prompts: pass rates, and pass@k, without a profile.

The first group of a prompt is drawn before anything is known about this prompt. So of each stratum (beliefs.py), first
groups are a fair sample, and the estimates are unbiased, each for the policy of its time.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from msgspec.structs import replace

from posttrain.data.places import Places
from posttrain.metrics.pass_at_k import pass_at_k
from posttrain.records import Row
from posttrain.rl.prompts.beliefs import Stratum, strata_of
from posttrain.rl.prompts.config import PromptsConfig
from posttrain.rl.prompts.difficulty import Difficulty, write_estimates
from posttrain.rl.prompts.fingerprints import prompt_fingerprint
from posttrain.rl.prompts.profile import FILE, profile_basis


def first_group_figures(
    config: PromptsConfig, run: Path, rows: Sequence[Row], *, found: Sequence[Difficulty]
) -> dict[str, Any]:
    """Write difficulty.parquet as a profile would, with the prompts that were drawn, and return figures of the stage.

    run: the stage's folder. found: see `Beliefs.first_groups`.
    """
    if not found:
        return {}
    place = Places(rows, lambda row: row.id)
    known = [replace(item, prompt=prompt_fingerprint(rows[place[item.prompt_id]])) for item in found]
    write_estimates(run / FILE, known, profile_basis(config))
    k = config.first_replies or config.group_size  # replies that were sampled whatever the others were
    pass_at = pool_pass_at_k(rows, found, k=k, predictor=config.selection.predictor)
    return {"drawn_prompts": len(found), "pass_at_k": pass_at}


def pool_pass_at_k(
    rows: Sequence[Row], found: Sequence[Difficulty], *, k: int, predictor: str | None
) -> dict[str, dict[str, float]]:
    """For each capability: how many prompts were drawn, and the mean pass@1 and pass@k of all its prompts.

    A stratum counts by the number of its rows, because some are drawn more than others.
    """
    strata, number_N = strata_of(rows, predictor)
    place = Places(rows, lambda row: row.id)
    sizes = dict(zip(strata, np.bincount(number_N).tolist(), strict=True))
    of_stratum: dict[Stratum, list[Difficulty]] = defaultdict(list)
    for item in found:
        if item.n >= k:
            of_stratum[strata[number_N[place[item.prompt_id]]]].append(item)
    result = {}
    for capability in sorted({name for name, _ in of_stratum}):
        seen = {stratum: items for stratum, items in of_stratum.items() if stratum[0] == capability}
        total = sum(sizes[stratum] for stratum in seen)
        result[capability] = {"prompts": float(sum(map(len, seen.values())))} | {
            f"pass@{size}": sum(
                sizes[stratum] / total * fmean(pass_at_k(item.n, item.passes, size) for item in items)
                for stratum, items in seen.items()
            )
            for size in dict.fromkeys((1, k))
        }
    return result
