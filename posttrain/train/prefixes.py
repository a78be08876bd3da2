"""Pack documents into one row that holds once what they share at their start, such as the prompt of many replies.

A token depends on the tokens before it alone, so equal beginnings of two documents have equal hidden states: they are
found by comparing tokens. A prompt is shared however short it is. Other beginnings, such as the system instruction of
different prompts, are shared from MIN_SHARED tokens on, since every place where documents part costs a call in each
layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from posttrain.model.tree import Tree, build_tree, tensor_of

MIN_SHARED = 16


@dataclass(frozen=True, slots=True)
class Document:
    """ids: tokens. prompt: how many of them, at the start, are a prompt."""

    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True, slots=True)
class Packed:
    """ids_1T: int64, the row. tree: its structure. places: of each document, in the order given, those of its tokens.

    A place is an index into the row.
    """

    ids_1T: torch.Tensor
    tree: Tree
    places: list[list[int]]


def sharing_order(documents: Sequence[Document]) -> list[int]:
    """Indices of documents in an order in which each stands behind the one with which it shares most."""
    return sorted(range(len(documents)), key=lambda index: documents[index].ids)


def shared_length(before: Document, document: Document) -> int:
    """How many tokens a document takes over from the one that stands before it in `sharing_order`."""
    common = _common(before.ids, document.ids)
    same_prompt = before.prompt == document.prompt and common >= document.prompt
    least = document.prompt if same_prompt else 0
    return common if common - least >= MIN_SHARED else least


def pack(documents: Sequence[Document], device: torch.device | str = "cpu") -> Packed:
    """Pack documents, each of one token or more, in any order."""
    row: list[int] = []
    path: list[int] = []  # places of the tokens of the document that was packed last
    runs: list[tuple[int, int]] = []
    places: list[list[int]] = [[] for _ in documents]
    before = Document((), 0)
    for index in sharing_order(documents):
        document = documents[index]
        shared = shared_length(before, document)
        if shared < len(document.ids):
            runs.append((len(row), path[shared - 1] if shared else -1))
        path = path[:shared] + list(range(len(row), len(row) + len(document.ids) - shared))
        row += document.ids[shared:]
        places[index] = path
        before = document
    weights = np.bincount(np.fromiter(chain.from_iterable(places), np.int64), minlength=len(row))
    return Packed(tensor_of(row, device)[None], build_tree(runs, weights.tolist(), device), places)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two documents have in common at the start."""
    least, most = 0, min(len(a), len(b))
    while least < most:
        middle = (least + most + 1) // 2
        if a[least:middle] == b[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
