"""Finds the pictures of a row in the forms that people write, and puts them into a store.

    content parts        {"type": "image", "image": path}, {"type": "image_url", "image_url": {"url": "data:..."}}
    a column of pictures {"images": [path, {"bytes", "path"}, ...]} or {"image": ...}, as in TRL and Hugging Face, with
                         {"type": "image"} parts as their places; or <image> in the text, as in LLaMA-Factory and verl;
                         without any place they stand before the text of the first user turn, as in TRL

A picture is given as a path below `root`, as a data URL, or as bytes in a table. Each place has one picture and each
picture one place: a row in which they differ is bad. Nothing is downloaded.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from msgspec.structs import replace

from posttrain.data.images.decode import PictureError
from posttrain.data.images.store import ImageStore
from posttrain.data.messages import RowError, is_absent, shown
from posttrain.records import ContentPart, ImagePart, Message, Row, TextPart

PLACE = "<image>"
COLUMNS = ("images", "image")
MAX_IMAGES = 8
MAX_BYTES = 100 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class ImageReader:
    """Puts the pictures of rows into a store.

    root: the folder that paths are relative to, and below which all pictures lie; None for the folder of the file that
    the row is from. max_images: most pictures of a row.
    """

    def __init__(self, store: ImageStore, *, root: Path | None = None, max_images: int = MAX_IMAGES):
        self.store = store
        self.root = root
        self.max_images = max_images

    def take(self, row: Row, folder: Path) -> Row:
        """The row with the key of a picture in each image part, and without its column of pictures.

        A turn with pictures has parts as its content. folder: of the file that the row is from. Raises `RowError`.
        """
        messages, fields = self.take_from(row.messages, row.fields, folder)
        return replace(row, messages=messages, fields=fields)

    def take_from(
        self, turns: Sequence[Message], columns: Mapping[str, Any], folder: Path
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """As `take`, for the turns and the other columns of a row: both as `take` would return them."""
        name, listed = _column(columns)
        places = [_places(message, f"messages[{at}]", listed=bool(listed)) for at, message in enumerate(turns)]
        if listed and not any(isinstance(part, ImagePart) for parts in places for part in parts):
            first = next(at for at, message in enumerate(turns) if message.role == "user")
            places[first] = [*[ImagePart()] * len(listed), *places[first]]
        open_places = sum(isinstance(part, ImagePart) and part.image is None for parts in places for part in parts)
        if open_places != len(listed):
            raise RowError(
                f"{name}: {len(listed)} pictures, but {open_places} places for them in the messages "
                f'({PLACE} in the text, or parts {{"type": "image"}}); give each picture one place'
            )
        total = sum(isinstance(part, ImagePart) for parts in places for part in parts)
        if total > self.max_images:
            raise RowError(
                f"{total} pictures; at most {self.max_images} of a row are taken (images.max_images, or --max-images); "
                "remove some, or the row"
            )
        left = iter([(f"{name}[{at}]", value) for at, value in enumerate(listed)])
        messages = []
        for at, (message, parts) in enumerate(zip(turns, places, strict=True)):
            if any(isinstance(part, ImagePart) for part in parts):
                kept: list[ContentPart] = []
                for part in parts:
                    if isinstance(part, ImagePart):
                        where, value = (f"messages[{at}]", part.image) if part.image is not None else next(left)
                        part = ImagePart(self._key(where, value, folder))
                    kept.append(part)
                message = replace(message, content=tuple(kept))
            messages.append(message)
        return tuple(messages), {key: value for key, value in columns.items() if key not in COLUMNS}

    def _key(self, where: str, value: object, folder: Path) -> str:
        try:
            return self.store.add(encoded_bytes(value, self.root, folder)).key
        except PictureError as error:
            raise RowError(f"{where}: the picture {shown(value)} {error}") from None


def named_files(turns: Sequence[Message], columns: Mapping[str, Any], *, root: Path | None, folder: Path) -> list[Path]:
    """The files of a row's pictures that exist, whatever they hold. root, folder: as for `ImageReader`."""
    parts = [part for message in turns if not isinstance(message.content, str) for part in message.content]
    values: list[object] = [part.image for part in parts if isinstance(part, ImagePart)]
    for name in COLUMNS:
        value = columns.get(name)
        values += value if isinstance(value, list) else [value]
    values = [value.get("path") if isinstance(value, Mapping) else value for value in values]
    paths = [
        (folder if root is None else root) / value
        for value in values
        if isinstance(value, str) and value[:5] != "data:"
    ]
    return [path for path in paths if path.is_file()]


def _column(fields: Mapping[str, object]) -> tuple[str, list[object]]:
    """The name of a row's column of pictures and what it holds; "images" and [] if it has none."""
    given = {name: fields[name] for name in COLUMNS if not is_absent(fields.get(name))}
    if len(given) > 1:
        raise RowError("images and image: a row has one of these columns; remove the other")
    for name, value in given.items():
        return name, list(value) if isinstance(value, list) else [value]
    return COLUMNS[0], []


def _places(message: Message, name: str, *, listed: bool) -> list[ContentPart]:
    """The parts of a message. <image> in a text is a place if the row has a column of pictures."""
    parts: list[ContentPart] = []
    content = (TextPart(message.content),) if isinstance(message.content, str) else message.content
    for part in content:
        pieces = part.text.split(PLACE) if listed and isinstance(part, TextPart) else []
        if len(pieces) < 2:
            parts.append(part)
            continue
        for number, piece in enumerate(pieces):
            parts += [ImagePart()] * (number > 0) + ([TextPart(piece)] if piece else [])
    if message.role not in ("user", "tool") and any(isinstance(part, ImagePart) for part in parts):
        raise RowError(f"{name}: a picture in a turn of {message.role}; only user and tool turns show pictures")
    return parts


def encoded_bytes(value: object, root: Path | None, folder: Path) -> bytes:
    """The bytes of a picture that is given as a path or data URL. Raises `PictureError`.

    root, folder: as for `ImageReader` and its `take`.
    """
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "url", "path") if not is_absent(value.get(key))), None)
    if not isinstance(value, str) or not value:
        raise PictureError("must be a path, a data URL, or an object with path or bytes")
    if value.startswith("data:"):
        return _of_data_url(value)
    if _SCHEME.match(value):
        raise PictureError("is at an address, and nothing is downloaded; give the path of a file")
    if "\0" in value:
        raise PictureError("has a zero character, which no name of a file has")
    within = (folder if root is None else root).resolve()
    try:
        path = (within / value).resolve()
        if not path.is_relative_to(within):
            raise PictureError(f"lies outside {within}, the folder of all pictures (images.root, or --images-root)")
        if not path.is_file():
            raise PictureError(f"is no file in {within}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise PictureError(f"has {size:,} bytes; at most {MAX_BYTES:,} are read")
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror or error}") from None


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise PictureError("is a data URL without a comma before its data")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)  # some programs break its lines
    except (binascii.Error, ValueError):
        raise PictureError("is a data URL whose base64 is damaged") from None
