"""The one home of chat rendering: messages in, token ids and the loss mask out, the same for every stage.

Text is rendered by the tokenizer's own chat template. The mask comes from the template's `{% generation %}` markers;
a template without them is rendered prefix by prefix, and the prefixes are checked, never assumed. A reply is trained
on together with the token that ends its turn, else the model would not learn to stop.

Left out: truncation and packing (see packing), and any repair of a template; a template that renders a prompt one
way for sampling and another way for training is an error here, not a surprise in the loss.

`tokenizer` is any Hugging Face tokenizer with a chat template (`PreTrainedTokenizerBase`); this module imports none.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import CheckpointError, DataError
from posttrain.records import Message

# Tokens that end a turn in common chat formats, beside the tokenizer's own end-of-sequence token.
END_OF_TURN_TOKENS = ("<|eot|>", "<|eom|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>")

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def as_dicts(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the form that chat templates take."""
    return [
        {"role": item.role, "content": item.content} if isinstance(item, Message) else dict(item) for item in messages
    ]


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template; raises `CheckpointError` if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise CheckpointError(
            f"{name}: the tokenizer has no chat template; put a chat_template.jinja into the folder that "
            "`model.path` names, or point `model.path` at an instruction-tuned checkpoint"
        )
    return template


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a turn: end-of-sequence first, then those of `END_OF_TURN_TOKENS` it knows."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for token in END_OF_TURN_TOKENS:
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
            continue
        if token_id not in ids:
            ids.append(int(token_id))
    return ids


def render_prompt(tokenizer: Any, messages: Sequence[Message | Mapping[str, Any]]) -> list[int]:
    """Token ids of a prompt, up to and including the header of the assistant turn that is to come.

    Raises `DataError` if the template refuses the messages, `CheckpointError` if there is no template.
    """
    return list(_apply(tokenizer, as_dicts(messages), add_generation_prompt=True)["input_ids"])


def render_conversation(tokenizer: Any, messages: Sequence[Message | Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and for each id 1 if it is trained on, else 0.

    Trained on are the tokens of assistant turns, with the token that ends each. Raises `DataError` if there is no
    assistant turn, if the template refuses the messages, or if it marks no generation and its prefixes disagree.
    """
    dicts = as_dicts(messages)
    if not any(item["role"] == "assistant" for item in dicts):
        raise DataError(
            f"messages have roles {[item['role'] for item in dicts]}, but need an assistant turn to train on"
        )
    if _GENERATION_MARKER.search(chat_template(tokenizer)):
        rendered = _apply(tokenizer, dicts, return_assistant_tokens_mask=True)
        ids, mask = list(rendered["input_ids"]), [int(bit) for bit in rendered["assistant_masks"]]
    else:
        ids, mask = _mask_from_prefixes(tokenizer, dicts)
    mask = _with_end_of_turn(ids, mask, set(end_token_ids(tokenizer)))
    if not any(mask):
        raise DataError("the chat template marks no token of the assistant turns; check its generation markers")
    return ids, mask


def check_parity(tokenizer: Any, messages: Sequence[Message | Mapping[str, Any]]) -> None:
    """Raise `DataError` unless what is trained on follows exactly the prompt that sampling would send.

    For every assistant turn, `render_prompt` of what comes before it must equal, token for token, the beginning of
    `render_conversation`, and training on that turn must start right there.
    """
    ids, mask = render_conversation(tokenizer, messages)
    for index, message in enumerate(as_dicts(messages)):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        _require_prefix(tokenizer, prompt, ids, f"the prompt before message {index}")
        start = len(prompt)
        if start >= len(mask) or not mask[start] or mask[start - 1]:
            raise DataError(
                f"message {index}: sampling starts at token {start}, but the tokens trained on do not; "
                "check the generation markers of the chat template"
            )


def _apply(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
    from jinja2.exceptions import TemplateError

    chat_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        roles = [item.get("role") for item in messages]
        raise DataError(f"the chat template refuses messages with roles {roles}: {error}") from None


def _mask_from_prefixes(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Mask of a template without markers: a turn is what it adds to the prompt rendered before it."""
    ids = list(_apply(tokenizer, messages)["input_ids"])
    mask = [0] * len(ids)
    ends = set(end_token_ids(tokenizer))
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:index])
        through = list(_apply(tokenizer, messages[: index + 1])["input_ids"])
        _require_prefix(tokenizer, prompt, ids, f"the prompt before message {index}")
        _require_prefix(tokenizer, through, ids, f"the conversation up to message {index}")
        # What follows the end of the turn (a newline, in some formats) is the template's, not the model's.
        last = next((at for at in range(len(through) - 1, len(prompt) - 1, -1) if ids[at] in ends), len(through) - 1)
        mask[len(prompt) : last + 1] = [1] * (last + 1 - len(prompt))
    return ids, mask


def _with_end_of_turn(ids: list[int], mask: list[int], ends: set[int]) -> list[int]:
    """Some templates close the marker before the end-of-turn token; it belongs to the reply."""
    return [
        1 if bit or (at and mask[at - 1] and token in ends and ids[at - 1] not in ends) else 0
        for at, (token, bit) in enumerate(zip(ids, mask, strict=True))
    ]


def _require_prefix(tokenizer: Any, prefix: list[int], ids: list[int], what: str) -> None:
    if ids[: len(prefix)] == prefix:
        return
    pairs = zip(prefix, ids, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(prefix), len(ids)))
    expected, got = tokenizer.decode(prefix[at : at + 4]), tokenizer.decode(ids[at : at + 4])
    raise DataError(
        f"{what} is not a prefix of the rendered conversation: at token {at} it has {expected!r}, the conversation "
        f"{got!r}; the chat template must render a turn the same way whether or not more turns follow"
    )
