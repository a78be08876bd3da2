"""Preference pairs: one prompt with a preferred reply (`chosen`) and a rejected one (`rejected`).

A pair is read from a row {"prompt", "chosen", "rejected"}, each field a text or a list of messages. `chosen` and
`rejected` may also be whole conversations that begin with the same turns; then `prompt` may be absent. Rows {"prompt",
"completion", "label"}, as in datasets for KTO, are joined: a good and a bad reply to the same prompt become a pair.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.context import StageContext
from posttrain.data.bad_rows import BadRow
from posttrain.data.files import Record
from posttrain.data.formats import (
    CONVERSATIONS,
    REPLY_FIELDS,
    label_of,
    refuse_columns,
    renamed,
    take_instruction,
    take_turns,
    with_context,
)
from posttrain.data.images.take import ImageReader
from posttrain.data.labelled import Labelled, joined
from posttrain.data.messages import RowError, messages_to_json, shown
from posttrain.data.rows import Data, check, collect, scan, take_capability, take_id
from posttrain.data.stored import Stored, StoreWriter
from posttrain.data.turns import check_turns, check_usable
from posttrain.files import write_jsonl
from posttrain.records import Message, ToolCall


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference. `prompt` ends with a user or tool turn; `chosen` and `rejected` are two different replies.

    fields: the row's other columns, such as `tools`. chosen_calls, rejected_calls: the calls of tools in each reply.
    """

    id: str
    capability: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    chosen_calls: tuple[ToolCall, ...] = ()
    rejected_calls: tuple[ToolCall, ...] = ()

    @property
    def replies(self) -> tuple[Message, Message]:
        """The chosen reply and the rejected one as turns."""
        return (
            Message("assistant", self.chosen, self.chosen_calls),
            Message("assistant", self.rejected, self.rejected_calls),
        )

    @property
    def turns(self) -> tuple[Message, ...]:
        """All turns: those of the prompt, then both replies."""
        return (*self.prompt, *self.replies)


def load_pairs(
    data: Data,
    *,
    limit: int | None = None,
    stage: str | None = None,
    context: StageContext | None = None,
    images: ImageReader | None = None,
) -> list[Pair]:
    """Read and validate preference pairs. Returns at least one pair.

    data: a `DataConfig`, a path, or several paths. limit: use only the first rows (the smaller of this and
    `data.limit`). stage: the kind of stage that reads, named in the error about rows that it cannot use yet (images).
    context: of the stage, which is told about rows that are set aside. images: as for `load_rows`, for the pictures of
    prompts. Raises `DataError` that names file, row number,
    the value got and the rule, and for labelled replies to one prompt that cannot be joined to pairs.
    """
    items: list[Pair | Labelled] = []
    collect(data, _parser(stage, images), items, limit=limit, identity=lambda pair: pair.id, context=context)
    pairs = [item for item in items if isinstance(item, Pair)]
    return [*pairs, *_of_labelled([item for item in items if isinstance(item, Labelled)])]


def store_pairs(
    data: Data,
    *,
    stage: str | None = None,
    context: StageContext | None = None,
    images: ImageReader | None = None,
) -> Stored[Pair]:
    """As `load_pairs`, for a stage: the pairs lie in a file on disk, so that memory does not grow with their number.

    Until labelled replies are joined, the place of each and a hash of each prompt are in memory.
    """
    folder = context and context.dir
    with StoreWriter[Pair](Pair, folder) as pairs, StoreWriter[Labelled](Labelled, folder) as labelled:
        sink = _Sink(pairs, labelled)
        collect(data, _parser(stage, images), sink, identity=lambda pair: pair.id, context=context)
        for pair in _of_labelled(labelled.close()):
            pairs.append(pair)
        return pairs.close()


class _Sink:
    """Takes pairs and labelled replies apart."""

    def __init__(self, pairs: StoreWriter[Pair], labelled: StoreWriter[Labelled]):
        self._pairs, self._labelled = pairs, labelled

    def __len__(self) -> int:
        return len(self._pairs) + len(self._labelled)

    def append(self, item: Pair | Labelled) -> None:
        """Add an item."""
        if isinstance(item, Pair):
            self._pairs.append(item)
        else:
            self._labelled.append(item)


