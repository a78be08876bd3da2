"""Objects at a URI, by obstore. Only what mirror.py needs; each error says what could not be done where.

Source: object_store's put modes, https://docs.rs/object_store, `PutMode::Create`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

RETRY_S = 30.0  # that one call goes on; who calls tries again for longer (pipeline/storing.py)


class StorageError(Exception):
    """The storage does not do what it is asked: it is not reached, or refuses."""


class Store:
    """The objects below a URI. A path or file:// is a folder, which is made. Raises UserError for any other text."""

    def __init__(self, uri: str):
        import obstore.store

        self.uri = uri
        place = uri if "://" in uri else Path(uri).expanduser().absolute().as_uri()
        try:
            if place.startswith("file://"):
                self._store: Any = obstore.store.LocalStore.from_url(place, mkdir=True)
            else:
                retry: Any = {"retry_timeout": timedelta(seconds=RETRY_S)}
                self._store = obstore.store.from_url(place, retry_config=retry)
        except Exception as error:  # obstore raises its own kinds and ValueError
            raise UserError(f"storage: got {uri!r}: {_first_line(error)}") from None

    def create(self, name: str, data: bytes) -> bool:
        """Make an object that must not exist. Returns False if it does."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._told(f"{name} cannot be written"):
            try:
                obstore.put(self._store, name, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def read(self, name: str) -> bytes:
        """The content of an object."""
        import obstore

        with self._told(f"{name} cannot be read"):
            return bytes(obstore.get(self._store, name).bytes())

    def names(self, folder: str) -> list[str]:
        """The names of all objects of a folder, sorted."""
        import obstore

        with self._told(f"{folder} cannot be listed"):
            return sorted(item["path"] for item in obstore.list(self._store, prefix=folder).collect())

    def send(self, name: str, file: Path) -> None:
        """Copy a file to an object."""
        import obstore

        with self._told(f"{name} cannot be written"):
            obstore.put(self._store, name, file)

    def fetch(self, name: str, file: Path) -> None:
        """Copy an object to a file."""
        import obstore

        with self._told(f"{name} cannot be read"), file.open("wb") as target:
            for part in obstore.get(self._store, name).stream(min_chunk_size=1 << 22):
                target.write(part)

    def delete(self, names: list[str]) -> None:
        """Delete objects. One that is not there is no error."""
        import obstore
        from obstore.exceptions import NotFoundError

        with self._told("objects cannot be deleted"):
            for name in names:
                try:
                    obstore.delete(self._store, name)
                except (NotFoundError, FileNotFoundError):
                    continue

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"storage {self.uri}: {what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
