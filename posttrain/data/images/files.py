"""Pictures as files beside a data file, so that any stage, and any other program, reads its rows as they are.

kept.jsonl    {"type": "image", "image": "images/KEY.png"}
images/KEY.png
"""

import io
from pathlib import Path

from msgspec.structs import replace

from posttrain.data.images.decode import PHOTO
from posttrain.data.images.store import ImageStore
from posttrain.records import ContentPart, ImagePart, Row

FOLDER = "images"


def with_files(row: Row, store: ImageStore, folder: Path) -> Row:
    """The row with the path of a file in each image part that has a key of `store`.

    The file, relative to `folder`, is written unless it is there. Its bytes are those of the store.
    """
    messages = tuple(
        message
        if isinstance(message.content, str)
        else replace(message, content=tuple(_with_file(part, store, folder) for part in message.content))
        for message in row.messages
    )
    return replace(row, messages=messages)


def _with_file(part: ContentPart, store: ImageStore, folder: Path) -> ContentPart:
    if not isinstance(part, ImagePart) or part.image is None:
        return part
    data = store.encoded(part.image)
    name = f"{FOLDER}/{part.image}.{format_of(data)}"
    path = folder / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")  # a crash leaves no part of a picture under its name
        aside.write_bytes(data)
        aside.replace(path)
    return ImagePart(name)


def format_of(data: bytes) -> str:
    """The format of an encoded picture, such as png or jpeg. A photo with more pictures behind it is a JPEG."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return {PHOTO: "jpeg"}.get(image.format or "", image.format or "png").lower()
