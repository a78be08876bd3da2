"""The datasets of a base model: supervised examples, prompts for reinforcement learning, tune and held-out puzzles.

No problem, by its canonical key, is in two of the sets, or in a set and in the base model's training text. The held-out
and the tune set are the same for every seed. Settings may be chosen on the tune set; the held-out set is only for
measuring.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.base.config import SetSizes
from posttrain.base.pictures.drawing import as_png
from posttrain.base.problem import Picture, Problem, turns_of
from posttrain.base.tasks import ANSWERS, Puzzles, draw_distinct, solve

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


def draw_sets(seed: int, sizes: SetSizes, puzzles: Puzzles = ANSWERS) -> Sets:
    """Draw all sets. Only the supervised examples and the prompts depend on the seed."""
    fixed, taken = random.Random(_FIXED_SEED), set[str]()
    seeded = random.Random(f"sets {seed}")
    parts: dict[str, tuple[Problem, ...]] = {}
    for name, rng in (("heldout", fixed), ("tune", fixed), ("sft", seeded), ("prompts", seeded)):
        parts[name] = tuple(draw_distinct(getattr(sizes, name), rng, taken, puzzles=puzzles))
        taken |= {problem.key for problem in parts[name]}
    return Sets(**parts)


def write_sets(
    sets: Sets, folder: Path, seed: int, *, puzzles: Puzzles = ANSWERS, with_systems: bool = True
) -> dict[str, Path]:
    """Write one JSON-lines file for each set, and return the paths by name. Only `sft` has assistant turns.

    with_systems: whether half of the supervised rows begin with a system instruction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"rows {seed}")
    rows = {"sft": []}
    for at, problem in enumerate(sets.sft):
        rows["sft"].append(_solved_row(f"sft-{at:04d}", problem, rng, puzzles=puzzles, with_systems=with_systems))
    for name, prefix in (("prompts", "prompt"), ("heldout", "heldout"), ("tune", "tune")):
        rows[name] = [
            _row(f"{prefix}-{at:04d}", one, [_asked(one)], puzzles=puzzles)
            for at, one in enumerate(getattr(sets, name))
        ]
    for name, made in rows.items():
        for row, problem in zip(made, getattr(sets, name), strict=True):
            _show_pictures(row, pictures_of_problem(problem, puzzles), folder)
    paths = {name: folder / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    return paths


def pictures_of_problem(problem: Problem, puzzles: Puzzles) -> list[Picture]:
    """The pictures that the prompt of a problem shows before its text; none for a problem of text."""
    draw = puzzles.families[problem.family].pictures
    return [] if draw is None else draw(problem)


def _show_pictures(row: dict[str, Any], pictures: list[Picture], folder: Path) -> None:
    """Write the pictures of a row into files, and name them in its user turn."""
    if not pictures:
        return
    (folder / "pictures").mkdir(exist_ok=True)
    names = [f"pictures/{row['id']}-{number}.png" for number in range(1, len(pictures) + 1)]
    for name, picture in zip(names, pictures, strict=True):
        (folder / name).write_bytes(as_png(picture))
    turn = next(turn for turn in row["messages"] if turn["role"] == "user")
    shown: list[dict[str, Any]] = []
    for number, name in enumerate(names, start=1):
        if label := picture_label(number, len(names)):
            shown.append({"type": "text", "text": label})
        shown.append({"type": "image", "image": name})
    turn["content"] = [*shown, {"type": "text", "text": turn["content"]}]


def picture_label(number: int, count: int) -> str:
    """The text before a picture of a prompt: its number if there are several. number: from 1."""
    return f" {number}" if count > 1 else ""


def with_system(prompt: str, rng: random.Random) -> list[dict[str, Any]]:
    """The turns before a reply: in half of all cases a system instruction, and then the prompt."""
    turns = [{"role": "user", "content": prompt}]
    if rng.random() < 0.5:
        turns.insert(0, {"role": "system", "content": rng.choice(SYSTEM_INSTRUCTIONS)})
    return turns


def _asked(problem: Problem) -> dict[str, Any]:
    return {"role": "user", "content": problem.prompt}


def _solved_row(
    row_id: str, problem: Problem, rng: random.Random, *, puzzles: Puzzles, with_systems: bool
) -> dict[str, Any]:
    worked = rng.random() < puzzles.habits[problem.family].worked
    turns = turns_of(solve(problem, rng, worked, puzzles=puzzles))
    before = with_system(problem.prompt, rng) if with_systems else [_asked(problem)]
    tools = puzzles.families[problem.family].tools
    row = _row(row_id, problem, [*before, *turns], puzzles=puzzles)
    return {**row, "tools": list(tools)} if tools else row


def _row(row_id: str, problem: Problem, messages: list[dict[str, Any]], *, puzzles: Puzzles) -> dict[str, Any]:
    return {
        "id": row_id,
        "capability": puzzles.families[problem.family].capability,
        "messages": messages,
        "answer": problem.answer,
        "family": problem.family,
        "level": problem.level,
        "key": problem.key,
        **problem.fields,
    }
