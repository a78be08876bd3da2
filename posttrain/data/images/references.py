"""References to pictures, FILE#KEY: with them engines and rewards read a picture when they need it."""

import base64
from typing import Any

from posttrain.data.images.files import format_of
from posttrain.data.images.store import ImageStore

_stores: dict[str, ImageStore] = {}  # those that this process has opened, by their file


def load_image(reference: str) -> Any:
    """The picture that a reference names, as a `PIL.Image.Image` in RGB. Raises KeyError if there is none.

    Example, in a reward: `picture = posttrain.load_image(rollout.prompt.pictures[0])`.
    """
    store, key = _found(reference)
    return store.decoded(key)


def data_url(reference: str) -> str:
    """The picture that a reference names as a data URL, with its encoded bytes. Raises KeyError if there is none."""
    store, key = _found(reference)
    data = store.encoded(key)
    return f"data:image/{format_of(data)};base64,{base64.b64encode(data).decode()}"


def _found(reference: str) -> tuple[ImageStore, str]:
    path, _, key = reference.rpartition("#")
    store = _stores.get(path)
    if store is None or key not in store:  # more may have been added since
        store = _stores[path] = ImageStore(path)
    return store, key
