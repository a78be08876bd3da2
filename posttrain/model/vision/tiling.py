"""Cuts the pictures of a store into tiles, as the processor of a model does, and puts those of a forward together.

A picture is decoded and cut when it is first needed, and its tiles are kept while there is room, so the rows of a
group, of a pair or of later epochs do not cut it again. In a forward each picture is encoded once, however many rows
show it. Left out: other image processors than Llama 4's.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.data.images.store import ImageStore
from posttrain.data.images.tiles import TileRule, tile_rule
from posttrain.errors import CheckpointError
from posttrain.model.adapter import base_folder
from posttrain.model.tokenizer import load_tokenizer

KEPT_BYTES = 1 << 30


class PictureTiles:
    """The tiles of the pictures in a store.

    folder: of the model, with the files of its processor. rule: by which tokens were made for the pictures.
    kept_bytes: memory for tiles that may be needed again.
    """

    def __init__(self, store: ImageStore, folder: str | Path, rule: TileRule, *, kept_bytes: int = KEPT_BYTES):
        self._store = store
        self._folder = folder
        self._rule = rule
        self._processor: Any = None
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._room = kept_bytes

    def of(self, key: str) -> torch.Tensor:
        """The tiles of a picture, bfloat16 [tiles, 3, side, side], as the processor rounds them.

        Raises `CheckpointError` if the processor makes another number of tiles than tokens were made for.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tiles = self._cut(key)
        self._room -= tiles.nbytes
        self._kept[key] = tiles
        while self._room < 0:
            self._room += self._kept.popitem(last=False)[1].nbytes
        return tiles

    @property
    def patch_id(self) -> int:
        """The id of <|patch|>, of which one stands for each feature of a picture."""
        return self._rule.patch

    def features(self, key: str) -> int:
        """How many <|patch|> tokens stand for a picture. The picture is not read."""
        picture = self._store[key]
        return self._rule.num_tiles(picture.width, picture.height) * self._rule.features

    def _cut(self, key: str) -> torch.Tensor:
        if self._processor is None:
            from transformers import Llama4ImageProcessor

            self._processor = Llama4ImageProcessor.from_pretrained(self._folder)
        tiles = self._processor(images=[self._store.decoded(key)], return_tensors="pt")["pixel_values"]
        picture = self._store[key]
        if len(tiles) != (made := self._rule.num_tiles(picture.width, picture.height)):
            raise CheckpointError(
                f"{self._folder}: the processor cuts a picture of {picture.width} x {picture.height} pixels into "
                f"{len(tiles)} tiles, but its tokens are those of {made}; are the processor's files damaged?"
            )
        return tiles

    def inputs(self, shown: Iterable[str], device: Any = "cpu") -> Mapping[str, torch.Tensor]:
        """The arguments of a forward of `NativeLlama4ForConditionalGeneration` for its pictures; empty without any.

        shown: keys of the pictures in the order in which the tokens of all rows show them. pixel_values has the tiles
        of each picture once, and shown_tiles says which of them stand where.
        """
        keys = list(shown)
        if not keys:
            return {}
        places: dict[str, torch.Tensor] = {}
        tiles: list[torch.Tensor] = []
        count = 0
        for key in dict.fromkeys(keys):
            own = self.of(key)
            places[key] = torch.arange(count, count + len(own))
            tiles.append(own)
            count += len(own)
        inputs = {"pixel_values": torch.cat(tiles)}
        if len(places) < len(keys):
            inputs["shown_tiles"] = torch.cat([places[key] for key in keys])
        return {name: value.to(device) for name, value in inputs.items()}


def tiles_for(store: Path, folder: str) -> PictureTiles:
    """The tiles of the pictures in the file `store`, for the model in a folder, or for that of the adapters in it."""
    base = base_folder(folder)
    return PictureTiles(ImageStore(store), base, tile_rule(base, load_tokenizer(folder)))
