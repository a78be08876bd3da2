"""Pictures of rollouts as small images within the page. Each is there once, by the hash of its content.

All together take at most `MAX_CHARS` of the page. A picture that has no room, or that its file does not hold, is named
by its number alone.
"""

import base64
import io
from pathlib import Path

from posttrain.data.images.section import STORE
from posttrain.data.images.store import ImageStore

SIDE = 384  # pixels of the longer side, at most
MAX_CHARS = 8 << 20


class Thumbnails:
    """The small images of the pictures in a stage's folder. urls: {key: data URL} of those that were asked for."""

    def __init__(self, stage: Path):
        self._store = ImageStore(stage / STORE)
        self._room = MAX_CHARS
        self.urls: dict[str, str] = {}

    def add(self, key: str) -> bool:
        """Whether the page has an image of this picture."""
        if key in self.urls:
            return True
        if key not in self._store:
            return False
        try:
            url = self._url(key)
        except (OSError, ValueError):  # the file broke off, or is damaged
            return False
        if len(url) > self._room:
            return False
        self._room -= len(url)
        self.urls[key] = url
        return True

    def _url(self, key: str) -> str:
        image, file = self._store.decoded(key), io.BytesIO()
        image.thumbnail((SIDE, SIDE))
        image.save(file, "WEBP", quality=80)
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
