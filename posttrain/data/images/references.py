"""References to pictures, FILE#KEY: with them engines and rewards read a picture when they need it."""

from typing import Any

from posttrain.data.images.store import ImageStore

_stores: dict[str, ImageStore] = {}  # those that this process has opened, by their file


def load_image(reference: str) -> Any:
    """The picture that a reference names, as a `PIL.Image.Image` in RGB. Raises KeyError if there is none.

    Example, in a reward: `picture = posttrain.load_image(rollout.prompt.pictures[0])`.
    """
    path, _, key = reference.rpartition("#")
    store = _stores.get(path)
    if store is None or key not in store:  # more may have been added since
        store = _stores[path] = ImageStore(path)
    return store.decoded(key)
