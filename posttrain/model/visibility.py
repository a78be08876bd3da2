"""Which token may see which. It is decided once for each forward, and all layers of one kind share it.

There are four cases. Each is a class with one method, `attend(q_BHSd, k_BGSd, v_BGSd, dropout) -> out_BHSd`, where H
query heads share G key heads:

  CausalRows     plain rows. The kernel's own causal mask is used, so no mask is stored.
  ChunkedRows    plain rows longer than attention_chunk_size. Each chunk is attended as a row.
  PackedSegments documents packed into rows. Each document, or each chunk of one, is attended as a row.
  MaskedRows     rows with padding, or with keys from a cache. A boolean mask is used.

Left out: attention kernels for rows of different lengths (flash-attn); here segments of similar length are padded and
share a batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Segments are padded to the longest of their batch. While padding makes the tokens at most this many times as many,
# one batch is faster than several.
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
    """Every token sees itself and all earlier tokens of its row."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        return _sdpa(q, k, v, mask=None, dropout=dropout)


@dataclass(frozen=True, slots=True)
class ChunkedRows:
    """Every token sees itself and earlier tokens of its chunk. Chunks of `chunk_size` tokens start with the row."""

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
    """mask: bool [B or 1, 1, S, K], True where a query sees a key."""

    mask: torch.Tensor

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float) -> torch.Tensor:
        return _sdpa(q, k, v, mask=self.mask, dropout=dropout)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Segments that are padded to one length and attended together.

    tokens_N: indices of their tokens among all B * S tokens; None if they are all of them. slots_N: the place of each
    of these tokens in the padded [rows * length].
    """

    rows: int
    length: int
    slots_N: torch.Tensor
    tokens_N: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PackedSegments:
    """Every token sees itself and the earlier tokens of its segment.

    Segments are padded on the right, where causal attention hides the padding from real tokens.
    """

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
        # The backward of index_copy is a plain gather. That of a gather would be a scatter that accumulates, and slow.
        flat = x.new_zeros(batch.rows * batch.length, *x.shape[1:]).index_copy(0, batch.slots_N, x)
        return flat.unflatten(0, (batch.rows, batch.length)).transpose(1, 2)

    out = _sdpa(place(tokens[0]), place(tokens[1]), place(tokens[2]), mask=None, dropout=dropout)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, batch.slots_N)


Visibility = CausalRows | ChunkedRows | PackedSegments | MaskedRows


def packed_segments(starts_BS: torch.Tensor) -> PackedSegments:
    """Build PackedSegments. starts_BS: bool, True at the first token of each segment; column 0 must be True."""
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
    """One batch for the lengths between two powers of two, so that padding at most doubles a row."""
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