def scan_pairs(data: Data, images: ImageReader | None = None) -> Iterator["Pair | Labelled | BadRow"]:
    """Pairs and labelled replies one by one, a bad row as a `BadRow`. Labelled replies are not joined to pairs.

    images: as for `load_pairs`.
    """
    return scan(data, _parser(None, images), None, identity=lambda item: item.id)


def _of_labelled(items: Sequence[Labelled]) -> Iterator[Pair]:
    for chosen, rejected in joined(items):
        calls = chosen.reply_calls, rejected.reply_calls
        yield Pair(chosen.id, chosen.capability, chosen.prompt, chosen.reply, rejected.reply, chosen.fields, *calls)


def check_pairs(
    data: Data, rows: int = 100, *, stage: str | None = None, images: ImageReader | None = None
) -> list[str]:
    """Problems in the first `rows` rows of a dataset of pairs, one line each. The rest is as in `load_pairs`."""
    return check(data, _parser(stage, images), rows, identity=lambda pair: pair.id)


def _parser(stage: str | None, images: ImageReader | None = None) -> Callable[[Record, DataConfig], Pair | Labelled]:
    def parse(record: Record, config: DataConfig) -> Pair | Labelled:
        pair = parse_pair(record, config)
        if images is not None:
            prompt, fields = images.take_from(pair.prompt, pair.fields, Path(record.file).parent)
            pair = replace(pair, prompt=prompt, fields=fields)
        if stage is not None:
            check_usable(pair.prompt, pair.fields, name="prompt", stage=stage, images=images is not None)
        return pair

    return parse


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> int:
    """Write pairs as JSON lines, atomically, with all their columns. Returns the number of pairs."""
    return write_jsonl(path, (pair_to_json(pair) for pair in pairs))


def pair_to_json(pair: Pair) -> dict[str, Any]:
    """The JSON object that `load_pairs` reads back as an equal pair."""
    chosen, rejected = messages_to_json(pair.replies)
    return {
        **pair.fields,
        "id": pair.id,
        "capability": pair.capability,
        "prompt": messages_to_json(pair.prompt),
        "chosen": [chosen],
        "rejected": [rejected],
    }


def labelled_to_json(item: Labelled) -> dict[str, Any]:
    """The JSON object that `scan_pairs` reads back as an equal labelled reply."""
    return {
        **item.fields,
        "id": item.id,
        "capability": item.capability,
        "prompt": messages_to_json(item.prompt),
        "completion": messages_to_json(item.replies),
        "label": item.good,
    }


def parse_pair(record: Record, config: DataConfig) -> Pair | Labelled:
    """Make a pair, or a labelled reply, of one record. Raises `RowError`."""
    value = renamed(record.value, config)
    if pair_format(value, config.format) == "kto":
        return _labelled(value, record, config)
    for name in ("chosen", "rejected"):
        if value.get(name) is None:
            have = ", ".join(map(str, value)) or "none"
            raise RowError(
                f"no {name!r}: a pair has 'prompt', 'chosen' and 'rejected'; its columns are: {have}; set columns to "
                "name them"
            )
    refuse_columns(value)
    given = _take_prompt(value, config.roles)
    chosen_start, chosen = _take_reply(value, "chosen", config.roles)
    rejected_start, rejected = _take_reply(value, "rejected", config.roles)
    prompt = with_context(value, _shared_prompt(given, chosen_start, rejected_start))
    check_turns(prompt, "prompt", "prompt")
    if chosen == rejected:
        raise RowError("chosen and rejected are the same text: a pair must show a difference")
    identity, capability = take_id(value, record), take_capability(value, config.capability)
    calls = (chosen.tool_calls, rejected.tool_calls)
    return Pair(identity, capability, prompt, chosen.text, rejected.text, value, *calls)


