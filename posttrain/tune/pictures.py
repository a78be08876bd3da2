"""The pictures of rows in a training with TRL: their tiles join the batches, each picture once a batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.model.vision.tiling import PictureTiles, tiles_for
from posttrain.tune.examples import PICTURES, Example


class PictureTrainer:
    """Mix-in for a TRL trainer class, to be named before it among the bases.

    tiles: of the pictures that the column PICTURES of its datasets names; None for rows of text. num_shown: how many
    times a batch shows all pictures of its rows: once, or for pairs once for each side.
    """

    data_collator: Any
    num_shown = 1
    _signature_columns: list[str] | None

    def __init__(self, *args: Any, tiles: PictureTiles | None = None, **kwargs: Any):
        self._tiles = tiles
        super().__init__(*args, **kwargs)
        self.add_tiles()

    def add_tiles(self) -> None:
        """Have batches hold the tiles of their pictures from now on."""
        if self._tiles is not None and not isinstance(self.data_collator, _WithTiles):
            self.data_collator = _WithTiles(self.data_collator, self._tiles, self.num_shown)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self._signature_columns is not None and PICTURES not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, PICTURES]


class _WithTiles:
    """A collator that adds the tiles of the rows' pictures to what TRL's collator makes of the rows."""

    def __init__(self, collate: Any, tiles: PictureTiles, num_shown: int):
        self._collate = collate
        self._tiles = tiles
        self._num_shown = num_shown

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rest = [{name: value for name, value in row.items() if name != PICTURES} for row in rows]
        keys = [key for row in rows for key in row[PICTURES]] * self._num_shown
        return {**self._collate(rest), **self._tiles.inputs(keys)}


def stage_tiles(config: Any, store: Path) -> PictureTiles | None:
    """The tiles of a stage's pictures, which are in the file `store`; None for a stage without any."""
    if config.images is None:
        return None
    return tiles_for(store, config.model.path)


def picture_inputs(tiles: PictureTiles | None, examples: Sequence[Example], device: Any) -> Mapping[str, Any]:
    """The arguments of a forward over these conversations, in order, for their pictures; empty without any."""
    keys = [key for item in examples for key in item.pictures]
    return tiles.inputs(keys, device) if tiles is not None and keys else {}
