"""The shares of modalities in a batch, moved by what each still learns.

For every reply the belief about its prompt says how probable it was that it passes. If replies of a modality pass more
often than was expected, the policy learns it; if they pass more rarely, it forgets. The progress of a modality is the
expected distance between its pass rate now, which is known as a Beta distribution, and the one that was expected. So a
modality of which little is known counts as one that may move. It does not matter that hard prompts are drawn more often
than easy ones, because the expectation is that of the drawn prompts.

A modality gets `floor` of its first share in any case, and of the rest a part in proportion to its first share and its
progress. Source: "Teacher-Student Curriculum Learning" (arXiv 1707.00183), which too takes the absolute value of
progress, so that what is being forgotten is trained again.
"""

from collections.abc import Mapping
from math import fsum
from typing import Any

import numpy as np

from posttrain.config.images import Modality
from posttrain.rl.prompts.config import ModalityCurriculumConfig
from posttrain.rl.prompts.quotas import Modalities

_NUM_DRAWS = 2048
_PRIOR = 2.0  # replies that say what was expected, before there are any


class Progress:
    """What each modality still learns. first: the shares of modalities at the start, on any scale; 0 leaves one out."""

    def __init__(self, first: Modalities, config: ModalityCurriculumConfig):
        total = sum(first.values())
        self.first = {name: share / total for name, share in first.items() if share > 0}
        self.shares = dict(self.first)
        self._config = config
        self._version = 0
        # Passes, failures and expected passes, discounted as of `_version`, and those since.
        self._seen = {name: np.zeros(3) for name in self.first}
        self._new: dict[str, list[tuple[int, int, float]]] = {name: [] for name in self.first}

    def observe(self, modality: Modality, passes: int, failures: int, *, expected: float) -> None:
        """Count the replies of a group. expected: their pass rate by the belief before them."""
        if modality in self._new:
            self._new[modality].append((passes, failures, expected * (passes + failures)))

    def advance(self, version: int) -> None:
        """Move the shares by what was seen before the optimizer step that made `version`."""
        kept = 0.5 ** ((version - self._version) / self._config.half_life)
        self._version = version
        for name, groups in self._new.items():
            # fsum does not depend on the order in which groups are scored.
            new = [fsum(column) for column in zip(*groups, strict=True)] or [0.0, 0.0, 0.0]
            self._seen[name] = kept * (self._seen[name] + new)
            groups.clear()
        self._move()

    def progress(self, modality: str) -> float:
        """The expected distance of a modality's pass rate from the one that was expected."""
        passes, failures, expected = self._seen[modality]
        replies = passes + failures
        before = expected / replies if replies else 0.5
        rates = np.random.default_rng(0).beta(
            _PRIOR * before + passes + 1e-9, _PRIOR * (1 - before) + failures + 1e-9, _NUM_DRAWS
        )
        return float(np.abs(rates - before).mean())

    def figures(self) -> dict[str, float]:
        """For the metrics of a step: the share of each modality in the batches to come, and its progress."""
        shares = {f"modality_share/{name}": share for name, share in self.shares.items()}
        return shares | {f"modality_progress/{name}": self.progress(name) for name in self.shares}

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint, right after `advance`."""
        return {"version": self._version, "seen": {name: values.tolist() for name, values in self._seen.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._version = state["version"]
        for name in self._seen:
            self._seen[name] = np.array(state["seen"].get(name, [0.0, 0.0, 0.0]))
            self._new[name].clear()
        self._move()

    def _move(self) -> None:
        weights = {name: share * self.progress(name) for name, share in self.first.items()}
        total, floor = sum(weights.values()), self._config.floor
        self.shares = {
            name: floor * share + (1 - floor) * (weights[name] / total if total else share)
            for name, share in self.first.items()
        }
