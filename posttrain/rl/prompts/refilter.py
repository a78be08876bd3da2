"""Which prompts are probed beside the training, so that what is believed of them is of the current policy.

The controller sends probes as groups of low priority that are never trained on, and reports what came of them to
`Curriculum.observe`. Nothing is kept here: what was probed last is in the curriculum's beliefs, so a resumed run goes
on by itself.
"""

import random
from collections.abc import Collection

from posttrain.rl.prompts.config import RefilterConfig
from posttrain.rl.prompts.curriculum import Curriculum


class Refilter:
    """Every `every` steps, the `prompts` prompts of which least is known."""

    def __init__(self, config: RefilterConfig):
        self._config = config

    @property
    def samples(self) -> int:
        """Replies to sample for each prompt that is probed."""
        return self._config.samples

    def due(self, step: int) -> bool:
        """Whether probes are to be sent when `step` optimizer steps are done; never at 0, the profile is fresh then."""
        return step > 0 and step % self._config.every == 0

    def choose(self, curriculum: Curriculum, step: int, rng: random.Random, exclude: Collection[str] = ()) -> list[str]:
        """Ids of the prompts to probe, the one of which least is known first; parked and retired ones are among them.

        Little is known of a prompt that was sampled long ago, or seldom: evidence fades by half every `half_life`
        steps. step: optimizer steps done, at which the evidence is compared. rng: settles ties. exclude: ids that
        are being probed already.
        """
        ids = sorted(set(curriculum.prompt_ids) - set(exclude))
        rng.shuffle(ids)
        ids.sort(key=lambda name: curriculum.belief(name, step).evidence)
        return ids[: self._config.prompts]