def _has_label(value: Mapping[str, object]) -> bool:
    return value.get("label") is not None and any(value.get(name) is not None for name in REPLY_FIELDS)


def is_labelled(value: Mapping[str, Any], declared: str | None) -> bool:
    """Whether a row holds one reply that is marked as good or bad.

    declared: the format in the config, which decides; None: the columns decide.
    """
    if declared is not None:
        return declared == "kto"
    return _has_label(value) and isinstance(value["label"], bool) and value.get("prompt") is not None


def pair_format(value: Mapping[str, Any], declared: str | None) -> str:
    """The format of a row of preferences: `pairs` or `kto`.

    declared: the format in the config, or None. Raises `RowError` if it is neither, or if the columns fit both.
    """
    if declared is not None:
        if declared not in ("pairs", "kto"):
            raise RowError(f"format: {declared} holds no preferences; set pairs or kto, or leave it out")
        return declared
    if _has_label(value) and isinstance(value["label"], bool) and value.get("chosen") is not None:
        raise RowError("the columns fit several formats: pairs, kto; set format to one of them")
    return "kto" if _has_label(value) and value.get("chosen") is None else "pairs"


def _labelled(value: dict[str, Any], record: Record, config: DataConfig) -> Labelled:
    if value.get("prompt") is None or not _has_label(value):
        raise RowError(f"format: kto has 'prompt', 'completion' and 'label'; its columns are: {', '.join(value)}")
    refuse_columns(value)
    name = next(name for name in REPLY_FIELDS if value.get(name) is not None)
    prompt = with_context(value, take_turns(value, "prompt", "user", roles=config.roles))
    start, reply = _take_reply(value, name, config.roles)
    if start:
        raise RowError(f"{name}: got {len(start) + 1} turns: must be the reply alone")
    check_turns(prompt, "prompt", "prompt")
    good = label_of(value)
    identity, capability = take_id(value, record), take_capability(value, config.capability)
    return Labelled(identity, capability, prompt, reply.text, good, value, reply.tool_calls)


def _take_prompt(value: dict[str, Any], roles: Mapping[str, str]) -> tuple[Message, ...]:
    """Remove the prompt from a row and return it: `prompt`, `conversations` (ShareGPT), or `instruction` and `input`
    (alpaca).
    """
    for name in ("prompt", *CONVERSATIONS):
        if value.get(name) is not None:
            return take_turns(value, name, "user", roles=roles)
    return take_instruction(value) if value.get("instruction") is not None else ()


def _take_reply(value: dict[str, Any], name: str, roles: Mapping[str, str]) -> tuple[tuple[Message, ...], Message]:
    """Remove a reply from a row. Returns the turns before it (none unless it is a whole conversation) and its turn."""
    turns = take_turns(value, name, "assistant", roles=roles)
    if turns[-1].role != "assistant":
        raise RowError(f"{name}: the last turn is {turns[-1].role!r}: a reply must end with 'assistant'")
    reply = turns[-1]
    if not isinstance(reply.content, str):
        raise RowError(f"{name}: the reply has an image: the two replies of a pair are compared as text only")
    if reply.trained is False:
        raise RowError(f"{name}: got train {shown(reply.trained)} (or weight 0): both replies of a pair are trained on")
    return turns[:-1], Message("assistant", reply.text, reply.tool_calls)


def _shared_prompt(
    given: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[Message, ...]:
    """The prompt of a pair: the field `prompt`, or else the turns with which both conversations begin."""
    if chosen != rejected:
        raise RowError("chosen and rejected do not begin with the same turns: a pair has one prompt")
    prompt = chosen or given
    if not prompt:
        raise RowError("no 'prompt': a pair has 'prompt', 'chosen' and 'rejected'")
    bare = chosen[1:] if chosen and chosen[0].role == "system" and given and given[0].role != "system" else chosen
    if given and chosen and given != bare:
        raise RowError("'prompt' is not the prompt that chosen and rejected begin with; leave one of them out")
    return prompt
