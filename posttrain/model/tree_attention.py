"""Attention in a packed tree (tree.py), in three ways with one result.

  TreeKeys      each node is a row of queries; its keys are those of its path and its own, with a mask. Few calls: the
                fastest way where paths are short.
  TreeBlocks    nodes by themselves and nodes with what is behind them, merged (tree_blocks.py). No key is copied and no
                mask is stored: the way for long paths, on a CPU.
  TreeFlex      FlexAttention with a block mask: the way for long paths, on a GPU. Blocks of the mask that hide
                everything are left out.

Left out: dropout of attention weights in the latter two; `tree_visibility` then takes the first.
Shapes: T tokens of the row, N tokens of a batch, R rows, H query heads, G key heads, d channels of a head.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.model.tree import Node, Tree
from posttrain.model.tree_batches import padded_runs, similar
from posttrain.model.tree_blocks import TreeBlocks
from posttrain.model.visibility import Padded, Visibility, in_order, sdpa


def tree_visibility(tree: Tree, chunk_size: int | None, *, dropout: bool) -> Visibility:
    """Which token of a tree sees which, in the way that is fast for it.

    chunk_size: of chunked attention; chunks are counted within each document. dropout: attention weights are dropped.
    """
    device = tree.positions_1T.device
    nodes = tree.nodes if chunk_size is None else tree.chunks(chunk_size)
    if dropout or _keys_pay(nodes):
        return TreeKeys.of(nodes, device)
    return TreeBlocks.of(nodes, device) if device.type == "cpu" else TreeFlex.of(tree, chunk_size)


# Tokens on the paths of nodes, in the mean over nodes that have a path, up to which TreeKeys is faster than TreeBlocks,
# as benchmarks/rl_prefix.py measured on a CPU. On one H200 it is within 7% of TreeFlex up to paths of 2048 tokens
# (benchmarks/prefix_gpu.py).
_SHORT_PATH = 256


def _keys_pay(nodes: Sequence[Node]) -> bool:
    lengths = [sum(len(nodes[i]) for i in node.path) for node in nodes if node.path]
    return sum(lengths) <= _SHORT_PATH * len(lengths)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Nodes with equally long paths. paths: for each place of the path, the row of its node in the level, int64 [R].

    mask: bool [R, 1, queries, keys]; None for nodes without a path, whose attention is causal.
    """

    own: Padded
    paths: tuple[torch.Tensor, ...]
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class TreeKeys:
    """levels: the nodes that are on paths, at the first place of paths, the second, and so on. batches: all nodes."""

    levels: tuple[Padded, ...]
    batches: tuple[_Rows, ...]

    @staticmethod
    def of(nodes: Sequence[Node], device: torch.device) -> "TreeKeys":
        inner = sorted({index for node in nodes for index in node.path})
        levels, place = [], {}
        for depth in range(max((len(node.path) for node in nodes), default=0)):
            chosen = [index for index in inner if len(nodes[index].path) == depth]
            place |= {index: row for row, index in enumerate(chosen)}
            levels.append(padded_runs([[(nodes[i].start, nodes[i].end)] for i in chosen], device))
        batches = []
        for depth in range(len(levels) + 1):
            level = [node for node in nodes if len(node.path) == depth]
            for chosen in similar([(len(node), 1) for node in level]):
                part = [level[i] for i in chosen]
                own = padded_runs([[(node.start, node.end)] for node in part], device)
                paths = [[place[node.path[level]] for node in part] for level in range(depth)]
                mask = _path_mask(nodes, part, levels[:depth], length=own.length).to(device) if depth else None
                batches.append(_Rows(own, tuple(torch.tensor(rows, device=device) for rows in paths), mask))
        return TreeKeys(tuple(levels), tuple(batches))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [T, heads, d]
        placed = [(level.place(k), level.place(v)) for level in self.levels]
        parts = []
        for batch in self.batches:
            own = batch.own
            keys, values = (
                torch.cat([*(pair[i].index_select(0, rows) for pair, rows in zip(placed, batch.paths, strict=False)),
                           own.place(x)], 2)
                for i, x in enumerate((k, v))
            )  # fmt: skip
            parts.append(own.take(sdpa(own.place(q), keys, values, mask=batch.mask, dropout=dropout)))
        return in_order(parts, [batch.own for batch in self.batches])[None].transpose(1, 2)


def _path_mask(nodes: Sequence[Node], part: Sequence[Node], levels: Sequence[Padded], *, length: int) -> torch.Tensor:
    """bool [R, 1, queries, keys]: a query sees the whole path and its own node up to itself, but no padding."""
    columns = []
    for depth, level in enumerate(levels):
        lengths = torch.tensor([len(nodes[node.path[depth]]) for node in part])
        columns.append((torch.arange(level.length) < lengths[:, None])[:, None].expand(-1, length, -1))
    own = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.cat([*columns, own.expand(len(part), -1, -1)], 2)[:, None]


@dataclass(frozen=True, slots=True)
class TreeFlex:
    """mask: a BlockMask of torch.nn.attention.flex_attention."""

    mask: Any

    @staticmethod
    def of(tree: Tree, chunk_size: int | None) -> "TreeFlex":
        from torch.nn.attention.flex_attention import create_block_mask

        device = tree.positions_1T.device
        mask = create_block_mask(tree_mask(tree, chunk_size), None, None, len(tree), len(tree), device=str(device))
        return TreeFlex(mask)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        assert not dropout
        grouped = q.shape[1] != k.shape[1]
        return _flex(q.is_cuda)(q, k, v, block_mask=self.mask, enable_gqa=grouped, kernel_options=_KERNEL)


# The kernel for many queries. Without gradients torch would choose another for rows of less than 128 tokens, one for
# decoding, of which it compiles no variant for some shapes.
_KERNEL: Any = {"BACKEND": "TRITON"}


@functools.cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def tree_mask(tree: Tree, chunk_size: int | None) -> Any:
    """The `mask_mod` of FlexAttention for a tree: whether the query at one place sees the key at another.

    The nodes behind a node stand together, so a token is seen from its own place to the end of the last of them.
    """
    reach = [node.end for node in tree.nodes]
    for node in tree.nodes:
        for index in node.path:
            reach[index] = node.end
    device = tree.positions_1T.device
    lengths = torch.tensor([len(node) for node in tree.nodes])
    reach_T = torch.repeat_interleave(torch.tensor(reach), lengths).to(device)
    chunk_T = torch.zeros_like(reach_T) if chunk_size is None else tree.positions_1T[0] // chunk_size

    # A lambda, because FlexAttention tells by the number of parameters, all by place, what it has been given.
    return lambda batch, head, query, key: (key <= query) & (query < reach_T[key]) & (chunk_T[key] == chunk_T[query])
