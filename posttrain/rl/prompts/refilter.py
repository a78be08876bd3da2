"""Which prompts are probed during training, so that their estimated pass rates are those of the current policy.

The controller samples probes as groups of low priority that are never trained on, and gives their results to
`Curriculum.observe`. The refilter has no state of its own: which prompts were probed last follows from the curriculum's
beliefs, so a resumed run needs nothing else.
"""

import random
from collections.abc import Collection

from posttrain.rl.prompts.config import RefilterConfig
from posttrain.rl.prompts.curriculum import Curriculum


class Refilter:
    """Every `every` steps, the `prompts` prompts with the least evidence."""

    def __init__(self, config: RefilterConfig):
        self._config = config

    @property
    def samples(self) -> int:
        """Replies to sample for each prompt that is probed."""
        return self._config.samples

    def due(self, step: int) -> bool:
        """Whether probes are sent when `step` optimizer steps are done. Never at 0, when the profile is fresh."""
        return step > 0 and step % self._config.every == 0

    def choose(
        self, curriculum: Curriculum, step: int, rng: random.Random, *, exclude: Collection[str] = ()
    ) -> list[str]:
        """Ids of the prompts to probe, those with the least evidence first; parked and retired prompts are included.

        The evidence of a prompt is low if it was sampled long ago or seldom: it fades by half every `half_life` steps.
        step: optimizer steps done, at which the evidence is compared. rng: settles ties. exclude: ids of prompts that
        are being probed now.
        """
        ids = sorted(set(curriculum.prompt_ids) - set(exclude))
        rng.shuffle(ids)
        ids.sort(key=lambda name: curriculum.belief(name, step).evidence)
        return ids[: self._config.prompts]
