"""What is known about the pass rate of every prompt: a Beta distribution for each, and a prior that is fitted.

The belief about a prompt has the parameters a + passes and b + failures. A reply counts half after `half_life`
optimizer steps, a quarter after twice as many, because the policy has moved. The prior (a, b) is that of the prompt's
stratum: its capability, its modality (text, one picture, several) where rows differ in it, and the value of the row's
field `predictor` if there is one. It fits the first groups of the prompts seen so far (prior.py). First groups are a
fair sample of the stratum, because nothing distinguishes prompts that were not seen. A stratum with little evidence has
about the prior of its capability, and a capability that of all prompts.

Arrays have an entry for each prompt [N] and lie on disk (arrays.py), 56 bytes a prompt, 8 of them for its id. Of a
prompt that had a scored reply, its place is in memory.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from posttrain.data.arrays import computed, copied, gathered, numbers_of, where, zeros
from posttrain.data.images.modality import modality_of
from posttrain.data.places import Places
from posttrain.errors import ConfigError
from posttrain.records import Row
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.prior import UNIFORM, Prior, fit_prior
from posttrain.rl.prompts.quotas import Modalities, places_by_quota

# How far the prior of a stratum may lie from that of its capability, and this from that of all prompts: the standard
# deviation of its logarithms as long as there is no evidence.
SPREAD = 0.5
# Old first groups are forgotten only as long as there are at least as many newer ones.
LEAST_FIRST_GROUPS = 64.0
FORGOTTEN = 0.01  # counts below this are taken as 0
NUM_BINS = 8  # of a predictor with more numbers than this

Stratum = tuple[str, str]  # capability; modality and value of the predictor


class Beliefs:
    """Beliefs about the pass rates of the rows' prompts. predictor: the name of a field of the rows, or None."""

    def __init__(self, rows: Sequence[Row], half_life: float, predictor: str | None = None):
        self._rows = rows
        self.place = Places(rows, lambda row: row.id)
        self._half_life = half_life
        self._strata, self._stratum_N = strata_of(rows, predictor)
        self._priors = np.tile(np.array(UNIFORM), (len(self._strata), 1))
        self._version = 0
        # Discounted counts as of `_version`, and the replies since, apart: sums of whole numbers do not depend on the
        # order in which groups are scored.
        self._passes_N, self._failures_N = zeros(len(rows), np.float64), zeros(len(rows), np.float64)
        self._new_passes_N, self._new_failures_N = zeros(len(rows), np.float64), zeros(len(rows), np.float64)
        # Of the first group of each prompt: scored replies (0 if it was not seen), passes, policy version.
        self._first_N3 = zeros((len(rows), 3), np.int32)
        self._seen: set[int] = set()  # the places of the prompts with a first group
        self._first: dict[Stratum, Counter[tuple[int, int]]] = defaultdict(Counter)  # as `prior.Counts`

    def id_of(self, place: int) -> str:
        """The id of the prompt at a place."""
        return self._rows[place].id

    def of_quotas(self, modalities: Modalities | None) -> dict[str, np.ndarray]:
        """The places of the prompts of each quota, by name. modalities: see `quota_of`."""
        if modalities:
            return places_by_quota(self._rows, modalities)
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, (capability, _) in enumerate(self._strata):
            numbers[capability].append(number)
        every = range(len(self._rows))
        return {
            name: where(every, lambda places, some=some: np.isin(self._stratum_N[places], some))
            for name, some in sorted(numbers.items())
        }

    @property
    def num_seen(self) -> int:
        """How many prompts have had a scored reply."""
        return len(self._seen)

    def is_seen(self, places: np.ndarray) -> np.ndarray:
        """Whether the prompts at these places have had a scored reply [n]."""
        return self._first_N3[places, 0] > 0

    def observe(
        self, prompt_id: str, passes: int, failures: int, *, version: int, first: tuple[int, int] | None = None
    ) -> None:
        """Count the scored replies of a group, as if the current policy had sampled them. version: the one that did.

        first: passes and failures among the replies that were sampled whatever the others were; None: all.
        """
        if not passes + failures:
            return
        place = self.place[prompt_id]
        self._new_passes_N[place] += passes
        self._new_failures_N[place] += failures
        if not self._first_N3[place, 0]:
            sure = first if first is not None and sum(first) else (passes, failures)
            self._first_N3[place] = sum(sure), sure[0], version
            self._seen.add(place)
            self._first[self._strata[self._stratum_N[place]]][passes, passes + failures] += 1

    def advance(self, version: int) -> None:
        """Discount what was seen before, and fit the priors, as of policy version `version`."""
        kept = 0.5 ** ((version - self._version) / self._half_life)
        self._version = version
        seen = self._seen_places()  # the counts of the others are 0
        for old, new in ((self._passes_N, self._new_passes_N), (self._failures_N, self._new_failures_N)):
            counts = (old[seen] + new[seen]) * kept
            old[seen] = np.where(counts < FORGOTTEN, 0.0, counts)
            new[seen] = 0.0
        total = sum(counts.total() for counts in self._first.values())
        if total > LEAST_FIRST_GROUPS:
            kept = max(kept, LEAST_FIRST_GROUPS / total)
            for counts in self._first.values():
                for key in counts:
                    counts[key] *= kept  # type: ignore[assignment]  # a Counter of weights
        self.fit()

    def fit(self) -> None:
        """Fit the prior of every stratum to the first groups."""
        of_capability: dict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
        for (capability, _), counts in self._first.items():
            of_capability[capability].update(counts)
        whole = Counter[tuple[int, int]]()
        for counts in of_capability.values():
            whole.update(counts)
        base = fit_prior(whole)
        near = {name: fit_prior(counts, base, SPREAD) for name, counts in of_capability.items()}
        several = Counter(capability for capability, _ in self._strata)
        for index, (capability, value) in enumerate(self._strata):
            prior = near.get(capability, base)
            if several[capability] > 1:
                prior = fit_prior(self._first.get((capability, value), {}), prior, SPREAD)
            self._priors[index] = prior

    def prior(self, prompt_id: str) -> Prior:
        """The prior of a prompt's stratum."""
        a, b = self._priors[self._stratum_N[self.place[prompt_id]]]
        return float(a), float(b)

    def shapes(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two parameters of the Beta distributions of the prompts at these places [n], [n]."""
        priors = self._priors[self._stratum_N[places]]
        passes = self._passes_N[places] + self._new_passes_N[places]
        failures = self._failures_N[places] + self._new_failures_N[places]
        return priors[:, 0] + passes, priors[:, 1] + failures

    def shape(self, place: int) -> tuple[float, float]:
        """The two parameters of the Beta distribution of one prompt; arrays would take ten times as long."""
        a, b = self._priors[self._stratum_N[place]].tolist()
        passes = self._passes_N[place] + self._new_passes_N[place]
        failures = self._failures_N[place] + self._new_failures_N[place]
        return a + float(passes), b + float(failures)

    def num_replies(self, places: np.ndarray) -> np.ndarray:
        """How many replies the beliefs about the prompts at these places count, each with what its age leaves [n]."""
        old = self._passes_N[places] + self._failures_N[places]
        return old + self._new_passes_N[places] + self._new_failures_N[places]

    def settled_rate(self, prompt_id: str) -> float:
        """The expected pass rate of a prompt as of the last `advance`, whatever was seen since."""
        place = self.place[prompt_id]
        a, b = self._priors[self._stratum_N[place]]
        a, b = a + self._passes_N[place], b + self._failures_N[place]
        return float(a / (a + b))

    def first_groups(self) -> list[Difficulty]:
        """How often the first group of each prompt passed that was seen.

        They are a fair sample of what the policy could do then: a prompt's first group decides nothing about itself.
        """
        return [
            Difficulty(self.id_of(place), self._strata[self._stratum_N[place]][0], n, passes, version, True, samples=n)
            for place in self._seen_places().tolist()
            for n, passes, version in [self._first_N3[place].tolist()]
        ]

    def _seen_places(self) -> np.ndarray:
        return np.array(sorted(self._seen), np.int64)

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint, right after `advance`. Only prompts that were seen are in it."""
        return {
            "version": self._version,
            "seen": {
                self.id_of(place): [
                    float(self._passes_N[place]),
                    float(self._failures_N[place]),
                    *self._first_N3[place].tolist(),
                ]
                for place in self._seen_places().tolist()
            },
            "first": [
                [*stratum, passes, n, weight]
                for stratum, counts in self._first.items()
                for (passes, n), weight in counts.items()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._version = state["version"]
        before = self._seen_places()
        for array in (self._passes_N, self._failures_N, self._new_passes_N, self._new_failures_N, self._first_N3):
            array[before] = 0
        self._seen.clear()
        for name, (passes, failures, *first) in state["seen"].items():
            place = self.place[name]
            self._passes_N[place], self._failures_N[place], self._first_N3[place] = passes, failures, first
            self._seen.add(place)
        self._first.clear()
        for capability, value, passes, n, weight in state["first"]:
            self._first[capability, value][passes, n] = weight
        self.fit()


def mixed_chance(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """The chance that n replies are neither all passed nor all failed, under Beta(a, b) of the pass rate [N]."""
    passed, failed = np.ones_like(a), np.ones_like(b)
    for seen in range(n):
        passed = passed * (a + seen) / (a + b + seen)
        failed = failed * (b + seen) / (a + b + seen)
    return 1 - passed - failed


def strata_of(rows: Sequence[Row], predictor: str | None) -> tuple[list[Stratum], np.ndarray]:
    """The strata in order, and the number of each row's [N]. Where rows are of several modalities, each has its own.

    Numbers of a predictor with many values are put into bins of equally many rows. Raises ConfigError for a row without
    the field `predictor`.
    """
    found: dict[tuple[str, str, str], int] = {}
    values = _values(rows, predictor) if predictor is not None else repeat("")
    number_N = gathered(
        (
            found.setdefault((row.capability, modality_of(row), str(value)), len(found))
            for row, value in zip(rows, values, strict=False)
        ),
        np.int32,
    )
    differ = len({modality for _, modality, _ in found}) > 1
    named = [(capability, f"{modality} {value}".strip() if differ else value) for capability, modality, value in found]
    strata = sorted(set(named))
    in_order = np.array([strata.index(stratum) for stratum in named], np.int32)
    return strata, computed(number_N, lambda numbers: in_order[numbers], np.int32)


def _values(rows: Sequence[Row], predictor: str) -> Iterable[Any]:
    """The predictor's value in each row, or its bin."""
    distinct: set[Any] = set()
    are_numbers = True
    for row in rows:
        value = row.fields.get(predictor)
        if not isinstance(value, str | int | float):
            found = f"has no field {predictor!r}" if value is None else f"has {value!r} in {predictor!r}"
            raise ConfigError(
                "selection.predictor",
                [
                    f"got {predictor!r}: row {row.id!r} {found}; every row needs a text or a number there. Name a "
                    "field that all rows have, or remove selection.predictor"
                ],
            )
        are_numbers = are_numbers and not isinstance(value, str)
        if are_numbers and len(distinct) <= NUM_BINS:
            distinct.add(value)
    values = (row.fields[predictor] for row in rows)
    if not are_numbers or len(distinct) <= NUM_BINS:
        return values
    numbers_N = gathered(values, np.float64)
    edges = np.unique(np.quantile(copied(numbers_N), np.arange(1, NUM_BINS) / NUM_BINS, overwrite_input=True))
    return numbers_of(computed(numbers_N, lambda numbers: np.searchsorted(edges, numbers, side="right"), np.int64))
