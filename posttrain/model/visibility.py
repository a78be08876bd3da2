"""Which token may see which. It is decided once for each forward, and all layers of one kind share it.

There are five cases. Each is a class with one method, `attend(q_BHSd, k_BGSd, v_BGSd, dropout) -> out_BHSd`, where H
query heads share G key heads:

  CausalRows     plain rows. The kernel's own causal mask is used, so no mask is stored.
  ChunkedRows    plain rows longer than attention_chunk_size. Each chunk is attended as a row.
  PackedSegments documents packed into rows. Each document, or each chunk of one, is attended as a row.
  MaskedRows     rows with padding, or with keys from a cache. A boolean mask is used.
  a packed tree  documents that hold what they share once; see tree_attention.py.

Left out: attention kernels for rows of different lengths (flash-attn); here segments of similar length are padded and
share a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

# Segments are padded to the longest of their batch. While padding makes the tokens at most this many times as many,
# one batch is faster than several.
MAX_PADDING = 2.0


class Visibility(Protocol):
    """Which token may see which, in the layers of one kind."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        """q [B, H, S, d], k and v [B, G, K, d] -> [B, H, S, d]."""
        ...


def sdpa(
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
    """Every token sees itself and all earlier tokens of its row."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        return sdpa(q, k, v, mask=None, dropout=dropout)


@dataclass(frozen=True, slots=True)
class ChunkedRows:
    """Every token sees itself and earlier tokens of its chunk. Chunks of `chunk_size` tokens start with the row."""

    chunk_size: int

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        whole = q.shape[2] // self.chunk_size * self.chunk_size
        parts = [self._whole_chunks(q[:, :, :whole], k[:, :, :whole], v[:, :, :whole], dropout=dropout)]
        if whole < q.shape[2]:
            parts.append(sdpa(q[:, :, whole:], k[:, :, whole:], v[:, :, whole:], mask=None, dropout=dropout))
        return torch.cat(parts, dim=2)

    def _whole_chunks(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, (-1, self.chunk_size)).transpose(1, 2).flatten(0, 1)

        out = sdpa(split(q), split(k), split(v), mask=None, dropout=dropout)
        return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """mask: bool [B or 1, 1, S, K], True where a query sees a key."""

    mask: torch.Tensor

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        return sdpa(q, k, v, mask=self.mask, dropout=dropout)


@dataclass(frozen=True, slots=True)
class Padded:
    """Tokens as rows that are padded on the right to one length, to be attended together.

    tokens_N: indices of the tokens among all B * S tokens; None if they are all of them. slots_N: the place of each
    of these tokens in the padded [rows * length].
    """

    rows: int
    length: int
    slots_N: torch.Tensor
    tokens_N: torch.Tensor | None

    def place(self, x_THd: torch.Tensor) -> torch.Tensor:
        """The rows of these tokens, [rows, H, length, d], with zeros as padding."""
        x = x_THd if self.tokens_N is None else x_THd.index_select(0, self.tokens_N)
        # The backward of index_copy is a plain gather. That of a gather would be a scatter that accumulates, and slow.
        flat = x.new_zeros(self.rows * self.length, *x.shape[1:]).index_copy(0, self.slots_N, x)
        return flat.unflatten(0, (self.rows, self.length)).transpose(1, 2)

    def take(self, x_RHLd: torch.Tensor) -> torch.Tensor:
        """The tokens of rows, [N, H, d], without the padding."""
        return x_RHLd.transpose(1, 2).flatten(0, 1).index_select(0, self.slots_N)


@dataclass(frozen=True, slots=True)
class PackedSegments:
    """Every token sees itself and the earlier tokens of its segment.

    Segments are padded on the right, where causal attention hides the padding from real tokens.
    """

    batches: tuple[Padded, ...]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        tokens = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [T, heads, d]
        parts = [b.take(sdpa(*map(b.place, tokens), mask=None, dropout=dropout)) for b in self.batches]
        return in_order(parts, self.batches).unflatten(0, (q.shape[0], -1)).transpose(1, 2)


def in_order(parts: Sequence[torch.Tensor], batches: Sequence[Padded]) -> torch.Tensor:
    """The tokens of all batches, each [N, H, d], in the order of the rows: [T, H, d]. Each token is in one batch."""
    if len(batches) == 1 and batches[0].tokens_N is None:
        return parts[0]
    order = torch.cat([batch.tokens_N for batch in batches if batch.tokens_N is not None])
    joined = torch.cat(list(parts))
    return torch.zeros_like(joined).index_copy(0, order, joined)


def packed_segments(starts_BS: torch.Tensor) -> PackedSegments:
    """Build PackedSegments. starts_BS: bool, True at the first token of each segment; column 0 must be True."""
    first = starts_BS.flatten().nonzero().squeeze(1)
    total = starts_BS.numel()
    lengths = torch.diff(first, append=first.new_tensor([total]))
    segment = torch.repeat_interleave(torch.arange(len(first), device=first.device), lengths, output_size=total)
    offset = torch.arange(total, device=first.device) - first[segment]
    longest = int(lengths.max())
    if len(first) * longest <= MAX_PADDING * total:
        return PackedSegments((Padded(len(first), longest, segment * longest + offset, None),))
    return PackedSegments(tuple(_batches_by_length(lengths, segment, offset)))


def _batches_by_length(lengths: torch.Tensor, segment: torch.Tensor, offset: torch.Tensor) -> list[Padded]:
    """One batch for the lengths between two powers of two, so that padding at most doubles a row."""
    power = torch.ceil(torch.log2(lengths.double())).long()
    batches = []
    for value in power.unique().tolist():
        chosen = power == value
        rank = torch.cumsum(chosen, 0) - 1
        tokens = chosen[segment].nonzero().squeeze(1)
        length = int(lengths[chosen].max())
        slots = rank[segment[tokens]] * length + offset[tokens]
        batches.append(Padded(int(chosen.sum()), length, slots, tokens))
    return batches


def row_mask(
    attention_mask_BK: torch.Tensor | None, queries: range, keys: range, *, chunk_size: int | None, device: torch.device
) -> torch.Tensor:
    """The mask of `MaskedRows`, bool [B or 1, 1, S, K]. queries, keys: their places in the row.

    Chunks are counted from the first token that is not padding. A query that is padding may see no key at all. Its
    output is then zero, and nothing reads it.
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
