"""`posttrain data`: look at a dataset before a model is trained on it, and convert it to this package's own format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.errors import ConfigError

data_app = typer.Typer(no_args_is_help=True, help="Look at rows, and convert them.")

DataPath = Annotated[str, typer.Argument(metavar="PATH", help="File, folder or dataset.", show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of a data section, such as format=alpaca.")
]
KindOption = Annotated[
    str | None, typer.Option("--kind", help="supervised, prompt, pairs or labelled; default: judged by row 1.")
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option("--template", metavar="KEY=VALUE", help="A key of chat_template, such as builtin=qwen3."),
]
ImagesRoot = Annotated[Path | None, typer.Option(help="Folder of all pictures. Default: that of the file of the row.")]
MaxImages = Annotated[int, typer.Option(min=1, help="Most pictures of a row.")]
KINDS = ("supervised", "prompt", "pairs", "labelled")
BAR = 40


def data_config(path: str, settings: list[str] | None) -> Any:
    """The `data` section for a path and KEY=VALUE settings of the command line. Raises ConfigError."""
    from posttrain.config.base import apply_overrides, validate_config
    from posttrain.config.data import DataConfig

    return validate_config(DataConfig, apply_overrides({"path": path}, settings or []), "data")


def _template(settings: list[str] | None) -> Any:
    from posttrain.config.base import apply_overrides, validate_config
    from posttrain.config.templates import ChatTemplateConfig

    return validate_config(ChatTemplateConfig, apply_overrides({}, settings), "--template") if settings else None


def data_kind(config: Any, given: str | None) -> Any:
    """The kind that `--kind` gives, or else the kind of the first row. Raises ConfigError for an unknown kind."""
    from posttrain.data.kinds import kind_of

    if given is not None and given not in KINDS:
        raise ConfigError("--kind", [f"got {given!r}; it must be one of {', '.join(KINDS)}"])
    return given or kind_of(config)


def good_items(config: Any, kind: Any, left: list[str]) -> Iterator[Any]:
    """The good items of a dataset one by one.

    A bad row raises DataError, or, with `on_bad_row: set_aside`, its problem is appended to `left`.
    """
    from posttrain.data.bad_rows import BadRow
    from posttrain.data.kinds import iter_items
    from posttrain.errors import DataError

    for item in iter_items(config, kind):
        if not isinstance(item, BadRow):
            yield item
        elif config.on_bad_row == "fail":
            raise DataError(str(item))
        else:
            left.append(str(item))


def left_out(left: list[str]) -> str:
    """How many rows were left out and the first of them, as the end of a line; "" if there are none."""
    return f"; {len(left)} left out, the first: {left[0]}" if left else ""


@data_app.command("inspect")
def inspect_data(
    path: DataPath,
    settings: Settings = None,
    kind: KindOption = None,
    *,
    model: Annotated[Path | None, typer.Option(help="Model folder: count tokens, not characters.")] = None,
    template: TemplateOption = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Print the share of longer rows.")] = None,
    images_root: ImagesRoot = None,
    max_images: MaxImages = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count rows, formats, capabilities, lengths, duplicates and problems. Exits with 2 if a row is bad.

    With --model of a model that takes pictures, these are checked, and counted with their tokens.

    Example: posttrain data inspect data/sft.jsonl --model models/scout --max-length 4096
    """
    import tempfile

    from posttrain.data.images.section import pictures_for
    from posttrain.data.images.store import ImageStore
    from posttrain.data.images.take import ImageReader
    from posttrain.data.images.tiles import takes_pictures
    from posttrain.data.inspection import inspect
    from posttrain.data.lengths import character_length, token_length

    config = data_config(path, settings)
    length, images = character_length, None
    with tempfile.TemporaryDirectory() as folder:
        if model is not None:
            from posttrain.model.tokenizer import load_tokenizer

            tokenizer, pictures = load_tokenizer(str(model), _template(template)), None
            if takes_pictures(model):
                images = ImageReader(ImageStore(Path(folder) / "images"), root=images_root, max_images=max_images)
                pictures = pictures_for(images.store, model, tokenizer)
            length = token_length(tokenizer, pictures)
        found = inspect(config, data_kind(config, kind), length, max_length=max_length, images=images)
    typer.echo(json.dumps(found, indent=2) if as_json else _text(found, "tokens" if model else "characters"))
    if found["bad_rows"]:
        raise typer.Exit(2)


