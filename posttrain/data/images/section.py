"""The readers of pictures that the section `images` of a stage's config asks for."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.config.images import ImagesConfig
from posttrain.data.images.render import Pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.images.tiles import tile_rule
from posttrain.data.tokenizer import Tokenizer

STORE = "pictures"  # the file of a stage's pictures, in its folder


def image_reader(images: ImagesConfig | None, folder: Path) -> ImageReader | None:
    """A reader that keeps pictures in a stage's folder; None for a stage that takes none."""
    if images is None:
        return None
    root = None if images.root is None else Path(images.root)
    return ImageReader(ImageStore(folder / STORE), root=root, max_images=images.max_images)


def pictures_for(store: ImageStore | None, model: str | Path, tokenizer: Tokenizer) -> Pictures | None:
    """What the tokens of pictures follow from; None without a store of pictures.

    model: a folder with the files of a processor, which for adapters is that of their base. Raises `CheckpointError`
    for a model that takes no pictures.
    """
    return None if store is None else Pictures(store, tile_rule(model, tokenizer))


@contextmanager
def passing_reader(images: ImagesConfig | None) -> Iterator[ImageReader | None]:
    """As `image_reader`, for rows that are only checked: its pictures are removed when the block ends."""
    if images is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield image_reader(images, Path(folder))
