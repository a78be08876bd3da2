"""Attention in a packed tree, part by part: nodes by themselves, and nodes with what stands behind them.

    node 0: a b c              own:     a b c | d e | f g      each causal
    node 1: behind 0: d e      level 0: queries d e f g, keys a b c, all seen
    node 2: behind 0: f g

The parts of a token are merged by the log-sum-exp of their scores. No key is copied for each document, and no mask is
stored. Left out: devices other than CPUs, whose kernel is called here because it returns the log-sum-exp.
Shapes: T tokens of the row, N of a block, R rows, H query heads, G key heads, d channels of a head.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from posttrain.compat.torch import flash_attention, flash_attention_gradients
from posttrain.model.tree import Node
from posttrain.model.tree_batches import Run, num_tokens, padded_runs, similar
from posttrain.model.visibility import Padded, in_order

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of queries and of the keys that they attend to; causal within a node, else all keys.

    bias: 0 for keys and -inf for their padding, fp32 [R, 1, 1, keys]; None without padding.
    """

    queries: Padded
    keys: Padded
    causal: bool
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class TreeBlocks:
    """blocks: first nodes by themselves, each token once; then nodes with what is behind them, level by level."""

    blocks: tuple[_Block, ...]

    @staticmethod
    def of(nodes: Sequence[Node], device: torch.device) -> "TreeBlocks":
        blocks = []
        for chosen in similar([(len(node), 1) for node in nodes]):
            own = padded_runs([[(nodes[i].start, nodes[i].end)] for i in chosen], device)
            blocks.append(_Block(own, own, causal=True))
        behind: dict[int, list[Run]] = {}
        for node in nodes:
            for index in node.path:
                behind.setdefault(index, []).append((node.start, node.end))
        for depth in range(max((len(node.path) for node in nodes), default=0)):
            level = [index for index in behind if len(nodes[index].path) == depth]
            for chosen in similar([(len(nodes[index]), num_tokens(behind[index])) for index in level]):
                part = [level[i] for i in chosen]
                queries = padded_runs([behind[index] for index in part], device)
                keys = padded_runs([[(nodes[index].start, nodes[index].end)] for index in part], device)
                blocks.append(_Block(queries, keys, False, _padding_bias([len(nodes[i]) for i in part], device)))
        return TreeBlocks(tuple(blocks))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        assert not dropout
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return _Merged.apply(q, k, v, self.blocks)[None].transpose(1, 2)


def _padding_bias(lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    padding = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    return torch.zeros(padding.shape).masked_fill(padding, -torch.inf)[:, None, None].to(device)


class _Merged(torch.autograd.Function):
    """The attention of all blocks, merged. Backward runs each block with the merged output and log-sum-exp.

    With the log-sum-exp of all of a query's scores, the probabilities of one block are those of the whole softmax, and
    so are its gradients. Source: FlashAttention-2 (arXiv 2307.08691), section 3.1.2, whose blocks these are.
    """

    @staticmethod
    def forward(ctx, q, k, v, blocks):
        own_out, own_lse = zip(*(_attend_block((q, k, v), block) for block in blocks if block.causal), strict=True)
        own = [block.queries for block in blocks if block.causal]
        out, lse = in_order(own_out, own).to(own_lse[0].dtype), in_order(own_lse, own)
        for block in blocks:
            if not block.causal:
                tokens = block.queries.tokens_N
                part, part_lse = _attend_block((q, k, v), block)
                before, lse_before = out.index_select(0, tokens), lse.index_select(0, tokens)
                merged = torch.logaddexp(lse_before, part_lse)
                before = before * (lse_before - merged).exp() + part * (part_lse - merged).exp()
                out.index_copy_(0, tokens, before)
                lse.index_copy_(0, tokens, merged)
        out = out.to(q.dtype)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        sums = [torch.zeros_like(x) for x in (q, k, v)]
        for block in ctx.blocks:
            rows, folded = _block_rows((q, k, v), block), functools.partial(_folded, block, k.shape[1])
            outputs = folded(block.queries.place(out)), folded(block.queries.place(lse)).squeeze(-1)
            grads = flash_attention_gradients(
                folded(block.queries.place(grad)), rows, outputs, causal=block.causal, mask=_bias(block, rows)
            )
            for total, rows_grad, padded in zip(sums, grads, (block.queries, block.keys, block.keys), strict=True):
                taken = padded.take(_unfolded(block, rows_grad, total.shape[1]))
                if padded.tokens_N is None:
                    total += taken
                else:
                    total.index_add_(0, padded.tokens_N, taken)
        return *sums, None


def _folded(block: _Block, key_heads: int, x: torch.Tensor) -> torch.Tensor:
    """Without a mask, the queries of all heads that share a key head are rows of one head: no key is repeated."""
    return x if block.causal else x.reshape(x.shape[0], key_heads, -1, x.shape[-1])


def _unfolded(block: _Block, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Back to the heads of queries; or to those of keys, where these were repeated and their gradients add up."""
    if x.shape[1] > heads:
        return x.unflatten(1, (heads, -1)).sum(2)
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _block_rows(qkv: Qkv, block: _Block) -> Qkv:
    """The padded rows of a block: queries, keys and values."""
    key_heads = qkv[1].shape[1]
    queries, keys, values = block.queries.place(qkv[0]), block.keys.place(qkv[1]), block.keys.place(qkv[2])
    shared = queries.shape[1] // key_heads
    if block.causal and shared > 1:
        keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
    return _folded(block, key_heads, queries), keys, values


def _bias(block: _Block, rows: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return None if block.bias is None else block.bias.to(rows[0].dtype).expand(*rows[0].shape[:3], -1)


def _attend_block(qkv: Qkv, block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [N, H, d] and the log-sum-exp of scores [N, H, 1] of a block's queries. qkv: [T, heads, d] each."""
    rows, heads = _block_rows(qkv, block), qkv[0].shape[1]
    out, lse = flash_attention(*rows, causal=block.causal, mask=_bias(block, rows))
    return block.queries.take(_unfolded(block, out, heads)), block.queries.take(_unfolded(block, lse[..., None], heads))
