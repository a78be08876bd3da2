"""Make the `Positions` of one forward from position ids, padding mask and cache.

A caller gives documents in one of three ways:

  padded   one document in each row; `attention_mask` marks padding. As in transformers, chunks are counted from the
           first real token, and the attention temperature from the start of the row.
  packed   several documents in a row; `position_ids` restart at each. Documents do not see each other. Chunks and
           temperature are counted within the document, so a packed document has the same outputs as it has alone.
  tree     documents in one row that hold what they share once (tree.py); counted within the document, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import Llama4TextConfig
from transformers.cache_utils import Cache

from posttrain.model.attention import Positions
from posttrain.model.rope import rotations
from posttrain.model.tree import Tree
from posttrain.model.tree_attention import tree_visibility
from posttrain.model.visibility import CausalRows, ChunkedRows, MaskedRows, Visibility, packed_segments, row_mask


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a forward are laid out.

    position_ids_BS: int64, [B or 1, S]. attention_mask_BK: bool, False for padding, over the cached and new tokens of a
    row; None if the mask would hide nothing that causal attention shows. starts_BS: bool, True at the first token of
    each document; None if no row is packed.
    """

    position_ids_BS: torch.Tensor
    attention_mask_BK: torch.Tensor | None
    starts_BS: torch.Tensor | None


def layout_of(
    batch: int,
    length: int,
    past: int,
    *,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    device: torch.device,
) -> Layout:
    """Find out whether rows are plain, padded or packed. past: how many tokens of each row are in the cache.

    Raises:
        ValueError: the shape of the attention mask is not [batch, past + length].
    """
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + length):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be [batch, seen + new tokens] = "
            f"{[batch, past + length]}"
        )
    mask = None if attention_mask is None else attention_mask.to(device=device, dtype=torch.bool)
    if position_ids is None:
        return Layout(torch.arange(past, past + length, device=device)[None], _needed(mask, past), None)
    position_ids = position_ids.to(device)
    starts = _document_starts(position_ids.expand(batch, -1), mask) if past == 0 and length > 1 else None
    if starts is not None:
        return Layout(position_ids.expand(batch, -1), None, starts)
    return Layout(position_ids, _needed(mask, past), None)


def _needed(mask_BK: torch.Tensor | None, past: int) -> torch.Tensor | None:
    """The mask, or None if causal attention alone hides all padding from real tokens.

    That is so without padding, and where padding is only at the end of rows that have no cached tokens.
    """
    if mask_BK is None or bool(mask_BK.all()):
        return None
    if past == 0 and bool((mask_BK[:, 1:] <= mask_BK[:, :-1]).all()):
        return None
    return mask_BK


def _document_starts(position_ids_BS: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor | None:
    """The first token of each document, bool [B, S], or None if no row holds more than one document.

    A row is packed if its positions restart between two real tokens; a jump next to padding alone does not count. In a
    packed row, each run of padding then counts as a document of its own.
    """
    breaks = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    between_real = breaks if mask_BS is None else breaks & mask_BS[:, 1:] & mask_BS[:, :-1]
    if not bool(between_real.any()):
        return None
    if mask_BS is not None:
        breaks = breaks | (mask_BS[:, 1:] != mask_BS[:, :-1])
    return torch.nn.functional.pad(breaks, (1, 0), value=True)


def place(
    config: Llama4TextConfig,
    layout: Layout,
    length: int,
    *,
    cache: Cache | None,
    frequencies: tuple[torch.Tensor, float],
) -> Positions:
    """The `Positions` of a forward. frequencies: of rope.inverse_frequencies, on the device of the forward."""
    turns = rotations(layout.position_ids_BS, *frequencies)
    kinds = set(config.layer_types or ())
    if layout.starts_BS is not None:
        visibility = {kind: _packed(config, layout, kind) for kind in kinds}
        return Positions(turns, layout.position_ids_BS, visibility)
    past = cache.get_seq_length() if cache is not None else 0
    slots = torch.arange(past, past + length, device=turns.device)[None]
    if past == 0 and layout.attention_mask_BK is None:
        visibility = {kind: _plain(config, kind, length) for kind in kinds}
    else:
        visibility = {kind: _masked(config, layout, kind, slots=slots, cache=cache) for kind in kinds}
    return Positions(turns, slots, visibility)


def place_tree(
    config: Llama4TextConfig,
    tree: Tree,
    shape: tuple[int, int],
    *,
    others: Mapping[str, object],
    frequencies: tuple[torch.Tensor, float],
) -> Positions:
    """The `Positions` of a forward of one packed tree.

    shape: of the tokens. others: arguments that would contradict the tree, by name. frequencies: as for `place`.

    Raises:
        ValueError: the tokens are not one row as long as the tree, or another argument is given.
    """
    if shape != (1, len(tree)):
        raise ValueError(f"the tokens are {list(shape)}; a tree of {len(tree)} tokens needs [1, {len(tree)}]")
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)} cannot be given with a tree, which holds the positions of its tokens")
    turns = rotations(tree.positions_1T, *frequencies)
    sizes = {kind: _chunk_size(config, kind) for kind in set(config.layer_types or ())}
    # No document reaches into a second chunk: then the layers of all kinds share what is computed once.
    sizes = {kind: None if size is None or tree.longest <= size else size for kind, size in sizes.items()}
    made = {size: tree_visibility(tree, size, dropout=config.attention_dropout > 0) for size in set(sizes.values())}
    return Positions(turns, tree.positions_1T, {kind: made[size] for kind, size in sizes.items()})


def _chunk_size(config: Llama4TextConfig, kind: str) -> int | None:
    return config.attention_chunk_size if kind == "chunked_attention" else None


def _plain(config: Llama4TextConfig, kind: str, length: int) -> Visibility:
    chunk_size = _chunk_size(config, kind)
    return CausalRows() if chunk_size is None or length <= chunk_size else ChunkedRows(chunk_size)


def _packed(config: Llama4TextConfig, layout: Layout, kind: str) -> Visibility:
    chunk_size = _chunk_size(config, kind)
    starts = layout.starts_BS
    assert starts is not None
    return packed_segments(starts if chunk_size is None else starts | (layout.position_ids_BS % chunk_size == 0))


def _masked(
    config: Llama4TextConfig, layout: Layout, kind: str, *, slots: torch.Tensor, cache: Cache | None
) -> Visibility:
    length, device = slots.shape[1], slots.device
    past = cache.get_seq_length() if cache is not None else 0
    total, offset = past + length, 0
    if cache is not None:
        # In the cache, a layer of chunked attention keeps only its latest keys: the mask must start where they start.
        total, offset = cache.get_mask_sizes(length, list(config.layer_types or ()).index(kind))
    keys, queries = range(offset, offset + total), range(past, past + length)
    return MaskedRows(
        row_mask(layout.attention_mask_BK, queries, keys, chunk_size=_chunk_size(config, kind), device=device)
    )
