"""A packed tree: documents in one row that hold what they share at their start only once.

    documents            row                       nodes
    a b c d e            a b c d e f g  h i j      0: a b c   first of a document
    a b c f g            └ 0 ┘ └1┘ └2┘  └ 3 ┘      1: d e     continues 0
    h i j                                          2: f g     continues 0
                                                   3: h i j   first of a document

A token has the position that it has in its document, and sees the tokens before it in its document: its own node up to
itself, and all nodes on the way to the first. So every document has the outputs that it has alone. The structure is
given, and never guessed from positions: node 1 continues the positions of node 0, but node 2 does, too.

Left out: more than one row, and a cache. Shapes: T tokens of the row, N nodes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Node:
    """Consecutive tokens of a row that belong to the same documents.

    start, end: places in the row, end excluded. position: of the first token in its document. path: the nodes before
    it in its document, as indices, the first of the document first.
    """

    start: int
    end: int
    position: int
    path: tuple[int, ...]

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Tree:
    """nodes: they cover the row in order, and each stands behind its path.

    positions_1T: int64, [1, T]. weights_T: fp32, how many documents a token belongs to. Both are on the device of the
    forward.
    """

    nodes: tuple[Node, ...]
    positions_1T: torch.Tensor
    weights_T: torch.Tensor

    def __len__(self) -> int:
        return self.nodes[-1].end

    @property
    def longest(self) -> int:
        """How many tokens the longest document has."""
        return max(node.position + len(node) for node in self.nodes)

    def chunks(self, size: int) -> tuple[Node, ...]:
        """The nodes, cut where a chunk of `size` tokens of a document begins. No path crosses such a place."""
        pieces: list[Node] = []
        last_piece: list[int] = []  # of each node
        for node in self.nodes:
            start, position = node.start, node.position
            path = _path_behind(pieces, last_piece[node.path[-1]]) if node.path else ()
            while True:
                end = min(node.end, start + size - position % size)
                pieces.append(Node(start, end, position, path if position % size else ()))
                if end == node.end:
                    break
                position += end - start
                start = end
            last_piece.append(len(pieces) - 1)
        return tuple(pieces)


def _path_behind(nodes: Sequence[Node], last: int) -> tuple[int, ...]:
    return (*nodes[last].path, last)


def build_tree(runs: Sequence[tuple[int, int]], weights: Sequence[int], device: torch.device | str = "cpu") -> Tree:
    """Make a tree from runs: (start, previous) of tokens that stand in the row as they do in a document.

    start: place of the run's first token in the row; runs cover the row, in order. previous: the place of the token
    before that one in its document, which must also be one of the document that ends just before the run; -1 if a
    document begins here. weights: of each token of the row, how many documents it belongs to.

    Example: the row above is `build_tree([(0, -1), (5, 2), (7, -1)], [2, 2, 2, 1, 1, 1, 1, 1, 1, 1])`.

    Raises:
        ValueError: the first run does not start at 0, the starts do not rise, or a run continues another token.
    """
    total = len(weights)
    starts = [start for start, _ in runs]
    if not runs or starts[0] != 0 or any(a >= b for a, b in zip(starts, [*starts[1:], total], strict=True)):
        raise ValueError(
            f"runs start at {starts} in a row of {total} tokens; they must start at 0 and have tokens each"
        )
    if wrong := next(((s, p) for s, p in runs if not -1 <= p < s), None):
        raise ValueError(f"the run at {wrong[0]} continues token {wrong[1]}; it must be -1 or a token before the run")
    before = dict(runs)
    cuts = sorted({*starts, *(previous + 1 for _, previous in runs if previous >= 0), total})
    ending: dict[int, int] = {}  # the node whose last token is at this place
    nodes: list[Node] = []
    for start, end in itertools.pairwise(cuts):
        previous = before.get(start, start - 1)
        if previous < 0:
            node = Node(start, end, 0, ())
        else:
            parent = ending[previous]
            if parent not in _path_behind(nodes, len(nodes) - 1):
                raise ValueError(
                    f"the run at {start} continues token {previous}, of a document that ended before another"
                )
            position = nodes[parent].position + len(nodes[parent])
            node = Node(start, end, position, _path_behind(nodes, parent))
        ending[end - 1] = len(nodes)
        nodes.append(node)
    positions = torch.cat([torch.arange(node.position, node.position + len(node)) for node in nodes])
    return Tree(tuple(nodes), positions[None].to(device), tensor_of(weights, device, np.float32))


def tensor_of(values: Sequence[Any], device: torch.device | str, dtype: Any = np.int64) -> torch.Tensor:
    """A tensor of a long list, or of lists of equal length. numpy reads it many times as fast as `torch.tensor`."""
    return torch.from_numpy(np.array(values, dtype=dtype)).to(device)
