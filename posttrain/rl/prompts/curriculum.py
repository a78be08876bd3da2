"""The curriculum: a belief about the pass rate of each prompt, and a band of pass rates that moves from easy to hard.

The belief is a Beta distribution with the parameters a + passes and b + failures. It counts the rollouts of the profile
and all rollouts since; the prior (a, b) fits the whole profile (prior.py). A rollout counts half after `half_life`
steps, a quarter after twice as many, and so on. A prompt is drawn in proportion to the probability, according to its
belief, that its pass rate lies in the band.

                 surely solved                        surely impossible
    retired ◄─────────────────── active ◄──────────────────────────────► parked
            ──────────────────►         a re-probe or refresh passes

Retired prompts are not drawn. Parked ones are drawn within a budget: `reprobe_fraction` of the draws, on average. Only
rollouts change a state, never time alone. Left out: drawing (source.py) and refreshes (refilter.py).
"""

import numbers
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from posttrain.errors import PluginError
from posttrain.rl.prompts.config import SCHEDULES, CurriculumConfig
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.prior import UNIFORM, Prior
from posttrain.scoring.plugins.lookup import load_function
from posttrain.scoring.plugins.target import describe

# A prompt counts as solved above this mean pass rate, and as impossible below 1 minus it...
SOLVED_PASS_RATE = 0.9
# ...once the mean rests on at least this many rollouts (after the discount).
MIN_ROLLOUTS = 4.0
ADAPTIVE_GAIN = 4.0
# A pass rate always lies less than 1 outside the band. So a miss of 1 or more can mark a prompt that is drawn only if
# no other is left.
EXCLUDED_MISS = 1.0
_GRID = (np.arange(256) + 0.5) / 256

State = Literal["active", "retired", "parked"]


@dataclass(slots=True)
class Belief:
    """Discounted counts of rollouts that passed and failed, as of policy version `version`, on top of a prior."""

    passes: float
    failures: float
    version: int
    prior: Prior = UNIFORM

    @property
    def shape(self) -> tuple[float, float]:
        """The two parameters of the Beta distribution."""
        return self.prior[0] + self.passes, self.prior[1] + self.failures

    @property
    def mean(self) -> float:
        """Expected pass rate."""
        passes, failures = self.shape
        return passes / (passes + failures)

    @property
    def evidence(self) -> float:
        """How many rollouts the belief counts, after the discount."""
        return self.passes + self.failures

    @property
    def verdict(self) -> State:
        """The state that the belief alone would give a prompt."""
        if self.evidence < MIN_ROLLOUTS or 1 - SOLVED_PASS_RATE <= self.mean <= SOLVED_PASS_RATE:
            return "active"
        return "retired" if self.mean > SOLVED_PASS_RATE else "parked"


