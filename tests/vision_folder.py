"""Rows and preference pairs with pictures in files, and a reward that reads the pictures."""

import json
from collections.abc import Iterable
from pathlib import Path

from vision_models import SIDE, draw


def write_picture_rows(folder: Path, count: int, *, answers: bool = True) -> Path:
    """Rows with 0, 1, 2 or 3 pictures of one tile or several, and a file of a text row's form. Returns the file.

    answers: supervised rows; otherwise prompts with the field `answer`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(SIDE, SIDE), (2 * SIDE, SIDE), (SIDE, SIDE)]
    rows = []
    for index in range(count):
        names = [draw(folder / f"{index}_{n}.png", 5 * index + n, sizes[(index + n) % 3]) for n in range(index % 4)]
        parts: list[dict[str, str]] = [{"type": "image", "image": name} for name in names]
        text = f"Sum: {index % 9} + {len(names)}"
        content = [*parts, {"type": "text", "text": text}] if parts else text
        answer = str(index % 9 + len(names))
        turns = [{"role": "user", "content": content}]
        if answers:
            rows.append(
                {"id": f"r{index}", "messages": [*turns, {"role": "assistant", "content": f"Answer: {answer}"}]}
            )
        else:
            rows.append({"id": f"r{index}", "messages": turns, "answer": answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_picture_pairs(folder: Path, numbers: Iterable[int]) -> Path:
    """Preference pairs of these numbers, which show 0, 1 or 2 pictures: number % 3. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in numbers:
        names = [draw(folder / f"{index}_{n}.png", index + 3 * n, ((1 + n) * SIDE, SIDE)) for n in range(index % 3)]
        answer = index % 9 + len(names)
        rows.append(
            {
                "id": f"p{index}",
                "prompt": "<image>" * len(names) + f"Sum: {index % 9} + {len(names)}",
                "chosen": "So. " * (index % 4) + f"Answer: {answer}",
                "rejected": f"Answer: {answer + 1}",
                **({"images": names} if names else {}),
            }
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_picture_prompts(folder: Path, count: int) -> Path:
    """Prompts that show 0, 1 or 2 pictures, whose text says whether there are any, as `REWARD` reads them."""
    rows = []
    for index in range(count):
        names = [draw(folder / f"{index}_{n}.png", 7 * index + n, ((1 + n) * SIDE, SIDE)) for n in range(index % 3)]
        text = f"Sum: {index} + 1" + (", has pictures" if names else "")
        rows.append({"id": f"p{index}", "messages": [{"role": "user", "content": text}], "images": names})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


REWARD = '''
from posttrain import load_image

def even_share(rollout, row):
    """Share of even token ids, with the width of the pictures, which is read when it is asked for."""
    ids = rollout.token_ids
    width = sum(load_image(reference).width for reference in rollout.prompt.pictures)
    assert bool(width) == ("has pictures" in row.messages[-1].text)
    return sum(token % 2 == 0 for token in ids) / len(ids) + 1e-3 * (sum(token * token for token in ids) % 997) / 997
'''
