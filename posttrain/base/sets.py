"""The quick start's datasets: supervised examples, prompts for reinforcement learning, tune and held-out puzzles.

No problem, by its canonical key, is in two of the sets, or in a set and in the base model's training text. The held-out
and the tune set are the same for every seed. Settings may be chosen on the tune set; the held-out set is only for
measuring.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.base.config import SetSizes
from posttrain.base.problem import Problem
from posttrain.base.tasks import FAMILIES, HABITS, draw_distinct, solve

# Neutral instructions. Half of the conversations begin with one of them. So the policy knows them, and reinforcement
# learning can sample them.
SYSTEM_INSTRUCTIONS = (
    "Solve the puzzle.",
    "Give one answer.",
    "You are a careful puzzle solver.",
    "Reply with the right answer.",
)

_FIXED_SEED = 20_261


@dataclass(frozen=True, slots=True)
class Sets:
    """The problems of each set, in order."""

    sft: tuple[Problem, ...]
    prompts: tuple[Problem, ...]
    heldout: tuple[Problem, ...]
    tune: tuple[Problem, ...]

    def keys(self) -> frozenset[str]:
        """The canonical keys of all sets, which the base model's training text must not contain."""
        return frozenset(problem.key for part in (self.sft, self.prompts, self.heldout, self.tune) for problem in part)


def draw_sets(seed: int, sizes: SetSizes) -> Sets:
    """Draw all sets. Only the supervised examples and the prompts depend on the seed."""
    fixed, taken = random.Random(_FIXED_SEED), set[str]()
    seeded = random.Random(f"sets {seed}")
    parts: dict[str, tuple[Problem, ...]] = {}
    for name, rng in (("heldout", fixed), ("tune", fixed), ("sft", seeded), ("prompts", seeded)):
        parts[name] = tuple(draw_distinct(getattr(sizes, name), rng, taken))
        taken |= {problem.key for problem in parts[name]}
    return Sets(**parts)


def write_sets(sets: Sets, folder: Path, seed: int) -> dict[str, Path]:
    """Write one JSON-lines file for each set, and return the paths by name. Only `sft` has assistant turns."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"rows {seed}")
    rows = {
        "sft": [_sft_row(index, problem, rng) for index, problem in enumerate(sets.sft)],
        "prompts": [_prompt_row("prompt", index, problem) for index, problem in enumerate(sets.prompts)],
        "heldout": [_prompt_row("heldout", index, problem) for index, problem in enumerate(sets.heldout)],
        "tune": [_prompt_row("tune", index, problem) for index, problem in enumerate(sets.tune)],
    }
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    return paths


def with_system(prompt: str, rng: random.Random) -> list[dict[str, str]]:
    """The turns before a reply: in half of all cases a system instruction, and then the prompt."""
    turns = [{"role": "user", "content": prompt}]
    if rng.random() < 0.5:
        turns.insert(0, {"role": "system", "content": rng.choice(SYSTEM_INSTRUCTIONS)})
    return turns


def _prompt_row(set_name: str, index: int, problem: Problem) -> dict[str, Any]:
    return _row(f"{set_name}-{index:04d}", problem, [{"role": "user", "content": problem.prompt}])


def _sft_row(index: int, problem: Problem, rng: random.Random) -> dict[str, Any]:
    reply = solve(problem, rng, worked=rng.random() < HABITS[problem.family].worked)
    turns = [*with_system(problem.prompt, rng), {"role": "assistant", "content": reply}]
    return _row(f"sft-{index:04d}", problem, turns)


def _row(row_id: str, problem: Problem, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
    return {
        "id": row_id,
        "capability": FAMILIES[problem.family].capability,
        "messages": list(messages),
        "answer": problem.answer,
        "family": problem.family,
        "level": problem.level,
        "key": problem.key,
        **problem.fields,
    }