def _text(found: dict[str, Any], unit: str) -> str:
    lines = [f"{found['rows']} {found['kind']} rows, {found['bad_rows']} bad, {found['duplicates']} duplicates"]
    counts = {name: found[name] for name in ("formats", "labels", "capabilities")} | {unit: found["lengths"]}
    counts["rows by pictures"] = found["pictures"]
    lines += [
        f"{name}: " + ", ".join(f"{key} {n}" for key, n in given.items()) for name, given in counts.items() if given
    ]
    if found["lengths"]:
        most = max(count for *_, count in found["histogram"])
        for start, end, count in found["histogram"]:
            lines.append(f"  {start:>7}-{end:<7} {'#' * round(BAR * count / most)} {count}")
    if found["over_max_length"] is not None:
        lines.append(f"longer than max_length: {found['over_max_length']:.1%}")
    return "\n".join([*lines, *found["problems"]])


def check_output(config: Any, *outputs: Path | None) -> None:
    """Raise `DataError` if an output is a file of the data that are read: it would be replaced while it is read."""
    from posttrain.errors import DataError

    inputs = [Path(path).resolve() for path in ([config.path] if isinstance(config.path, str) else config.path)]
    for out in outputs:
        place = out.resolve() if out is not None else None
        if place is not None and (place in inputs or (place.exists() and set(inputs) & set(place.parents))):
            raise DataError(f"{out}: is one of the files that are read; name another file")


@data_app.command()
def convert(
    path: DataPath,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="File to write.", show_default=False)],
    settings: Settings = None,
    *,
    kind: KindOption = None,
) -> None:
    """Write a dataset as JSON lines of messages. A bad row is an error, unless on_bad_row=set_aside is given.

    Example: posttrain data convert sharegpt.json sft.jsonl on_bad_row=set_aside
    """
    from posttrain.data.kinds import item_to_json
    from posttrain.data.pairs import store_pairs, write_pairs
    from posttrain.files import write_jsonl

    config = data_config(path, settings)
    check_output(config, out)
    found = data_kind(config, kind)
    if found == "pairs":
        typer.echo(f"{write_pairs(out, store_pairs(config))} pairs: {out}")
        return
    left: list[str] = []
    written = write_jsonl(out, map(item_to_json, good_items(config, found, left)))
    typer.echo(f"{written} rows: {out}{left_out(left)}")


@data_app.command()
def preview(
    path: DataPath,
    model: Annotated[Path, typer.Option(help="Model folder, whose tokenizer and chat template are used.")],
    settings: Settings = None,
    *,
    rows: Annotated[int, typer.Option(min=1, help="How many rows, from the first on.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids too.")] = False,
    template: TemplateOption = None,
    images_root: ImagesRoot = None,
    max_images: MaxImages = 8,
) -> None:
    """Show rows as the model sees them. Text that is trained on is green, or between [[ and ]] without colours.

    A picture is shown by its size, its tiles and the number of its tokens, in its place.

    Example: posttrain data preview data/sft.jsonl --model models/scout --ids
    """
    import tempfile

    from rich.console import Console
    from rich.text import Text

    from posttrain.data.images.preview import row_runs
    from posttrain.data.images.store import ImageStore
    from posttrain.data.images.take import ImageReader
    from posttrain.data.rows import load_rows
    from posttrain.model.tokenizer import load_tokenizer

    tokenizer, console = load_tokenizer(str(model), _template(template)), Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        store = ImageStore(Path(folder) / "images")
        reader = ImageReader(store, root=images_root, max_images=max_images)
        for row in load_rows(data_config(path, settings), kind="supervised", limit=rows, images=reader):
            samples = row_runs(tokenizer, row, store, model=model)
            for place, sample in enumerate(samples, 1):
                note = f", sample {place} of {len(samples)}" if len(samples) > 1 else ""
                console.print(Text(f"--- {row.id}{note}", style="bold"))
                for part, trained, picture in sample:
                    text = picture or str(tokenizer.decode(part))
                    shown = text if console.is_terminal or not trained else f"[[{text}]]"
                    console.print(Text(shown, style="cyan" if picture else "green" if trained else "dim"), end="")
                    if ids:
                        console.print(Text(f" {part} "), end="")
                console.print()
