"""Token ids of messages with pictures: the chat template writes one <|image|> a picture, which its tokens replace.

The messages are those that `ImageReader.take` returns. The tokens of a picture are never trained on. Text that looks
like a special token, such as a typed <|image|>, is encoded as text (posttrain.data.special), so it is no picture's
place.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from msgspec.structs import replace

from posttrain.data.chat import as_dicts, render_prompt
from posttrain.data.images.store import ImageStore
from posttrain.data.images.tiles import NO_PICTURE, TileRule
from posttrain.data.samples import render_samples
from posttrain.data.shown import Tools
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import tools_of
from posttrain.records import ImagePart, Media, Message, Prompt, Row


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the tokens of pictures follow from: the store of the pictures, and how the model cuts them."""

    store: ImageStore
    rule: TileRule


@dataclass(frozen=True, slots=True)
class PictureSample:
    """A conversation, or the beginning of one, in tokens.

    ids: token ids, with the tokens of pictures. mask: 1 for a token that is trained on. pictures: keys of the pictures
    in order. owners: for each token the index in `pictures` of the picture that it stands for, or `NO_PICTURE`.
    """

    ids: list[int]
    mask: list[int]
    pictures: tuple[str, ...]
    owners: list[int]

    def runs(self) -> list[tuple[list[int], bool, int]]:
        """The tokens, cut where training on them or a picture begins or ends: (ids, whether trained on, owner)."""
        groups = groupby(zip(self.ids, self.mask, self.owners, strict=True), key=lambda item: item[1:])
        return [([item[0] for item in group], bool(bit), owner) for (bit, owner), group in groups]


def pictures_of(messages: Iterable[Message]) -> tuple[str, ...]:
    """The keys of the pictures of a conversation, in order."""
    return tuple(
        part.image
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart) and part.image is not None
    )


def prompt_of(messages: Sequence[Message], token_ids: Iterable[int], store: ImageStore | None = None) -> Prompt:
    """The prompt of messages that were rendered as `token_ids`. store: of their pictures; None for text."""
    media = () if store is None else tuple(Media(store.reference(key)) for key in pictures_of(messages))
    return Prompt(tuple(messages), tuple(token_ids), media)


def prompt_with_pictures(
    tokenizer: Tokenizer, messages: Sequence[Message], store: ImageStore, *, rule: TileRule, tools: Tools = None
) -> PictureSample:
    """A prompt up to the header of the next assistant turn; its mask is 0. Raises what `render_prompt` raises."""
    ids = render_prompt(tokenizer, for_template(messages), tools)
    return _sample(ids, [0] * len(ids), pictures_of(messages), store=store, rule=rule)


def samples_with_pictures(
    tokenizer: Tokenizer, messages: Sequence[Message], store: ImageStore, *, rule: TileRule, tools: Tools = None
) -> list[PictureSample]:
    """The samples that a conversation becomes, as `render_samples` makes them. Raises what it raises.

    A sample that ends before the last turn holds the pictures up to there.
    """
    keys = pictures_of(messages)
    samples = render_samples(tokenizer, for_template(messages), tools)
    longest = max(len(ids) for ids, _ in samples)
    return [
        _sample(ids, mask, keys if len(ids) == longest else keys[: ids.count(rule.image)], store=store, rule=rule)
        for ids, mask in samples
    ]


def expanded(ids: list[int], keys: Sequence[str], pictures: Pictures) -> list[int]:
    """Token ids of a prompt with the tokens of its pictures. Raises `DataError` if it shows another number of them."""
    return _sample(ids, [0] * len(ids), tuple(keys), store=pictures.store, rule=pictures.rule).ids


def _sample(
    ids: list[int], mask: list[int], keys: tuple[str, ...], *, store: ImageStore, rule: TileRule
) -> PictureSample:
    sizes = [(store[key].width, store[key].height) for key in keys]
    tokens, bits, owners = map(list, zip(*rule.expand(ids, mask, sizes), strict=True))
    return PictureSample(tokens, bits, keys, owners)


def row_samples(tokenizer: Tokenizer, row: Row, pictures: Pictures | None) -> list[PictureSample]:
    """The samples of a row with pictures or without. pictures: None for a stage that takes none.

    Raises what `render_samples` raises, and `RowError` for tools that are no schemas.
    """
    tools = tools_of(row.fields)
    if pictures is not None and pictures_of(row.messages):
        return samples_with_pictures(tokenizer, row.messages, pictures.store, rule=pictures.rule, tools=tools)
    return [
        PictureSample(ids, mask, (), [NO_PICTURE] * len(ids))
        for ids, mask in render_samples(tokenizer, row.messages, tools)
    ]


def for_template(messages: Sequence[Message]) -> list[Message | Mapping[str, Any]]:
    """Messages as `render_prompt` takes them: a turn with pictures as a mapping with parts, others as they are."""
    return [message if isinstance(message.content, str) else _with_parts(message) for message in messages]


def _with_parts(message: Message) -> dict[str, Any]:
    parts = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
        if not isinstance(part, str)
    ]
    return {**as_dicts([replace(message, content="")])[0], "content": parts}
