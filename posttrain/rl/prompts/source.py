"""Which prompt of a capability is sent next, and the system instruction that is sampled for it.

Without a curriculum every prompt is drawn once before any is drawn again. With one, prompts are looked at in the same
order. For each, a pass rate is drawn from the belief about it, and the first prompt whose pass rate lies in the band is
taken.

Every draw depends only on the seed, the group's dispatch order, how many prompts of the capability have been looked at,
and the beliefs. So a resumed run finds its position from two numbers in the ledger.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config.rewards import SystemsConfig
from posttrain.data.chat import RenderRow
from posttrain.records import DrawnPrompt, Message, Prompt, Row
from posttrain.rl.prompts.curriculum import EXCLUDED_MISS, Curriculum


class PromptSource:
    """Draws prompts of the selected rows. render: row and messages -> prompt token ids. tries: see CurriculumConfig."""

    def __init__(
        self,
        rows: Sequence[Row],
        systems: SystemsConfig,
        render: RenderRow,
        *,
        seed: int,
        curriculum: Curriculum | None = None,
        tries: int = 1,
    ):
        self._by_capability: dict[str, list[Row]] = {}
        for row in rows:
            self._by_capability.setdefault(row.capability, []).append(row)
        self._by_id = {row.id: row for row in rows}
        self._systems = systems
        self._render = render
        self._seed = seed
        self._curriculum = curriculum
        self._tries = tries
        self._prompts_seen = dict.fromkeys(self._by_capability, 0)
        self._passes: dict[tuple[str, int], list[int]] = {}  # the order of the current pass over a capability's rows

    @property
    def curriculum(self) -> Curriculum | None:
        """The beliefs by which prompts are drawn; None without a curriculum."""
        return self._curriculum

    def draw(self, capability: str, order: int) -> DrawnPrompt:
        """Draw the prompt of the group with the dispatch order `order`."""
        row = self._next(capability)
        if self._curriculum is None and not self._systems.instructions:
            return self.prompt(row.id, None)
        rng = random.Random(f"{self._seed}/{order}")
        if self._curriculum is not None:
            row = self._in_band(row, self._curriculum, rng)
        return self.prompt(row.id, self._draw_system(row, rng))

    def prompt(self, prompt_id: str, system: str | None) -> DrawnPrompt:
        """The prompt of a selected row, with a system instruction or without (None)."""
        row = self._by_id[prompt_id]
        messages = row.messages if system is None else (Message("system", system), *row.messages)
        return DrawnPrompt(row, system, Prompt(messages, tuple(self._render(row, messages))))

    def prompts_seen(self, capability: str) -> int:
        """How many prompts of a capability have been looked at so far."""
        return self._prompts_seen[capability]

    def skip_to(self, capability: str, prompts_seen: int) -> None:
        """Continue as if at least this many prompts of a capability had been looked at."""
        self._prompts_seen[capability] = max(self._prompts_seen[capability], prompts_seen)

    def _next(self, capability: str) -> Row:
        rows = self._by_capability[capability]
        number, place = divmod(self._prompts_seen[capability], len(rows))
        self._prompts_seen[capability] += 1
        if (capability, number) not in self._passes:
            self._passes = {key: value for key, value in self._passes.items() if key[0] != capability}
            rng = random.Random(f"{self._seed}/{capability}/{number}")
            self._passes[capability, number] = rng.sample(range(len(rows)), len(rows))
        return rows[self._passes[capability, number][place]]

    def _in_band(self, row: Row, curriculum: Curriculum, rng: random.Random) -> Row:
        """The first row, from `row` on, in the band, or after `tries` rows the nearest one.

        Retired prompts, and parked ones outside of the budget, do not count as tries.
        """
        nearest, least, tries = row, math.inf, 0
        for _ in range(self._tries + 2 * len(self._by_capability[row.capability])):
            miss = curriculum.miss(row.id, rng)
            if miss < least:
                nearest, least = row, miss
            tries += miss < EXCLUDED_MISS
            if miss == 0 or tries == self._tries:
                break
            row = self._next(row.capability)
        return nearest

    def observe(self, prompt_id: str, passes: int, failures: int) -> None:
        """Tell the curriculum how many scored rollouts of a prompt passed and failed."""
        if self._curriculum is not None:
            self._curriculum.observe(prompt_id, passes, failures)

    def advance(self, version: int, pass_rate: float) -> dict[str, float]:
        """Tell the curriculum that an optimizer step is done, and return its figures.

        pass_rate: of all rollouts that were generated for the step.
        """
        if self._curriculum is None:
            return {}
        self._curriculum.advance(version, pass_rate)
        return self._curriculum.figures()

    def _draw_system(self, row: Row, rng: random.Random) -> str | None:
        instructions = self._systems.instructions
        if not instructions or row.messages[0].role == "system":
            return None
        chosen = rng.choices(instructions, [item.weight for item in instructions])[0]
        return chosen.text or None

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return {"prompts_seen": self._prompts_seen, "curriculum": self._curriculum and self._curriculum.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._prompts_seen = {name: state["prompts_seen"].get(name, 0) for name in self._by_capability}
        if self._curriculum is not None and state["curriculum"] is not None:
            self._curriculum.restore(state["curriculum"])
