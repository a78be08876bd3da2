"""What a row looks like in tokens, with a description in the place of each picture."""

from pathlib import Path

from posttrain.data.images.render import PictureSample, pictures_of, samples_with_pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.tiles import NO_PICTURE, TileRule, tile_rule
from posttrain.data.lengths import runs
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import tools_of
from posttrain.errors import DataError
from posttrain.records import Row

Runs = list[tuple[list[int], bool, str]]


def row_runs(tokenizer: Tokenizer, row: Row, store: ImageStore, *, model: Path) -> list[Runs]:
    """The tokens of each sample of a row, cut where training on them or a picture begins or ends.

    Each run is (ids, whether they are trained on, "" or what picture they stand for). model: the folder of the model,
    whose processor says how pictures are cut. Raises `DataError` that names the row, and what `tile_rule` raises.
    """
    if not pictures_of(row.messages):
        return [[(ids, trained, "") for ids, trained in sample] for sample in runs(tokenizer, row)]
    rule = tile_rule(model, tokenizer)
    try:
        samples = samples_with_pictures(tokenizer, row.messages, store, rule=rule, tools=tools_of(row.fields))
    except DataError as error:
        raise DataError(f"row {row.id!r}: {error}") from None
    return [_described(sample, store, rule) for sample in samples]


def _described(sample: PictureSample, store: ImageStore, rule: TileRule) -> Runs:
    found: Runs = []
    for ids, trained, owner in sample.runs():
        note = ""
        if owner != NO_PICTURE:
            picture = store[sample.pictures[owner]]
            tiles = rule.num_tiles(picture.width, picture.height)
            note = (
                f"[picture {owner + 1}: {picture.width} x {picture.height} pixels, {tiles} "
                f"tile{'s' * (tiles > 1)}, {len(ids)} tokens]"
            )
        found.append((ids, trained, note))
    return found
