"""Put the tokens of a packed tree's nodes into padded rows, and nodes of similar sizes into one batch."""

from collections.abc import Sequence

import torch

from posttrain.model.visibility import MAX_PADDING, Padded

Run = tuple[int, int]  # tokens of a row: start and end, end excluded


def padded_runs(rows: Sequence[Sequence[Run]], device: torch.device) -> Padded:
    """The tokens of some runs as one row, for several rows."""
    length = max(map(num_tokens, rows))
    tokens = torch.cat([torch.arange(*run) for row in rows for run in row])
    counts = torch.tensor([num_tokens(row) for row in rows])
    row_N = torch.repeat_interleave(torch.arange(len(rows)), counts)
    slots = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[row_N] + row_N * length
    return Padded(len(rows), length, slots.to(device), tokens.to(device))


def num_tokens(runs: Sequence[Run]) -> int:
    return sum(end - start for start, end in runs)


def similar(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Indices of these sizes in one batch; where padding would be most of it, in one for each power of two.

    sizes: along both axes that are padded, such as keys and queries.
    """
    if not sizes:
        return []
    padded = len(sizes) * max(a for a, _ in sizes) * max(b for _, b in sizes)
    if padded <= MAX_PADDING * sum(a * b for a, b in sizes):
        return [list(range(len(sizes)))]
    batches: dict[tuple[int, int], list[int]] = {}
    for index, (a, b) in enumerate(sizes):
        batches.setdefault(((a - 1).bit_length(), (b - 1).bit_length()), []).append(index)
    return list(batches.values())
