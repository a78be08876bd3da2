"""Which prompt of a capability is sent next: a fresh order in each pass, a system instruction for each.

Everything is drawn from one seeded generator whose state goes into the checkpoint, so a resumed run draws on.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.config.shared import SystemsConfig
from posttrain.records import Message, Row
from posttrain.rl.groups import DrawnPrompt


class PromptSource:
    """Draws prompts of the selected rows. render: messages -> prompt token ids."""

    def __init__(
        self,
        rows: Sequence[Row],
        systems: SystemsConfig,
        render: Callable[[Sequence[Message]], Sequence[int]],
        seed: int,
    ):
        self._by_capability: dict[str, list[Row]] = {}
        for row in rows:
            self._by_capability.setdefault(row.capability, []).append(row)
        self._systems = systems
        self._render = render
        self._random = random.Random(seed)
        self._queues: dict[str, list[int]] = {name: [] for name in self._by_capability}

    def draw(self, capability: str) -> DrawnPrompt:
        """The next prompt of a capability; none comes again before all others of it have come."""
        rows, queue = self._by_capability[capability], self._queues[capability]
        if not queue:
            queue += self._random.sample(range(len(rows)), len(rows))
        row = rows[queue.pop()]
        system = self._draw_system(row)
        messages = row.messages if system is None else (Message("system", system), *row.messages)
        return DrawnPrompt(row, system, messages, tuple(self._render(messages)))

    def _draw_system(self, row: Row) -> str | None:
        instructions = self._systems.instructions
        if not instructions or row.messages[0].role == "system":
            return None
        chosen = self._random.choices(instructions, [item.weight for item in instructions])[0]
        return chosen.text or None

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        version, internal, gauss = self._random.getstate()
        return {"random": [version, list(internal), gauss], "queues": self._queues}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._queues = {name: list(queue) for name, queue in state["queues"].items()}
