"""Which cached prefixes a request may read, in an engine whose caches last over updates of its weights (`kv: keep`).

vLLM shares a prefix among requests with the same salt. The salt is the policy version at which a rollout was begun, so
its next turn reads what the engine has of it, whatever weights came while a tool worked. A rollout that is begun later
has another salt, and reads nothing that older weights have computed.
"""

from typing import Literal

from posttrain.sampling.requests import SampleRequest

KeyValues = Literal["recompute", "keep"]


class Salts:
    """Those of one engine. None are used before its first update with `keep`."""

    def __init__(self) -> None:
        self._is_on = False
        self._version = 0

    def of(self, request: SampleRequest) -> str | None:
        """The salt of a request; None for none."""
        if not self._is_on:
            return None
        return str(self._version if request.since is None else request.since)

    def outlast(self, kv: KeyValues, version: int) -> bool:
        """Whether cached prefixes may stay when the weights of `version` come.

        Only if versions grow: another stage, or one that was continued, may give a version to other weights.
        """
        return self._is_on and kv == "keep" and version > self._version

    def updated(self, kv: KeyValues, version: int) -> None:
        """Note that the weights of `version` have come."""
        self._is_on, self._version = kv == "keep", version
