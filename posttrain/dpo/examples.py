"""Turn preference pairs into token ids, with `posttrain.data.samples`, as all stages do.

The prompt has exactly the token ids that sampling would send. A reply is rendered as a turn, with the token that ends
it. A reply that was rejected because it ran out of tokens never had an end token, so it gets none here: otherwise
training would lower the probability of ending a turn.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.data.images.render import Pictures, expanded, for_template, pictures_of
from posttrain.data.messages import RowError
from posttrain.data.pairs import Pair
from posttrain.data.samples import render_reply
from posttrain.data.stored import Stored, StoreWriter, pick
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import tools_of
from posttrain.errors import DataError
from posttrain.tune.examples import PICTURES, Example


@dataclass(frozen=True, slots=True)
class PairIds:
    """Token ids of a prompt, and of the two replies to it. pictures: keys of those that the prompt shows, in order."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    pictures: tuple[str, ...] = ()

    def chosen_example(self) -> Example:
        """The prompt with the chosen reply, whose tokens are marked as trained on."""
        mask = [0] * len(self.prompt_ids) + [1] * len(self.chosen_ids)
        return Example(self.prompt_ids + self.chosen_ids, mask, self.pictures)


def to_record(ids: PairIds, *, images: bool = False) -> dict[str, Any]:
    """The row of the trainer's dataset for a pair. images: with the keys of its pictures, as PICTURES."""
    record = {"prompt_ids": ids.prompt_ids, "chosen_ids": ids.chosen_ids, "rejected_ids": ids.rejected_ids}
    return {**record, **({PICTURES: list(ids.pictures)} if images else {})}


def blank_record(ids: PairIds, *, images: bool = False) -> dict[str, Any]:
    """A row without replies, from which nothing is learned; see posttrain/tune/steps.py.

    Its two tokens are the last one of a reply, which stands for no picture.
    """
    return to_record(PairIds([ids.chosen_ids[-1]] * 2, [], []), images=images)


def tokenize_pairs(
    tokenizer: Tokenizer, pairs: Sequence[Pair], max_length: int, *, overlong: Literal["error", "drop"],
    pictures: Pictures | None = None, folder: Path | None = None, name: str | None = None,
) -> tuple[Stored[PairIds], Sequence[Pair]]:  # fmt: skip
    """Return the ids of the pairs that were kept, and these pairs, in the same order. pictures: those of the prompts.

    folder, name: of the file in which the ids lie; see `StoreWriter`. Raises `DataError`, which names the pair, if a
    pair does not render as sampling would render it, if its replies become the same tokens, or if it is too long and
    overlong is "error". Also raises it if no pair is left.
    """
    kept: array[int] = array("q")
    with StoreWriter[PairIds](PairIds, folder, name) as kept_ids:
        for place, pair in enumerate(pairs):
            try:
                ids = _tokenize(tokenizer, pair, pictures)
            except (DataError, RowError) as error:
                raise DataError(f"pair {pair.id!r}: {error}") from None
            length = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
            if length <= max_length:
                kept_ids.append(ids)
                kept.append(place)
            elif overlong == "error":
                rule = "raise max_length, shorten it, or set overlong: drop"
                raise DataError(f"pair {pair.id!r}: {length} tokens, but max_length is {max_length}; {rule}")
        if not kept:
            raise DataError(f"all {len(pairs)} pairs are longer than max_length {max_length}; raise it")
        return kept_ids.close(), pairs if len(kept) == len(pairs) else pick(pairs, kept)


def _tokenize(tokenizer: Tokenizer, pair: Pair, pictures: Pictures | None) -> PairIds:
    tools, keys = tools_of(pair.fields), pictures_of(pair.prompt)
    chosen, rejected = pair.replies
    prompt = pair.prompt if pictures is None else for_template(pair.prompt)
    prompt_ids, chosen_ids = render_reply(tokenizer, prompt, chosen, tools=tools)
    ended = pair.fields.get("reason") != "truncated"
    _, rejected_ids = render_reply(tokenizer, prompt, rejected, tools=tools, ended=ended)
    if not rejected_ids or chosen_ids == rejected_ids:
        raise DataError("chosen and rejected must be two replies, but they become the same tokens")
    if pictures is not None and keys:
        prompt_ids = expanded(prompt_ids, keys, pictures)
    return PairIds(prompt_ids, chosen_ids, rejected_ids, keys)
