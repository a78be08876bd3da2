"""`posttrain data dedup` and `decontaminate`: remove rows that repeat earlier rows or texts of an evaluation set."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.cli.data import (
    DataPath,
    KindOption,
    Settings,
    check_output,
    data_app,
    data_config,
    data_kind,
    good_items,
    left_out,
)
from posttrain.errors import ConfigError

INTERVAL_S = 10.0

Out = Annotated[Path, typer.Option("--out", help="File for the rows that are kept, as JSON lines.", show_default=False)]


@data_app.command()
def dedup(
    path: DataPath,
    out: Out,
    settings: Settings = None,
    *,
    near: Annotated[
        float | None,
        typer.Option(help="Also remove near-duplicates: rows with at least this Jaccard index of 5-word runs, as 0.9."),
    ] = None,
    removed: Annotated[Path | None, typer.Option(help="File that lists removed rows and what they repeat.")] = None,
    kind: KindOption = None,
) -> None:
    """Remove rows that repeat an earlier row. The first of several is kept.

    Example: posttrain data dedup sft.jsonl --out unique.jsonl --near 0.9 --removed removed.jsonl
    """
    from posttrain.config.data import NEAR_FLOOR
    from posttrain.data.duplicates import DuplicateIndex

    if near is not None and not NEAR_FLOOR <= near < 1:
        raise ConfigError(
            "--near", [f"got {near}: must be at least {NEAR_FLOOR} and below 1; without it only equal rows go"]
        )
    with DuplicateIndex(near) as index:
        read, gone, ending = _prune(
            path, settings, kind, out=out, listed=removed, find=lambda item: [d] if (d := index.find(item)) else []
        )
    typer.echo(f"{read} rows read, {gone} duplicates removed, {read - gone} kept: {out}{ending}")
    if text := index.unsettled_text():
        typer.echo(text)


@data_app.command()
def decontaminate(
    path: DataPath,
    against: Annotated[list[str], typer.Option(help="An evaluation set: file, folder or dataset. May be repeated.")],
    out: Out,
    *,
    hits: Annotated[Path, typer.Option(help="File that lists each hit: row, evaluation row, overlap.")],
    settings: Settings = None,
    column: Annotated[
        list[str] | None, typer.Option(help="A column of the evaluation sets, such as prompt=question.")
    ] = None,
    ngram: Annotated[int | None, typer.Option(min=4, help="Words in a run that counts as shared; default 13.")] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Share of an evaluation text that makes a hit; default 0.5.")
    ] = None,
    kind: KindOption = None,
) -> None:
    """Remove rows that share long runs of words with an evaluation set, and list them.

    Example: posttrain data decontaminate sft.jsonl --against heldout.jsonl --out clean.jsonl --hits hits.jsonl
    """
    from posttrain.config.base import validate_config
    from posttrain.config.data import EvaluationSetsConfig
    from posttrain.data.contamination import EvaluationTexts

    given: dict[str, Any] = {"path": against, "columns": _columns(column or [])}
    given |= {name: value for name, value in (("ngram", ngram), ("overlap", overlap)) if value is not None}
    sets = validate_config(EvaluationSetsConfig, given, "--against")
    texts = EvaluationTexts(sets)
    read, gone, ending = _prune(path, settings, kind, out=out, listed=hits, find=texts.hits)
    typer.echo(
        f"{read} rows read, {gone} share text with {texts.num_rows} evaluation rows, {read - gone} kept: {out}; "
        f"hits: {hits}{ending}"
    )


def _columns(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if wrong := [text for text, (ours, _, theirs) in zip(given, pairs, strict=True) if not (ours and theirs)]:
        raise ConfigError("--column", [f"got {wrong[0]!r}: must be NAME=COLUMN, such as prompt=question"])
    return {ours: theirs for ours, _, theirs in pairs}


def _prune(
    path: str, settings: list[str] | None, kind: str | None, *, out: Path, listed: Path | None,
    find: Callable[[Any], Iterable[Any]],
) -> tuple[int, int, str]:  # fmt: skip
    """Write the items for which `find` returns nothing to `out`, and the findings for all others to `listed`.

    Returns the number of items read, the number removed, and a text about bad rows for the end of the summary line.
    Both files are written whole or not at all.
    """
    from posttrain.data.kinds import item_to_json
    from posttrain.files import replacing, write_jsonl

    config = data_config(path, settings)
    check_output(config, out, listed)
    found_kind = data_kind(config, kind)
    left: list[str] = []
    read = gone = 0
    with ExitStack() as files:
        lines = None
        if listed is not None:
            lines = files.enter_context(files.enter_context(replacing(listed)).open("w", encoding="utf-8"))

        def staying() -> Iterator[dict[str, Any]]:
            nonlocal read, gone
            told = time.monotonic()
            for item in good_items(config, found_kind, left):
                read += 1
                found = list(find(item))
                gone += bool(found)
                if lines is not None:
                    lines.writelines(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in found)
                if not found:
                    yield item_to_json(item)
                if time.monotonic() - told > INTERVAL_S:
                    told = time.monotonic()
                    print(f"{read} rows read, {gone} left out", file=sys.stderr, flush=True)

        write_jsonl(out, staying())
    return read, gone, left_out(left)
