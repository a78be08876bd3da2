"""The end tokens: the tokens at which sampling stops.

Every room takes them from here, so that they agree: a trained reply ends with an end token, a truncated reply has none,
and every request to an engine names all of them.

They are the tokenizer's end-of-sequence token, the `eos_token_id` in the model folder's generation_config.json (or, as
in transformers and vLLM, in its config.json if the former names none), and the special token that the chat template
writes after a reply.
"""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from posttrain.context import StageContext
from posttrain.data.special import guard_of
from posttrain.data.templates import chat_template
from posttrain.errors import CheckpointError
from posttrain.files import read_object

_REPLY = "Reply7"  # a text that no template changes
_PROBE = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": _REPLY}]

_known: "WeakKeyDictionary[Any, tuple[tuple[Any, ...], list[int]]]" = WeakKeyDictionary()


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens at which sampling stops, beginning with the tokenizer's end-of-sequence token.

    tokenizer: loaded from a model folder, whose configuration is then read too, or made in memory.
    """
    key = (_folder(tokenizer), str(tokenizer.chat_template), len(tokenizer), tokenizer.eos_token_id)
    if (found := _known.get(tokenizer)) is None or found[0] != key:
        found = _known[tokenizer] = key, _end_ids(tokenizer)
    return list(found[1])


def note_added_end(tokenizer: Any, context: StageContext | None) -> None:
    """Emit an event if only the chat template names one of the end tokens.

    Neither the tokenizer nor the configuration in the model folder names such a token, so another program that samples
    from the folder would not stop there.
    """
    ids = end_token_ids(tokenizer)
    if context is not None and (added := ids[len(_named_ids(tokenizer)) :]):
        context.event("end_token_added", tokens=tokenizer.convert_ids_to_tokens(added))


def _end_ids(tokenizer: Any) -> list[int]:
    known = _named_ids(tokenizer)
    written = [int(tokenizer.convert_tokens_to_ids(token)) for token in _after_reply(tokenizer)]
    # A template may write other tokens between the reply and its end token. So the first special token after the reply
    # is taken only if none of the tokens there is known as an end token.
    return known if set(written) & set(known) else [*known, *written[:1]]


def _named_ids(tokenizer: Any) -> list[int]:
    """The end tokens that the tokenizer and the configuration of its folder name."""
    eos, folder = tokenizer.eos_token_id, _folder(tokenizer)
    named = [] if eos is None else [int(eos)]
    return list(dict.fromkeys([*named, *(folder_end_ids(Path(folder)) if folder else [])]))


def _folder(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "")


def folder_end_ids(folder: Path) -> list[int]:
    """The ids of end tokens that a model folder's configuration names; none for a folder that has no configuration."""
    config = read_object(folder / "config.json") or {}
    for part in (read_object(folder / "generation_config.json"), config, config.get("text_config")):
        ids = part.get("eos_token_id") if isinstance(part, dict) else None
        named = ids if isinstance(ids, list) else [ids]
        if found := [number for number in named if isinstance(number, int) and not isinstance(number, bool)]:
            return found
    return []


def _after_reply(tokenizer: Any) -> list[str]:
    """The special tokens that the chat template writes after a reply, whether or not another turn follows."""
    try:
        template = chat_template(tokenizer)
    except CheckpointError:
        return []
    afters = [after for messages in (_PROBE, [*_PROBE, _PROBE[0]]) if (after := _rest(tokenizer, messages)) is not None]
    special = re.compile("|".join(map(re.escape, guard_of(tokenizer, template).tokens)) or "(?!)")
    found = [special.findall(after) for after in afters]
    return [each[0] for each in takewhile(lambda each: len(set(each)) == 1, zip(*found, strict=False))]


def _rest(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """What the template writes after the reply; None if it refuses these messages or writes no such reply."""
    from jinja2 import TemplateError

    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:
        return None
    _, reply, after = rendered.rpartition(_REPLY)
    return after if reply else None
