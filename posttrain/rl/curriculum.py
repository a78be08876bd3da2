"""Which prompts are worth sampling now: a belief about each one's pass rate, and a band that moves from easy to hard.

The belief is a Beta distribution over the pass rate: 1 + passes, 1 + failures, of the profile and of every rollout
since. What was seen of an older policy counts less, by half every `half_life` steps, so a prompt that nobody asked for
long becomes uncertain again. A prompt is sampled in proportion to the belief that its pass rate lies in the band:
solved prompts and impossible ones are hardly drawn, and are tried again as their belief widens.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.rl.config import CurriculumConfig
from posttrain.rl.profile import Difficulty

SURE = 0.9  # a prompt whose mean lies this far to one side counts as solved or impossible
EVIDENCE = 4.0  # once it rests on so many rollouts
ADAPTIVE_GAIN = 4.0


@dataclass(slots=True)
class Belief:
    """Discounted counts of rollouts that passed and failed, as of policy version `version`."""

    passes: float
    failures: float
    version: int

    @property
    def mean(self) -> float:
        """Expected pass rate."""
        return (1 + self.passes) / (2 + self.passes + self.failures)

    @property
    def evidence(self) -> float:
        """Rollouts that it rests on, after the discount."""
        return self.passes + self.failures


class Curriculum:
    """Beliefs about the selected prompts, and the band of optimizer step `step` of `steps`."""

    def __init__(self, config: CurriculumConfig, difficulties: Iterable[Difficulty], steps: int):
        self._config = config
        self._steps = steps
        self._version = 0
        self._position = 0.0  # of the band on its way from `first` to `last`
        self._beliefs = {
            item.prompt_id: Belief(item.passes, item.n - item.passes, item.policy_version) for item in difficulties
        }

    @property
    def band(self) -> tuple[float, float]:
        """Lowest and highest pass rate that is wanted now."""
        (low, high), (last_low, last_high) = self._config.first, self._config.last
        return low + self._position * (last_low - low), high + self._position * (last_high - high)

    def belief(self, prompt_id: str) -> Belief:
        """What is believed of a prompt at the current version."""
        belief = self._beliefs.setdefault(prompt_id, Belief(0.0, 0.0, self._version))
        kept = 0.5 ** (max(0, self._version - belief.version) / self._config.half_life)
        return Belief(belief.passes * kept, belief.failures * kept, self._version)

    def observe(self, prompt_id: str, passes: int, failures: int) -> None:
        """Rollouts of a prompt were scored."""
        belief = self.belief(prompt_id)
        self._beliefs[prompt_id] = Belief(belief.passes + passes, belief.failures + failures, self._version)

    def miss(self, prompt_id: str, rng: random.Random) -> float:
        """How far a pass rate drawn from the belief lies outside the band; 0 inside.

        Prompts that are taken when it is 0 are taken in proportion to the belief that they lie in the band.
        """
        belief = self.belief(prompt_id)
        rate = rng.betavariate(1 + belief.passes, 1 + belief.failures)
        low, high = self.band
        return max(low - rate, rate - high, 0.0)

    def advance(self, version: int, pass_rate: float) -> None:
        """An optimizer step is done; pass_rate: of all that was generated for it.

        constant: the band stays. linear: it is at `last` when training ends. adaptive: it gets harder as fast as
        rollouts pass more often than its middle, and easier while they pass less often.
        """
        self._version = version
        if self._config.schedule == "linear":
            self._position = min(1.0, version / self._steps)
        elif self._config.schedule == "adaptive":
            excess = pass_rate - sum(self.band) / 2
            self._position = min(1.0, max(0.0, self._position + ADAPTIVE_GAIN * excess / self._steps))

    def figures(self) -> dict[str, float]:
        """For the metrics of a step."""
        known = [belief for name in self._beliefs if (belief := self.belief(name)).evidence >= EVIDENCE]
        low, high = self.band
        return {
            "band_low": low,
            "band_high": high,
            "prompts_known": len(known),
            "prompts_solved": sum(belief.mean > SURE for belief in known),
            "prompts_impossible": sum(belief.mean < 1 - SURE for belief in known),
        }

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        beliefs = {name: [item.passes, item.failures, item.version] for name, item in self._beliefs.items()}
        return {"version": self._version, "position": self._position, "beliefs": beliefs}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._version, self._position = state["version"], state["position"]
        self._beliefs = {name: Belief(*item) for name, item in state["beliefs"].items()}
