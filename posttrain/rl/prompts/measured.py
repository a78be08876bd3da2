"""What the first groups of the training say about the prompts: pass rates, and pass@k, without a profile.

The first group of a prompt is drawn before anything is known about this prompt. So of each stratum (beliefs.py), first
groups are a fair sample, and the estimates are unbiased, each for the policy of its time. Of a group that began with
some replies only these count.
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
    # Replies that were sampled whatever the others were: those of groups that were sampled at once, or the first ones.
    sizes = sorted({config.first_replies or config.group_size, config.group_size})
    pass_at = pool_pass_at_k(rows, found, sizes, predictor=config.selection.predictor)
    return {"drawn_prompts": len(found), "pass_at_k": pass_at}


def pool_pass_at_k(
    rows: Sequence[Row], found: Sequence[Difficulty], sizes: Sequence[int], *, predictor: str | None
) -> dict[str, dict[str, float]]:
    """For each capability: how many prompts were drawn, and the mean pass@1 and pass@k of all its prompts.

    sizes: the values of k, the least first. A prompt counts for each k up to the number of its scored replies; one with
    fewer than the least does not count at all. Whether a prompt's first group was sampled at once depends on its
    stratum alone, so those that were are a fair sample too. A stratum counts by the number of its rows, because some
    are drawn more than others.
    """
    strata, number_N = strata_of(rows, predictor)
    place = Places(rows, lambda row: row.id)
    rows_in = dict(zip(strata, np.bincount(number_N).tolist(), strict=True))
    of_stratum: dict[Stratum, list[Difficulty]] = defaultdict(list)
    for item in found:
        if item.n >= sizes[0]:
            of_stratum[strata[number_N[place[item.prompt_id]]]].append(item)
    result = {}
    for capability in sorted({name for name, _ in of_stratum}):
        seen = {stratum: items for stratum, items in of_stratum.items() if stratum[0] == capability}
        result[capability] = {"prompts": float(sum(map(len, seen.values())))}
        for k in dict.fromkeys((1, *sizes)):
            of_k = {stratum: [item for item in items if item.n >= k] for stratum, items in seen.items()}
            means = {
                stratum: fmean(pass_at_k(item.n, item.passes, k) for item in items)
                for stratum, items in of_k.items()
                if items
            }
            if means:
                total = sum(rows_in[stratum] for stratum in means)
                result[capability][f"pass@{k}"] = sum(rows_in[name] / total * mean for name, mean in means.items())
    return result
