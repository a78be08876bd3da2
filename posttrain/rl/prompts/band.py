"""The prompts of a profile whose pass rate lies in a band."""

import math
from collections import Counter
from collections.abc import Sequence

from posttrain.data.stored import pick
from posttrain.errors import ConfigError
from posttrain.records import Row
from posttrain.rl.prompts.difficulty import Difficulty

ALL = (0.0, 1.0)  # the band that leaves out no prompt


def select_band(difficulties: Sequence[Difficulty], rows: Sequence[Row], band: Sequence[float] | None) -> Sequence[Row]:
    """The rows whose pass rate lies in the band; says which bands would select how many if none does.

    Without a band these are all rows but those of which the profile could score no reply.
    """
    if band is None:
        lost = {item.prompt_id for item in difficulties if not item.n}
        return pick(rows, [place for place, row in enumerate(rows) if row.id not in lost]) if lost else rows
    chosen = {item.prompt_id for item in difficulties if item.selected}
    if not chosen:
        raise ConfigError(
            "profile.band", [f"got {list(band)}: no prompt's pass rate lies in it; {_bands(difficulties, band)}"]
        )
    return pick(rows, [place for place, row in enumerate(rows) if row.id in chosen])


def _bands(difficulties: Sequence[Difficulty], band: Sequence[float]) -> str:
    """The pass rates that there are, and the smallest bands that would select something."""
    counts = Counter(round(item.pass_rate, 2) for item in difficulties)
    found = ", ".join(f"{rate:.2f}: {count}" for rate, count in sorted(counts.items()))
    below = [item.pass_rate for item in difficulties if item.pass_rate < band[0]]
    above = [item.pass_rate for item in difficulties if item.pass_rate > band[1]]
    wider = [[math.floor(100 * max(below)) / 100, band[1]]] if below else []
    wider += [[band[0], math.ceil(100 * min(above)) / 100]] if above else []
    bands = [*wider, [0.0, 1.0]]
    selected = ", ".join(f"{wide} {sum(item.in_band(wide) for item in difficulties)}" for wide in bands)
    return f"prompts by rate: {found}; other bands would select: {selected}"
