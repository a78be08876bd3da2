"""Compares the basis with which a stage ran and the basis with which it would run now, and names the differences.

A basis is everything that a stage's result depends on (hashing.py). Each difference is one `Change` with its key
and both values. Most of them mean another result. A field that is marked MAY_GROW (`steps`, `epochs`,
`held_out.patience`) only makes the training longer if its value is larger, or null. A field that is marked RESULT_STAYS
is not part of a basis. Left out: the decision that follows from the changes (decide.py).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.config.base import MAY_GROW, Config
from posttrain.pipeline.hashing import Basis, marked

SHOWN_CHARS = 60
CONTEXT_CHARS = 12
SHOWN_PARTS = 3


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. text: for the user, such as `optimizer.learning_rate: 0.001 → 0.002`.

    goes_on: True if the training continues from its last checkpoint with the new value.
    """

    text: str
    goes_on: bool = False


def find_changes(old: Basis | None, new: Basis, config: Config, *, upstream: Mapping[str, str]) -> list[Change]:
    """The differences, those of the config first. old: None if it is unknown.

    config: the new config of the stage. upstream: by name, what happens to the stages that it needs, such as
    `runs anew`, as far as it is known.
    """
    if old is None:
        return [Change("its earlier config is unknown: another version of posttrain made the result")]
    found = [Change(f"kind: {old['kind']} → {new['kind']}")] if old["kind"] != new["kind"] else []
    growing = marked(config, MAY_GROW)
    keys = []
    for key, before, after in _differences(old["config"], new["config"], ""):
        keys.append(key)
        before_text, after_text = _texts(before, after)
        found.append(Change(f"{key}: {before_text} → {after_text}", key in growing and _is_larger(after, before)))
    if old["seed"] != new["seed"]:
        found.append(Change(f"seed: {old['seed']} → {new['seed']}"))
    found += [
        Change(f"{key}: {_named(new['config'], key)} has other content than before")
        for key in _unequal(old["inputs"], new["inputs"])
        if not any(changed == key or changed.startswith(f"{key}.") for changed in keys)
    ]
    found += [
        Change(f"stage {name} {upstream.get(name, 'has another result than before')}")
        for name in _unequal(old["stages"], new["stages"])
        if name in old["stages"] and name in new["stages"]  # otherwise the reference in the config has changed
    ]
    parts = _unequal(old["code"], new["code"])
    if parts:
        more = f" and {len(parts) - SHOWN_PARTS} more parts" if len(parts) > SHOWN_PARTS else ""
        found.append(Change(f"the code of {', '.join(parts[:SHOWN_PARTS])}{more} has changed"))
    return found


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(key path, old value, new value) of each value that differs. A section that is new or gone is one value."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def _is_larger(new: Any, old: Any) -> bool:
    return isinstance(old, int | float) and (new is None or (isinstance(new, int | float) and new > old))


def _unequal(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    return [name for name in dict.fromkeys([*new, *old]) if old.get(name) != new.get(name)]


def _named(config: Any, key: str) -> str:
    """The path or name of an input, such as `rows.jsonl`, by its key path in the config."""
    for part in key.split("."):
        config = config[int(part)] if isinstance(config, list) else (config or {}).get(part)
    value = config.get("path", config.get("name")) if isinstance(config, Mapping) else config
    return ", ".join(value) if isinstance(value, list) else str(value)


def _texts(*values: Any) -> list[str]:
    """The values as short texts. Long texts with the same beginning are shown from just before the first difference."""
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    alike = next((at for at, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1), 0)
    if max(map(len, texts)) > SHOWN_CHARS and alike > SHOWN_CHARS // 2:
        texts = [f"…{text[alike - CONTEXT_CHARS :]}" for text in texts]
    return [text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…" for text in texts]
