"""Micro-batches of training samples: which samples share a forward, and its tensors.

A micro-batch holds a limited number of tokens. It is laid out in one of two ways:

  shared   one row, a packed tree: samples that begin alike, such as the replies to one prompt, hold their beginning
           once. A group that is larger than a micro-batch is divided, and its prompt is in each part.
  padded   a row for each sample, of similar lengths and padded on the right, so that causal attention needs no mask.
           For models whose attention cannot be told of a tree (posttrain/model/sharing.py).

Pictures: while samples are compared and laid out, the tokens that stand for a picture have a number of the picture in
place of their id. So prompts with the same text and different pictures share nothing behind the first picture, and each
row says which picture stands where. Only the first tokens of a sample stand for its pictures, as many as these have
features; a <|patch|> that the policy sampled stays a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from posttrain.model.tree import Tree, tensor_of
from posttrain.model.vision.tiling import PictureTiles
from posttrain.rl.training.samples import TrainSample
from posttrain.train.prefixes import Document, pack, shared_length, sharing_order

_DIGITS = 15  # hexadecimal digits of a picture's key that its number takes: 60 bits


def micro_batches(
    samples: Sequence[TrainSample], max_tokens: int, *, shared: bool, tiles: PictureTiles | None = None
) -> list[list[TrainSample]]:
    """Split into micro-batches of at most `max_tokens` tokens. A longer sample is a micro-batch of its own.

    shared: what samples share counts once. Otherwise padding counts. tiles: of the samples' pictures.
    """
    return _shared_batches(samples, max_tokens, tiles) if shared else _padded_batches(samples, max_tokens)


def _shared_batches(
    samples: Sequence[TrainSample], max_tokens: int, tiles: PictureTiles | None
) -> list[list[TrainSample]]:
    documents = [_fed(sample, tiles) for sample in samples]
    batches: list[list[TrainSample]] = []
    before, size = Document((), 0), 0
    for index in sharing_order(documents):
        document = documents[index]
        added = len(document.ids) - shared_length(before, document)
        if not batches or size + added > max_tokens:
            batches.append([])
            size, added = 0, len(document.ids)
        batches[-1].append(samples[index])
        size += added
        before = document
    return batches


def _padded_batches(samples: Sequence[TrainSample], max_tokens: int) -> list[list[TrainSample]]:
    batches: list[list[TrainSample]] = []
    for sample in sorted(samples, key=len):
        if not batches or len(sample) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def _fed(sample: TrainSample, tiles: PictureTiles | None) -> Document:
    """What the model reads of a sample. Its last token is left out, as it predicts no token."""
    return Document(_numbered(sample, tiles)[:-1], sample.trained[0][0])


def _numbered(sample: TrainSample, tiles: PictureTiles | None) -> tuple[int, ...]:
    """The token ids of a sample, with the number of a picture, below 0, in place of each <|patch|> of it."""
    if tiles is None:
        return sample.token_ids
    if not sample.pictures and tiles.patch_id in sample.token_ids[: sample.trained[0][0]]:
        raise ValueError("a prompt holds <|patch|> tokens and names no picture that they stand for")
    numbers = iter([_number(key) for key in sample.pictures for _ in range(tiles.features(key))])
    return tuple(next(numbers, token) if token == tiles.patch_id else token for token in sample.token_ids)


def _number(key: str) -> int:
    return -1 - int(key[:_DIGITS], 16)


def _pictures(
    ids_BS: torch.Tensor, samples: Sequence[TrainSample], tiles: PictureTiles | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token ids with <|patch|> in place of numbers of pictures, and the arguments of the forward for its pictures."""
    keys = {_number(key): key for sample in samples for key in sample.pictures}
    if not keys:
        return ids_BS, {}
    assert tiles is not None
    stands_BS = ids_BS < 0
    numbers, shown, at = ids_BS[stands_BS].tolist(), [], 0
    while at < len(numbers):
        shown.append(keys[numbers[at]])
        at += tiles.features(shown[-1])
    places = stands_BS.flatten().nonzero().squeeze(1)
    inputs = {**tiles.inputs(shown, ids_BS.device), "image_places": places}
    return ids_BS.masked_fill(stands_BS, tiles.patch_id), inputs


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Tensors of one micro-batch. B rows, S tokens, T trained tokens.

    input_ids_BS: int64. mask_BS: False for padding. tree: the structure of the only row, or None if rows are samples.
    position_T: index into the flattened [B * S] hidden states of the state that predicts each trained token. target_T,
    staleness_T: int64. sequence_T: int64, the sample of each trained token. sampler_logprobs_T, advantages_T: fp32.
    ref_logprobs_T: fp32, or None if no sample has any. pictures: the further arguments of a forward with pictures.
    """

    input_ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    tree: Tree | None
    position_T: torch.Tensor
    target_T: torch.Tensor
    sampler_logprobs_T: torch.Tensor
    advantages_T: torch.Tensor
    staleness_T: torch.Tensor
    sequence_T: torch.Tensor
    ref_logprobs_T: torch.Tensor | None
    pictures: Mapping[str, torch.Tensor] = field(default_factory=dict)


def collate(
    samples: Sequence[TrainSample],
    pad_id: int,
    device: torch.device | str = "cpu",
    *,
    shared: bool,
    tiles: PictureTiles | None = None,
) -> MicroBatch:
    """The tensors of a micro-batch; trained tokens are in the order of the samples. tiles: of their pictures, each of
    which the micro-batch has once.

    Raises ValueError if some samples have log-probabilities of the reference and others do not, or if the lengths of a
    sample's sequences do not fit its trained tokens.
    """
    positions, targets, logprobs, advantages, staleness, sequences = [], [], [], [], [], []
    ref_logprobs = [value for sample in samples for value in sample.ref_logprobs]
    ids, mask, tree, places = (_tree_row if shared else _padded_rows)(samples, pad_id, device, tiles=tiles)
    ids, pictures = _pictures(ids, samples, tiles)
    for index, sample in enumerate(samples):
        _check_lengths(sample, bool(ref_logprobs))
        for start, end in sample.trained:
            # The hidden state at a token predicts the next one, so each target has the place before its own.
            positions += places[index][start - 1 : end - 1]
            targets += sample.token_ids[start:end]
        logprobs += sample.sampler_logprobs
        for count, advantage in sample.spans:
            advantages += [advantage] * count
        staleness += sample.staleness
        sequences += [index] * sample.num_trained
    return MicroBatch(
        ids,
        mask,
        tree,
        tensor_of(positions, device),
        tensor_of(targets, device),
        tensor_of(logprobs, device, np.float32),
        tensor_of(advantages, device, np.float32),
        tensor_of(staleness, device),
        tensor_of(sequences, device),
        tensor_of(ref_logprobs, device, np.float32) if ref_logprobs else None,
        pictures,
    )


Layout = tuple[torch.Tensor, torch.Tensor, Tree | None, Sequence[Sequence[int]]]  # the last: places of samples' tokens


def _tree_row(
    samples: Sequence[TrainSample], pad_id: int, device: torch.device | str, *, tiles: PictureTiles | None
) -> Layout:
    packed = pack([_fed(sample, tiles) for sample in samples], device)
    return packed.ids_1T, torch.ones_like(packed.ids_1T, dtype=torch.bool), packed.tree, packed.places


def _padded_rows(
    samples: Sequence[TrainSample], pad_id: int, device: torch.device | str, *, tiles: PictureTiles | None
) -> Layout:
    width = max(map(len, samples)) - 1
    rows = [[*_numbered(sample, tiles)[:-1], *[pad_id] * (width - len(sample) + 1)] for sample in samples]
    lengths = torch.tensor([len(sample) - 1 for sample in samples], device=device)
    places = [range(index * width, index * width + width) for index in range(len(samples))]
    return tensor_of(rows, device), torch.arange(width, device=device) < lengths[:, None], None, places


def _check_lengths(sample: TrainSample, has_reference: bool) -> None:
    count = sum(end - start for start, end in sample.trained)
    if not len(sample.sampler_logprobs) == len(sample.staleness) == count:
        raise ValueError(
            f"{count} tokens are trained on, but there are {len(sample.sampler_logprobs)} log-probabilities of the "
            f"sampler and {len(sample.staleness)} values of staleness"
        )
    if has_reference and len(sample.ref_logprobs) != count:
        raise ValueError("each trained token needs a log-probability of the reference policy, or none may have one")
