"""The modality of a row: how many pictures it shows."""

from posttrain.config.images import Modality
from posttrain.data.images.render import pictures_of
from posttrain.records import Row


def modality_of(row: Row) -> Modality:
    """text, image for one picture, or multi-image. The pictures must have keys, as `ImageReader.take` gives them."""
    shown = len(pictures_of(row.messages))
    return "text" if not shown else "image" if shown == 1 else "multi-image"
