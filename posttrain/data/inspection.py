"""What a dataset holds, counted row by row in flat memory: formats, capabilities, lengths, duplicates, problems.

Left out: rows that are nearly the same; only rows with equal messages count as duplicates.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

from posttrain.data.bad_rows import MAX_SHOWN_PROBLEMS, BadRow, SeenIds
from posttrain.data.files import read_records
from posttrain.data.formats import detect, renamed
from posttrain.data.messages import RowError, messages_to_json
from posttrain.data.pairs import Pair, scan_pairs
from posttrain.data.rows import Data, as_config, iter_rows
from posttrain.data.turns import Kind
from posttrain.errors import DataError

BINS = 10


def kind_of(data: Data) -> str:
    """supervised, prompt or pairs, by the first row. Raises `DataError` where there is none."""
    config = as_config(data)
    paths = [config.path] if isinstance(config.path, str) else config.path
    first = next(read_records(paths), None)
    if first is None:
        raise DataError(f"{', '.join(paths)}: holds no rows; at least one is needed")
    if first.value.get("chosen") is not None and first.value.get("rejected") is not None:
        return "pairs"
    good = next(iter(iter_rows(data, kind="supervised", limit=1)), None)
    return "prompt" if isinstance(good, BadRow) and _is_prompt(data) else "supervised"


def _is_prompt(data: Data) -> bool:
    return not isinstance(next(iter(iter_rows(data, kind="prompt", limit=1))), BadRow)


def inspect(data: Data, kind: str, length: Callable[[Any], int], *, max_length: int | None = None) -> dict[str, Any]:
    """Counts of a dataset as a JSON object. length: of a row or pair, in `unit`s of the caller."""
    config = as_config(data)
    items = scan_pairs(data) if kind == "pairs" else iter_rows(data, kind=_row_kind(kind))
    formats = _formats(data, kind)
    capabilities: Counter[str] = Counter()
    lengths, seen = array("Q"), SeenIds(named=0)
    problems: list[str] = []
    bad = duplicates = 0
    for item in items:
        if isinstance(item, BadRow):
            bad += 1
            problems += [str(item)] if len(problems) < MAX_SHOWN_PROBLEMS else []
            continue
        try:
            lengths.append(length(item))
        except (DataError, RowError) as error:
            bad += 1
            problems += [f"row {item.id!r}: {error}"] if len(problems) < MAX_SHOWN_PROBLEMS else []
            continue
        capabilities[item.capability] += 1
        duplicates += seen.add(_fingerprint(item), "") is not None
    ordered = sorted(lengths)
    over = None if max_length is None or not ordered else sum(n > max_length for n in ordered) / len(ordered)
    return {
        "path": config.path, "kind": kind, "rows": len(ordered), "bad_rows": bad, "duplicates": duplicates,
        "formats": dict(formats), "capabilities": dict(capabilities.most_common()), "lengths": _figures(ordered),
        "histogram": _histogram(ordered), "over_max_length": over, "problems": problems,
    }  # fmt: skip


def _row_kind(kind: str) -> Kind:
    return "prompt" if kind == "prompt" else "supervised"


def _formats(data: Data, kind: str) -> Counter[str]:
    config = as_config(data)
    paths = [config.path] if isinstance(config.path, str) else config.path
    if kind == "pairs":
        return Counter()
    found: Counter[str] = Counter()
    for record in read_records(paths):
        try:
            found[config.format or detect(renamed(record.value, config), _row_kind(kind))] += 1
        except RowError:
            found["unknown"] += 1
    return found


def _fingerprint(item: Any) -> str:
    turns = item.turns if isinstance(item, Pair) else item.messages
    return hashlib.blake2b(json.dumps(messages_to_json(turns), sort_keys=True).encode(), digest_size=16).hexdigest()


def _figures(ordered: list[int]) -> dict[str, int]:
    if not ordered:
        return {}
    last = len(ordered) - 1
    shares = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[round(share * last)] for name, share in shares.items()} | {"sum": sum(ordered)}


def _histogram(ordered: list[int]) -> list[list[int]]:
    """[from, to, rows] of bins of equal width."""
    if not ordered:
        return []
    width = ordered[-1] // BINS + 1
    counts = Counter(value // width for value in ordered)
    return [[at * width, (at + 1) * width - 1, counts[at]] for at in range(BINS) if at * width <= ordered[-1]]
