"""A file of encoded pictures. Each is kept once, whatever number of rows shows it, and is found by its content hash.

The pictures lie one after another in NAME, and NAME.jsonl lists them: key, place, size. A row holds only the key, and
the file is mapped into memory, so pictures take none of a process's own memory until they are decoded. One process
writes; any process on the host reads. Left out: removing pictures.
"""

import io
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import xxhash
from msgspec import Struct

from posttrain.data.images.decode import Encoded, checked


class Picture(Struct, frozen=True, gc=False):
    """One picture of a store.

    key: hash of the bytes that it was added as, 32 hexadecimal digits. offset, length: its bytes in the file. width,
    height: in pixels, of the upright picture.
    """

    key: str
    offset: int
    length: int
    width: int
    height: int


class ImageStore:
    """The pictures in the file `path`. It is made when the first picture is added; an existing one is continued."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._list = self.path.with_name(f"{self.path.name}.jsonl")
        self._listed_bytes = 0
        self._pictures = {picture.key: picture for picture in self._listed()}
        self._end = max((picture.offset + picture.length for picture in self._pictures.values()), default=0)
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._map: mmap.mmap | None = None

    def _listed(self) -> Iterator[Picture]:
        if not self._list.exists():
            return
        decoder = msgspec.json.Decoder(Picture)
        with self._list.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else it was being written when its process ended
                    self._listed_bytes += len(line)
                    yield decoder.decode(line)

    def __len__(self) -> int:
        return len(self._pictures)

    def __contains__(self, key: str) -> bool:
        return key in self._pictures

    def __getitem__(self, key: str) -> Picture:
        return self._pictures[key]

    def add(self, data: bytes) -> Picture:
        """Check a picture and keep it. One that is there already is neither decoded nor written again.

        Raises `PictureError` for a picture that cannot be used.
        """
        key = xxhash.xxh3_128_hexdigest(data)
        if key not in self._pictures:
            self._pictures[key] = self._write(key, checked(data))
        return self._pictures[key]

    def _write(self, key: str, encoded: Encoded) -> Picture:
        if self._files is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._files = self.path.open("ab", buffering=0), self._list.open("ab", buffering=0)
            self._files[0].truncate(self._end)  # what lies behind belongs to no whole line of the list
            self._files[1].truncate(self._listed_bytes)
        picture = Picture(key, self._end, len(encoded.data), encoded.width, encoded.height)
        self._files[0].write(encoded.data)
        self._files[1].write(msgspec.json.encode(picture) + b"\n")
        self._end += picture.length
        return picture

    def reference(self, key: str) -> str:
        """FILE#KEY, with which any process on the host finds a picture of this store."""
        return f"{self.path.absolute()}#{key}"

    def encoded(self, key: str) -> bytes:
        """The encoded bytes of a picture."""
        picture = self._pictures[key]
        if self._map is None or len(self._map) < picture.offset + picture.length:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map[picture.offset : picture.offset + picture.length]

    def decoded(self, key: str) -> Any:
        """The picture as a `PIL.Image.Image` in RGB."""
        from PIL import Image

        image = Image.open(io.BytesIO(self.encoded(key)))
        image.load()
        return image
