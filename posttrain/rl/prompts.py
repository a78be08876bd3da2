"""Which prompt of a capability is sent next, and the system instruction that is sampled for it.

Without a curriculum every prompt comes once before any comes again. With one, prompts are looked at in that order too,
and the first is taken whose pass rate, drawn from what is believed of it, lies in the band.

Everything is drawn from one seeded generator whose state goes into the checkpoint, so a resumed run draws on.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.config.shared import SystemsConfig
from posttrain.records import Message, Row
from posttrain.rl.curriculum import OUTSIDE, Curriculum
from posttrain.rl.groups import DrawnPrompt


class PromptSource:
    """Draws prompts of the selected rows. render: messages -> prompt token ids. tries: see CurriculumConfig."""

    def __init__(
        self,
        rows: Sequence[Row],
        systems: SystemsConfig,
        render: Callable[[Sequence[Message]], Sequence[int]],
        seed: int,
        curriculum: Curriculum | None = None,
        tries: int = 1,
    ):
        self._by_capability: dict[str, list[Row]] = {}
        for row in rows:
            self._by_capability.setdefault(row.capability, []).append(row)
        self._systems = systems
        self._render = render
        self._random = random.Random(seed)
        self._curriculum = curriculum
        self._tries = tries
        self._queues: dict[str, list[int]] = {name: [] for name in self._by_capability}

    def draw(self, capability: str) -> DrawnPrompt:
        """The next prompt of a capability."""
        row = self._next(capability)
        if self._curriculum is not None:
            row = self._in_band(row, self._curriculum)
        system = self._draw_system(row)
        messages = row.messages if system is None else (Message("system", system), *row.messages)
        return DrawnPrompt(row, system, messages, tuple(self._render(messages)))

    def _next(self, capability: str) -> Row:
        rows, queue = self._by_capability[capability], self._queues[capability]
        if not queue:
            queue += self._random.sample(range(len(rows)), len(rows))
        return rows[queue.pop()]

    def _in_band(self, row: Row, curriculum: Curriculum) -> Row:
        """The first row in the band from this one on, else the nearest; those outside are no tries."""
        nearest, least, tries = row, math.inf, 0
        for _ in range(self._tries + 2 * len(self._by_capability[row.capability])):
            miss = curriculum.miss(row.id, self._random)
            if miss < least:
                nearest, least = row, miss
            tries += miss < OUTSIDE
            if miss == 0 or tries == self._tries:
                break
            row = self._next(row.capability)
        return nearest

    def observe(self, prompt_id: str, passes: int, failures: int) -> None:
        """Rollouts of a prompt were scored."""
        if self._curriculum is not None:
            self._curriculum.observe(prompt_id, passes, failures)

    def advance(self, version: int, pass_rate: float) -> dict[str, float]:
        """An optimizer step is done; pass_rate: of all that was generated. Returns figures of the curriculum."""
        if self._curriculum is None:
            return {}
        self._curriculum.advance(version, pass_rate)
        return self._curriculum.figures()

    def _draw_system(self, row: Row) -> str | None:
        instructions = self._systems.instructions
        if not instructions or row.messages[0].role == "system":
            return None
        chosen = self._random.choices(instructions, [item.weight for item in instructions])[0]
        return chosen.text or None

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        version, internal, gauss = self._random.getstate()
        curriculum = self._curriculum and self._curriculum.state()
        return {"random": [version, list(internal), gauss], "queues": self._queues, "curriculum": curriculum}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._queues = {name: list(queue) for name, queue in state["queues"].items()}
        if self._curriculum is not None:
            self._curriculum.restore(state["curriculum"])
