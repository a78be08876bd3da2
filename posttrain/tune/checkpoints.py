"""Checkpoints of a TRL trainer. The last two are kept, and that of the best model if the config asks for it.

Rank 0 writes into the folder `checkpoint-N`, whose name transformers chooses. Once it is complete on the home host, it
is sealed: the seal adds the fingerprint of the training and renames the folder to `step_N`. So a folder `step_N` is
always complete. A training that dies while it writes leaves a `checkpoint-N`, which the next training deletes. A
training continues only from a checkpoint with its own fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.files import remove, replace_folder, write_json

SEAL = "posttrain.json"
KEPT = 2


def fingerprint(model: Any, *parts: Any) -> str:
    """A hash of the start weights (a sample of each tensor) and of the parts, which JSON can hold.

    parts: everything else that decides the training, such as its settings, seed and data.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # what this rank holds of it under ZeRO-3
        sample = held.detach().flatten()[:256].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def digest_ids(sequences: Iterable[Any]) -> str:
    """A hash of the rows that a training reads."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(json.dumps(sequence).encode())
    return digest.hexdigest()


def seal(folder: Path, step: int, fingerprint: str, *, tokens: int, kept: int | None = None) -> Path:
    """Seal `checkpoint-N` as `step_N` and delete all but the last two. tokens: trained on up to this step.

    kept: the step of a checkpoint that is not deleted, however old it is.

    It is called on the home host, for rank 0.
    """
    written, final = folder / f"checkpoint-{step}", folder / f"step_{step}"
    remove(folder / "README.md")  # TRL's model card
    write_json(written / SEAL, {"step": step, "tokens": tokens, "fingerprint": fingerprint})
    replace_folder(written, final)
    for number, path in sorted(_sealed(folder), reverse=True)[KEPT:]:
        if number != kept:
            remove(path)
    return final


def seal_start(engine: Any, folder: Path, fingerprint: str) -> Path:
    """Write the weights before the first step as `step_0`, for a training that may keep them. Collective.

    Returns its path. No training continues from `step_0`, which lacks what only a trainer's checkpoint holds.
    """
    from posttrain.parallel.export import folder_of_first_rank, is_first_rank
    from posttrain.parallel.state import save_state

    path = folder / "step_0"
    with folder_of_first_rank(path) as aside:
        save_state(engine, aside)
        if is_first_rank():
            write_json(aside / SEAL, {"step": 0, "tokens": 0, "fingerprint": fingerprint})
    return path


@dataclass(frozen=True, slots=True)
class Sealed:
    """A checkpoint from which training can continue, with the steps and tokens trained until then.

    path: its folder; None if there is no checkpoint, so that training starts from the beginning.
    """

    path: Path | None = None
    step: int = 0
    tokens: int = 0


def latest(folder: Path, fingerprint: str) -> Sealed:
    """The last checkpoint of the training with this fingerprint. Deletes the checkpoints of any other training."""
    for partial in folder.glob("checkpoint-*"):
        remove(partial)
    found = Sealed()
    for step, path in sorted(_sealed(folder)):
        note = json.loads((path / SEAL).read_text(encoding="utf-8"))
        if note["fingerprint"] == fingerprint:
            found = found if step == 0 else Sealed(path, step, note["tokens"])
        else:
            remove(path)
    return found


def _sealed(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("step_*"):
        if (path / SEAL).exists():
            yield int(path.name.removeprefix("step_")), path
