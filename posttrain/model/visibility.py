"""Which token may see which, decided once a forward and shared by all layers of a kind.

Four cases, each with one method `attend(q_BHSd, k_BGSd, v_BGSd, dropout) -> out_BHSd`, where H query heads share G
key heads:

  CausalRows     plain rows: the kernel's own causal mask, nothing materialised.
  ChunkedRows    plain rows longer than attention_chunk_size: chunks become rows of their own.
  PackedSegments documents packed into rows: each document (or each chunk of it) becomes a row of its own.
  MaskedRows     padding, or keys from a cache: a boolean mask.

Left out: attention kernels with variable lengths (flash-attn); segments of similar length share a batch instead.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Segments are padded to the longest of their batch. Up to this factor of wasted rows one batch is faster than several.
_MAX_PADDING = 2.0


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=grouped
    )


@dataclass(frozen=True, slots=True)
class CausalRows:
    """Every token sees itself and all before it in its row."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        return _sdpa(q, k, v, mask=None, dropout=dropout)


@dataclass(frozen=True, slots=True)
class ChunkedRows:
    """As CausalRows, but only within chunks of `chunk_size` tokens counted from the start of the row."""

    chunk_size: int

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        whole = q.shape[2] // self.chunk_size * self.chunk_size
        parts = [self._whole_chunks(q[:, :, :whole], k[:, :, :whole], v[:, :, :whole], dropout=dropout)]
        if whole < q.shape[2]:
            parts.append(_sdpa(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:], mask=None, dropout=dropout))
        return torch.cat(parts, dim=2)

    def _whole_chunks(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, (-1, self.chunk_size)).transpose(1, 2).flatten(0, 1)

        out = _sdpa(split(q), split(k), split(v), mask=None, dropout=dropout)
        return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """`mask` [B or 1, 1, S, K] is True where a query sees a key."""

    mask: torch.Tensor

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        return _sdpa(q, k, v, mask=self.mask, dropout=dropout)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Segments that are attended together. `slots_N` are places in [rows * length], `tokens_N` flat token indices."""

    rows: int
    length: int
    slots_N: torch.Tensor
    tokens_N: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PackedSegments:
    """Runs of tokens that see only earlier tokens of their own run, padded on the right, where causality hides it."""

    batches: tuple[_Batch, ...]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        tokens = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [T, heads, d]
        if len(self.batches) == 1:
            out = _attend_batch(tokens, self.batches[0], dropout)
        else:
            parts = [_attend_batch(tokens, batch, dropout) for batch in self.batches]
            order = torch.cat([batch.tokens_N for batch in self.batches if batch.tokens_N is not None])
            out = torch.zeros_like(tokens[0]).index_copy(0, order, torch.cat(parts))
        return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def _attend_batch(tokens: list[torch.Tensor], batch: _Batch, dropout: float) -> torch.Tensor:
    def place(x: torch.Tensor) -> torch.Tensor:
        x = x if batch.tokens_N is None else x.index_select(0, batch.tokens_N)
        # index_copy's backward is a plain gather; a gather here would need an accumulating scatter in backward.
        flat = x.new_zeros(batch.rows * batch.length, *x.shape[1:]).index_copy(0, batch.slots_N, x)
        return flat.unflatten(0, (batch.rows, batch.length)).transpose(1, 2)

    out = _sdpa(place(tokens[0]), place(tokens[1]), place(tokens[2]), mask=None, dropout=dropout)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, batch.slots_N)


Visibility = CausalRows | ChunkedRows | PackedSegments | MaskedRows


def packed_segments(starts_BS: torch.Tensor) -> PackedSegments:
    """Build PackedSegments from the first token of each segment (bool [B, S]; column 0 must be True)."""
    first = starts_BS.flatten().nonzero().squeeze(1)
    total = starts_BS.numel()
    lengths = torch.diff(first, append=first.new_tensor([total]))
    segment = torch.repeat_interleave(torch.arange(len(first), device=first.device), lengths, output_size=total)
    offset = torch.arange(total, device=first.device) - first[segment]
    longest = int(lengths.max())
    if len(first) * longest <= _MAX_PADDING * total:
        return PackedSegments((_Batch(len(first), longest, segment * longest + offset, None),))
    return PackedSegments(tuple(_batches_by_length(lengths, segment, offset)))


def _batches_by_length(lengths: torch.Tensor, segment: torch.Tensor, offset: torch.Tensor) -> list[_Batch]:
    """One batch for each power of two of length, so that padding at most doubles a row."""
    power = torch.ceil(torch.log2(lengths.double())).long()
    batches = []
    for value in power.unique().tolist():
        chosen = power == value
        rank = torch.cumsum(chosen, 0) - 1
        tokens = chosen[segment].nonzero().squeeze(1)
        length = int(lengths[chosen].max())
        slots = rank[segment[tokens]] * length + offset[tokens]
        batches.append(_Batch(int(chosen.sum()), length, slots, tokens))
    return batches


def row_mask(
    attention_mask_BK: torch.Tensor | None, queries: range, keys: range, *, chunk_size: int | None, device: torch.device
) -> torch.Tensor:
    """Boolean [B or 1, 1, S, K] for queries and keys at the given slots of their rows.

    Chunks are counted from the first token that is not padding. A query that sees nothing (it is padding itself)
    is left so: its output is zero and no one reads it.
    """
    query = torch.arange(queries.start, queries.stop, device=device)[None, :, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None, None, :]
    mask = key <= query
    if attention_mask_BK is not None:
        present = attention_mask_BK.bool()
        mask = mask & present[:, None, keys.start : keys.stop]
    if chunk_size is not None:
        if attention_mask_BK is None:
            padding = torch.zeros(1, 1, 1, dtype=torch.long, device=device)
        else:
            padding = (present.cumsum(-1) == 0).sum(-1)[:, None, None]
        mask = mask & ((key - padding) // chunk_size == (query - padding) // chunk_size)
    return mask[:, None]
