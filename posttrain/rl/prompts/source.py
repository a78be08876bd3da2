"""The prompt of each group: the row that the selection draws next, with a system instruction that is sampled for it.

With `selection.draw: in_turn` there is no selection: every prompt is drawn once before any is drawn again.

Every draw depends only on the seed, the group's dispatch order, how many prompts of the quota were drawn before,
and the beliefs. So a resumed run finds its position from the ledger.
"""

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from posttrain.config.rewards import SystemsConfig
from posttrain.data.arrays import computed, shuffled
from posttrain.data.chat import RenderRow
from posttrain.data.images.modality import modality_of
from posttrain.data.images.render import prompt_of
from posttrain.data.images.store import ImageStore
from posttrain.data.places import Places
from posttrain.metrics.correctness import passes_and_failures
from posttrain.records import DrawnPrompt, Message, Row
from posttrain.rl.prompts.beliefs import Beliefs
from posttrain.rl.prompts.config import PromptsConfig
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.progress import Progress
from posttrain.rl.prompts.quotas import Modalities, Shares, moved_shares, places_by_quota
from posttrain.rl.prompts.selection import Selection
from posttrain.rl.records import ScoredGroup


class PromptSource:
    """Draws prompts of the rows.

    render: row and messages -> prompt token ids. selection: None draws them in turn. store: of the pictures that the
    rows show; None for rows of text. modalities: their shares, by which rows of a capability belong to several quotas.
    progress: moves these shares; None keeps them.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        systems: SystemsConfig,
        render: RenderRow,
        *,
        seed: int,
        selection: Selection | None = None,
        store: ImageStore | None = None,
        modalities: Modalities | None = None,
        progress: Progress | None = None,
    ):
        self._rows = rows
        self._place = Places(rows, lambda row: row.id) if selection is None else selection.beliefs.place
        self._of_quota = places_by_quota(rows, modalities) if selection is None else selection.members
        self._systems = systems
        self._render = render
        self._store = store
        self._seed = seed
        self._selection = selection
        self._progress = progress
        self._prompts_seen = dict.fromkeys(self._of_quota, 0)
        self._passes: dict[tuple[str, int], np.ndarray] = {}  # the order of the current pass over a quota's rows

    def draw(self, quota: str, order: int) -> DrawnPrompt:
        """Draw the prompt of the group with the dispatch order `order`."""
        self._prompts_seen[quota] += 1
        number = self._prompts_seen[quota]
        if self._selection is None:
            row = self._in_turn(quota, number)
        else:
            row = self._rows[self._selection.draw(quota, order, number)]
        if not self._systems.instructions:
            return self._drawn(row, None)
        return self._drawn(row, self._draw_system(row, random.Random(f"{self._seed}/{order}")))

    def first(self, count: int) -> list[DrawnPrompt]:
        """The prompts of the first `count` rows, without a system instruction. They do not count as drawn."""
        return [self._drawn(row, None) for row in islice(self._rows, count)]

    def row(self, prompt_id: str) -> Row:
        """The row with this id."""
        return self._rows[self._place[prompt_id]]

    def prompt(self, prompt_id: str, system: str | None) -> DrawnPrompt:
        """The prompt of a selected row, with a system instruction or without (None)."""
        return self._drawn(self.row(prompt_id), system)

    def _drawn(self, row: Row, system: str | None) -> DrawnPrompt:
        messages = row.messages if system is None else (Message("system", system), *row.messages)
        return DrawnPrompt(row, system, prompt_of(messages, self._render(row, messages), self._store))

    def prompts_seen(self, quota: str) -> int:
        """How many prompts of a quota have been drawn so far."""
        return self._prompts_seen[quota]

    def was_drawn(self, quota: str, prompt_id: str, number: int) -> None:
        """Note that a prompt was the draw number `number` of its quota (from 1), before a crash."""
        self._prompts_seen[quota] = max(self._prompts_seen[quota], number)
        if self._selection is not None:
            self._selection.was_drawn(prompt_id, number)

    def _in_turn(self, quota: str, number: int) -> Row:
        places = self._of_quota[quota]
        turn, place = divmod(number - 1, len(places))
        if (quota, turn) not in self._passes:
            self._passes = {key: value for key, value in self._passes.items() if key[0] != quota}
            order = shuffled(len(places), random.Random(f"{self._seed}/{quota}/{turn}"))
            self._passes[quota, turn] = computed(order, lambda numbers: places[numbers], np.int64)
        return self._rows[int(self._passes[quota, turn][place])]

    def observe(self, scored: ScoredGroup, threshold: float, first: int | None) -> None:
        """Tell the selection which rollouts of a group passed. See `Beliefs.observe`.

        threshold: the least reward of one that did. first: how many replies the group began with; None: all.
        """
        if self._selection is None:
            return
        rewards = scored.rewards
        counts, of_first = (passes_and_failures(rewards[:number], threshold) for number in (None, first))
        row = scored.group.prompt.row
        if self._progress is not None:
            expected = self._selection.beliefs.settled_rate(row.id)
            self._progress.observe(modality_of(row), *counts, expected=expected)
        version = scored.group.oldest_version
        self._selection.beliefs.observe(row.id, *counts, version=version, first=of_first)

    def decided(self, replies: int, *, is_useful: bool) -> None:
        """See `Selection.decided`."""
        if self._selection is not None:
            self._selection.decided(replies, is_useful=is_useful)

    def may_stop(self, prompt_id: str, first: int) -> bool:
        """See `Selection.may_stop`. Without beliefs no group stops."""
        return self._selection is not None and self._selection.may_stop(prompt_id, first)

    def goes_on(self, prompt_id: str, passes: int, failures: int) -> bool:
        """See `Selection.goes_on`. Without beliefs every group goes on."""
        return self._selection is None or self._selection.goes_on(prompt_id, passes, failures)

    def advance(self, version: int) -> dict[str, float]:
        """Tell the selection that an optimizer step has made `version`, and return its figures."""
        if self._selection is None:
            return {}
        self._selection.advance(version)
        if self._progress is None:
            return self._selection.figures()
        self._progress.advance(version)
        return self._selection.figures() | self._progress.figures()

    def moved(self, shares: Shares) -> Shares | None:
        """The shares of quotas by the progress of modalities so far. shares: the first ones. None: they do not move."""
        if self._progress is None:
            return None
        return moved_shares(shares, self._progress.shares, self._progress.first)

    def _draw_system(self, row: Row, rng: random.Random) -> str | None:
        instructions = self._systems.instructions
        if not instructions or row.messages[0].role == "system":
            return None
        chosen = rng.choices(instructions, [item.weight for item in instructions])[0]
        return chosen.text or None

    def first_groups(self) -> list[Difficulty]:
        """See `Beliefs.first_groups`; empty if prompts are drawn in turn."""
        return self._selection.beliefs.first_groups() if self._selection is not None else []

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint, right after `advance`. Draws that follow do not change it: groups are dispatched
        while the checkpoint is being written, and a deterministic run draws them again.
        """
        return {
            "prompts_seen": dict(self._prompts_seen),
            "selection": self._selection and self._selection.state(),
            "progress": self._progress and self._progress.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._prompts_seen = {name: state["prompts_seen"].get(name, 0) for name in self._of_quota}
        if self._selection is not None and state.get("selection") is not None:
            self._selection.restore(state["selection"])
        if self._progress is not None and state.get("progress") is not None:
            self._progress.restore(state["progress"])


def prompt_source(
    config: PromptsConfig,
    rows: Sequence[Row],
    known: Sequence[Difficulty],
    *,
    render: RenderRow,
    seed: int,
    store: ImageStore | None = None,
) -> PromptSource:
    """The source that draws these prompts, each with its system instruction.

    known: what a profile found. store: of the pictures that the rows show; None for rows of text.
    """
    if config.selection.draw == "in_turn":
        return PromptSource(rows, config.systems, render, seed=seed, store=store, modalities=config.modalities)
    beliefs = Beliefs(rows, config.selection.half_life, config.selection.predictor)
    for item in known:
        if item.prompt_id in beliefs.place:
            beliefs.observe(item.prompt_id, item.passes, item.n - item.passes, version=item.policy_version)
    beliefs.fit()
    selection = Selection(beliefs, group_size=config.group_size, seed=seed, modalities=config.modalities)
    curriculum = config.modality_curriculum
    return PromptSource(
        rows,
        config.systems,
        render,
        seed=seed,
        selection=selection,
        store=store,
        modalities=config.modalities,
        progress=None if curriculum is None else Progress(config.modalities, curriculum),
    )