class Curriculum:
    """Beliefs about prompts, and the band of optimizer step `step` of `steps`.

    A prompt that the profile did not select starts as retired if most of its replies passed, else as parked. prior: the
    prior of every prompt's pass rate.
    """

    def __init__(
        self, config: CurriculumConfig, difficulties: Iterable[Difficulty], steps: int, *, prior: Prior = UNIFORM
    ):
        self._config = config
        self._prior = prior
        self._steps = steps
        self._function = None if config.schedule in SCHEDULES else load_function(config.schedule, "schedule")
        self._version = 0
        self._position = 0.0  # of the band on its way from `first` to `last`
        self._num_reprobes = 0
        self._beliefs: dict[str, Belief] = {}
        self._states: dict[str, State] = {}
        self._capability: dict[str, str] = {}
        for item in difficulties:
            belief = Belief(item.passes, item.n - item.passes, item.policy_version, prior)
            self._beliefs[item.prompt_id] = belief
            self._capability[item.prompt_id] = item.capability
            outside: State = "retired" if belief.mean > 0.5 else "parked"
            self._states[item.prompt_id] = belief.verdict if item.selected else outside
        self._reprobe_chance = self._reprobe_chances()

    @property
    def prompt_ids(self) -> list[str]:
        """The ids of all prompts about which there is a belief."""
        return list(self._beliefs)

    @property
    def band(self) -> tuple[float, float]:
        """The lowest and highest pass rate of the current band."""
        (low, high), (last_low, last_high) = self._config.first, self._config.last
        return low + self._position * (last_low - low), high + self._position * (last_high - high)

    def state_of(self, prompt_id: str) -> State:
        """active, retired or parked."""
        return self._states.get(prompt_id, "active")

    def belief(self, prompt_id: str, version: int | None = None) -> Belief:
        """The belief about a prompt at a policy version; None: the current one. This changes nothing."""
        at = self._version if version is None else version
        belief = self._beliefs.get(prompt_id, Belief(0.0, 0.0, at, self._prior))
        kept = self._kept(at - belief.version)
        return replace(belief, passes=belief.passes * kept, failures=belief.failures * kept, version=at)

    def observe(
        self, prompt_id: str, passes: int, failures: int, *, version: int | None = None, refresh: bool = False
    ) -> None:
        """Count scored rollouts of a prompt. version: of the policy that sampled them; None: the current one.

        refresh: the rollouts are a probe of the refilter, and do not count as a draw.
        """
        state = self.state_of(prompt_id)
        self._num_reprobes += state == "parked" and not refresh
        belief = self.belief(prompt_id)
        kept = 1.0 if version is None else self._kept(self._version - version)
        belief = replace(belief, passes=belief.passes + kept * passes, failures=belief.failures + kept * failures)
        self._beliefs[prompt_id] = belief
        # Decay alone never changes a state: it only weakens the evidence. A retired prompt returns only after a
        # failure, a parked one only after a pass.
        contrary = {"active": passes + failures, "retired": failures, "parked": passes}[state]
        if contrary:
            self._states[prompt_id] = belief.verdict

    def miss(self, prompt_id: str, rng: random.Random) -> float:
        """How far a pass rate, drawn from the belief, lies outside the band; 0 if inside. This changes nothing.

        So if a prompt is taken whenever its miss is 0, it is taken in proportion to the probability that it lies in the
        band. The miss of a parked prompt is 0 as often as the budget allows, and otherwise EXCLUDED_MISS or more. That
        of a retired prompt is always more. The draw does not count a look at such a prompt as a try.
        """
        belief, state = self.belief(prompt_id), self.state_of(prompt_id)
        rate = rng.betavariate(*belief.shape)
        low, high = self.band
        miss = max(low - rate, rate - high, 0.0)
        if state == "retired":
            return 2 * EXCLUDED_MISS + miss
        if state == "parked":
            chance = self._reprobe_chance.get(self._capability.get(prompt_id, ""), 0.0)
            return 0.0 if rng.random() < chance else EXCLUDED_MISS + miss
        return miss

    def advance(self, version: int, pass_rate: float) -> None:
        """Move the band after an optimizer step. pass_rate: of all rollouts that were generated for the step.

        constant: the band stays. linear: it reaches `last` when training ends. adaptive: it gets harder while rollouts
        pass more often than the middle of the band, and easier while they pass less often, in proportion to the
        difference. A function of the user is called with (step, steps, pass_rate, position) and returns the new
        position, from 0 (`first`) to 1 (`last`); PluginError is raised if it does not.
        """
        self._version = version
        self._position = self._next_position(version, pass_rate)
        self._reprobe_chance = self._reprobe_chances()

    def figures(self) -> dict[str, float]:
        """Figures for the metrics of a step. reprobes: groups of parked prompts since training began."""
        low, high = self.band
        states = Counter(self._states.values())
        return {
            "band_low": low,
            "band_high": high,
            "prompts_known": sum(self.belief(name).evidence >= MIN_ROLLOUTS for name in self._beliefs),
            "prompts_retired": states["retired"],
            "prompts_parked": states["parked"],
            "reprobes": self._num_reprobes,
        }

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return {
            "version": self._version,
            "position": self._position,
            "reprobes": self._num_reprobes,
            "beliefs": {name: [item.passes, item.failures, item.version] for name, item in self._beliefs.items()},
            "states": dict(self._states),
            "reprobe_chance": dict(self._reprobe_chance),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._version, self._position = state["version"], state["position"]
        self._num_reprobes = state["reprobes"]
        self._beliefs = {
            name: Belief(passes, failures, version, self._prior)
            for name, (passes, failures, version) in state["beliefs"].items()
        }
        self._states = dict(state["states"])
        self._reprobe_chance = dict(state["reprobe_chance"])

    def _kept(self, age: int) -> float:
        return 0.5 ** (max(0, age) / self._config.half_life)

    def _reprobe_chances(self) -> dict[str, float]:
        """For each capability, the chance with which a parked prompt is taken when a draw looks at it.

        A draw looks at prompts one by one. It stops at the first parked prompt that is taken by this chance, at the
        first active prompt in the band, or after T = `tries` prompts that are active or taken. For one look, let f be
        the chance of an active prompt, y that of an active prompt in the band, and x that of a parked prompt which is
        taken. Then the chance that a draw takes a parked prompt is at most x / (x + y), and also at most T x / (x + f).
        The method chooses the largest x for which one of these two bounds is within the budget r. It uses the beliefs
        at the beginning of the step.
        """
        budget, per_try = self._config.reprobe_fraction, self._config.reprobe_fraction / self._config.tries
        names: dict[str, list[str]] = {}
        for name, capability in self._capability.items():
            names.setdefault(capability, []).append(name)
        chances = {}
        for capability, members in names.items():
            num_parked = sum(self._states[name] == "parked" for name in members)
            active = [self.belief(name) for name in members if self._states[name] == "active"]
            if num_parked and active:
                taken = max(self._in_band(active) * _odds(budget), len(active) * _odds(per_try))
                chances[capability] = min(1.0, taken / num_parked)
        return chances

    def _in_band(self, beliefs: list[Belief]) -> float:
        """The expected number of prompts in the band: the sum of the mass of each Beta there, on a grid."""
        low, high = self.band
        inside = (low <= _GRID) & (high >= _GRID)
        total = 0.0
        for start in range(0, len(beliefs), 4096):  # so that many prompts do not need much memory at once
            passes, failures = np.array([belief.shape for belief in beliefs[start : start + 4096]]).T - 1
            log_density = np.outer(passes, np.log(_GRID)) + np.outer(failures, np.log1p(-_GRID))
            density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
            total += float((density[:, inside].sum(axis=1) / density.sum(axis=1)).sum())
        return total

    def _next_position(self, step: int, pass_rate: float) -> float:
        """The position of the band, from 0 (`first`) to 1 (`last`), after optimizer step `step`; see `advance`."""
        if self._function is not None:
            return self._called_position(step, pass_rate)
        if self._config.schedule == "linear":
            return min(1.0, step / self._steps)
        if self._config.schedule == "adaptive":
            moved = ADAPTIVE_GAIN * (pass_rate - sum(self.band) / 2) / self._steps
            return min(1.0, max(0.0, self._position + moved))
        return self._position

    def _called_position(self, step: int, pass_rate: float) -> float:
        """The position that the user's function returns. Raises PluginError if it returns no number from 0 to 1."""
        name = self._config.schedule
        assert self._function is not None
        try:
            value: Any = self._function(step, self._steps, pass_rate, self._position)
        except Exception as error:
            raise PluginError(f"curriculum.schedule {name!r} failed at step {step}: {describe(error)}") from error
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not 0 <= float(value) <= 1:  # NaN is neither
            raise PluginError(
                f"curriculum.schedule {name!r} returned {value!r} at step {step}; it must return a number from 0 "
                "(the band `first`) to 1 (`last`)"
            )
        return float(value)


def _odds(chance: float) -> float:
    return chance / (1 - chance)
