"""The tiles of a picture and the tokens that stand for it, from its size alone, as Llama 4's processor makes them.

A picture is fitted into a canvas of tiles, rows by columns. If the canvas has more than one tile, a smaller version of
the whole picture follows as one more tile. Each tile has as many <|patch|> tokens as it has features.
Source: transformers' `Llama4ImageProcessor` and `Llama4Processor`. No torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import CheckpointError, DataError
from posttrain.files import read_object

IMAGE = "<|image|>"  # stands for a picture until its tokens replace it
TOKENS = (
    IMAGE, "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
)  # fmt: skip
NO_PICTURE = -1  # in place of the index of a picture, for a token that stands for none


@dataclass(frozen=True, slots=True)
class TileRule:
    """How a model's processor cuts a picture, and the ids of the tokens that stand for it.

    tile: side of a tile in pixels. max_tiles: most tiles of a canvas. features: <|patch|> tokens of a tile.
    to_max_canvas: a picture is enlarged to the largest canvas. The rest are token ids, of `TOKENS` in order.
    """

    tile: int
    max_tiles: int
    features: int
    to_max_canvas: bool
    image: int
    patch: int
    start: int
    end: int
    column_end: int
    row_end: int

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles for a picture of this size in pixels."""
        return best_canvas(height, width, tile=self.tile, max_tiles=self.max_tiles, to_max_canvas=self.to_max_canvas)

    def num_tiles(self, width: int, height: int) -> int:
        """How many tiles the model encodes for a picture, with the one that shows it whole."""
        rows, columns = self.canvas(width, height)
        return rows * columns + (rows * columns > 1)

    def ids(self, width: int, height: int) -> list[int]:
        """The token ids that stand for a picture."""
        rows, columns = self.canvas(width, height)
        tile = [self.patch] * self.features
        row = [*tile, *[self.column_end, *tile] * (columns - 1), self.row_end]
        parts = row * rows if rows * columns > 1 else []
        return [self.start, *parts, self.image, *tile, self.end]

    def expand(
        self, ids: Sequence[int], mask: Sequence[int], sizes: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int, int]]:
        """Each token of `ids`, with every <|image|> replaced by the tokens of the next picture.

        Yields (id, mask, index of the picture that it stands for or `NO_PICTURE`); the mask of a picture's tokens is 0.
        sizes: (width, height) of the pictures in order. Raises `DataError` if `ids` has not one <|image|> for each.
        """
        found = sum(token == self.image for token in ids)
        if found != len(sizes):
            raise DataError(
                f"the chat template shows {found} of {len(sizes)} pictures; it must write <|image|> for each part "
                '{"type": "image"}'
            )
        pictures = enumerate(sizes)
        for token, bit in zip(ids, mask, strict=True):
            if token == self.image:
                index, size = next(pictures)
                yield from ((item, 0, index) for item in self.ids(*size))
            else:
                yield token, bit, NO_PICTURE


@lru_cache(maxsize=4096)
def best_canvas(height: int, width: int, *, tile: int, max_tiles: int, to_max_canvas: bool) -> tuple[int, int]:
    """Rows and columns of the canvas that a picture is fitted into.

    The canvas that enlarges it least (`to_max_canvas`: most), else the one that shrinks it least; of equal ones the
    smallest. Computed in fp32, as the processor does, because equal scales decide.
    """
    import numpy as np

    canvases = np.array(_canvases(max_tiles))
    sides = (canvases * tile).astype(np.float32)
    scales = np.minimum(sides[:, 0] / np.float32(height), sides[:, 1] / np.float32(width))
    larger, smaller = scales[scales >= 1], scales[scales < 1]
    if len(larger):
        scale = larger.max() if to_max_canvas else larger.min()
    else:
        scale = smaller.max()
    fitting = canvases[scales == scale]
    rows, columns = fitting[np.argmin(fitting.prod(1))]
    return int(rows), int(columns)


def _canvases(max_tiles: int) -> list[tuple[int, int]]:
    """All (rows, columns) of at most `max_tiles` tiles, ordered as the processor orders them."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for count in range(max_tiles, 0, -1):
        for rows in (n for n in range(1, count + 1) if count % n == 0):
            by_ratio.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return [canvas for same in by_ratio.values() for canvas in same]


def tile_rule(folder: str | Path, tokenizer: Tokenizer) -> TileRule:
    """The rule of a model folder, from its processor's files and config.json.

    Raises `CheckpointError` if the folder has no vision encoder or no processor, if its tokenizer lacks a token, or if
    the processor does not fit the model.
    """
    folder = Path(folder)
    config = multimodal_config(folder)
    images, tile, features = fitting_processor(folder)
    known = tokenizer.get_vocab()
    if missing := [token for token in TOKENS if token not in known]:
        raise CheckpointError(f"{folder}: its tokenizer lacks {', '.join(missing)}, which stand for pictures")
    if (patch := known["<|patch|>"]) != config.get("image_token_index"):
        raise CheckpointError(
            f"{folder}: image_token_index in config.json is {config.get('image_token_index')}; the tokenizer's "
            f"<|patch|> is {patch}, and they must be equal"
        )
    return TileRule(
        tile, int(images.get("max_patches", 16)), features, bool(images.get("resize_to_max_canvas", False)),
        *(known[token] for token in TOKENS),
    )  # fmt: skip


def multimodal_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises `CheckpointError` for a model that takes no images."""
    config = read_object(folder / "config.json") or {}
    if not _is_multimodal(config):
        raise CheckpointError(
            f"{folder}: model_type is {config.get('model_type')!r}, which takes no images here; rows with images need "
            "a multimodal Llama 4 (model_type llama4, with a vision_config)"
        )
    return config


def takes_pictures(folder: Path) -> bool:
    """Whether the model of a folder is one that takes pictures."""
    return _is_multimodal(read_object(folder / "config.json") or {})


def _is_multimodal(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llama4" and isinstance(config.get("vision_config"), dict)


def fitting_processor(folder: Path) -> tuple[dict[str, Any], int, int]:
    """(the image processor's config, side of a tile, features of a tile) of a multimodal folder, from its JSON files.

    Raises `CheckpointError` if the folder has no vision encoder or no processor, or where the two differ.
    """
    vision = multimodal_config(folder)["vision_config"]
    processor = read_object(folder / "processor_config.json") or {}
    images = processor.get("image_processor") or read_object(folder / "preprocessor_config.json")
    if not isinstance(images, dict):
        raise CheckpointError(f"{folder}: no image processor (processor_config.json or preprocessor_config.json)")
    size = images.get("size") or {}
    tile = size.get("height", 336)
    patch, ratio = processor.get("patch_size", 14), processor.get("pixel_shuffle_ratio", 0.5)
    own = {"image_size": 448, "patch_size": 14, "pixel_shuffle_ratio": 0.5} | vision
    for name, got in (("image_size", tile), ("patch_size", patch), ("pixel_shuffle_ratio", ratio)):
        if own[name] != got:
            raise CheckpointError(
                f"{folder}: the processor has {name} {got}, and the model {own[name]} (vision_config in config.json); "
                "take the processor that belongs to the model"
            )
    return images, tile, round((tile // patch) ** 2 * ratio**2)
