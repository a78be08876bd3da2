"""Which prompt is sent next: exact capability quotas, a fresh order in each pass, a system instruction for each.

Everything is drawn from one seeded generator whose state goes into the checkpoint, so a resumed run draws on.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.config.shared import SystemsConfig
from posttrain.errors import ConfigError
from posttrain.records import Message, Row
from posttrain.rl.groups import DrawnPrompt


class PromptSource:
    """Draws prompts so that what is trained keeps the mixture's shares.

    rows: the selected prompts. mixture: wanted share by capability (any positive scale); empty: their shares in
    `rows`. render: messages -> prompt token ids.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        mixture: Mapping[str, float],
        systems: SystemsConfig,
        render: Callable[[Sequence[Message]], Sequence[int]],
        seed: int,
    ):
        self._by_capability: dict[str, list[Row]] = {}
        for row in rows:
            self._by_capability.setdefault(row.capability, []).append(row)
        missing = sorted(set(mixture) - set(self._by_capability))
        if missing:
            raise ConfigError(
                "mixture",
                [f"{name}: no selected prompt has this capability; there are: {', '.join(sorted(self._by_capability))}"
                 for name in missing],
            )  # fmt: skip
        weights = dict(mixture) or {name: float(len(group)) for name, group in self._by_capability.items()}
        total = sum(weights.values())
        self._shares = {name: weight / total for name, weight in sorted(weights.items())}
        self._systems = systems
        self._render = render
        self._random = random.Random(seed)
        self._queues: dict[str, list[int]] = {name: [] for name in self._shares}
        self._taken: Counter[str] = Counter()

    def draw(self) -> DrawnPrompt:
        """The next prompt: of the capability that is furthest behind its share of what has been taken."""
        total = sum(self._taken.values()) + 1
        capability = max(self._shares, key=lambda name: (self._shares[name] * total - self._taken[name], name))
        self._taken[capability] += 1
        queue = self._queues[capability]
        if not queue:
            queue += self._random.sample(
                range(len(self._by_capability[capability])), len(self._by_capability[capability])
            )
        row = self._by_capability[capability][queue.pop()]
        system = self._draw_system(row)
        messages = row.messages if system is None else (Message("system", system), *row.messages)
        return DrawnPrompt(row, system, messages, tuple(self._render(messages)))

    def _draw_system(self, row: Row) -> str | None:
        instructions = self._systems.instructions
        if not instructions or row.messages[0].role == "system":
            return None
        chosen = self._random.choices(instructions, [item.weight for item in instructions])[0]
        return chosen.text or None

    def give_back(self, capability: str) -> None:
        """A group of this capability was dropped: its place is filled by one of the same capability."""
        self._taken[capability] -= 1

    def state(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        version, internal, gauss = self._random.getstate()
        return {"random": [version, list(internal), gauss], "queues": self._queues, "taken": dict(self._taken)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._queues = {name: list(queue) for name, queue in state["queues"].items()}
        self._taken = Counter(state["taken"])
