"""The formats of rows, and how a row of each becomes a conversation. A format is detected by its columns, or declared.

    messages            {"messages": [{"role", "content"}, ...]}
    prompt_completion   {"prompt", "completion" or "response"}
    sharegpt            {"conversations": [{"from", "value"}, ...]}
    alpaca              {"instruction", "input", "output"}
    kto                 {"prompt", "completion", "label"}: only a reply with label true is trained on
    text                {"text"}: trained on as it stands, without turns

The columns `system` and `history` become turns in any format. A column by which other tools change what is trained on,
such as `loss_mask`, is refused by its name if this package cannot do the same. Left out: preference pairs, which
pairs.py reads with the functions at the end of this file.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.data.aliases import example_of_columns
from posttrain.data.messages import RowError, is_absent, is_flag_set, shown, to_messages
from posttrain.data.turns import Kind
from posttrain.records import Message

REPLY_FIELDS = ("completion", "response")
CONVERSATIONS = ("conversations", "conversation")
# The columns by which a format is known.
_REPLY = " or ".join(REPLY_FIELDS)
_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "kto": ("prompt", _REPLY, "label"),
    "prompt_completion": ("prompt", _REPLY),
    "text": ("text",),
}
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}
# Columns by which other tools change what is trained on, and what to do instead.
_FLAGS = ("train", "training", "trainable", "loss", "loss_mask", "loss_weight", "weight", "sample_weight", "masked")
_REFUSED = {
    **dict.fromkeys(_FLAGS, "a whole row cannot be weighted; remove the row or the column, or mark single turns"),
    **dict.fromkeys(
        ("input_ids", "token_ids", "attention_mask", "assistant_masks", "completion_mask", "labels"),
        "rows of tokens cannot be read; give the text",
    ),
    **dict.fromkeys(
        ("chat_template", "chat_template_kwargs", "enable_thinking", "add_generation_prompt"),
        "the chat template is used as it is for all rows; remove the column, and set model.chat_template instead",
    ),
    **dict.fromkeys(("functions", "function_call"), "write it as tools, a list of function schemas"),
}


def renamed(value: Mapping[str, object], config: DataConfig) -> dict[str, Any]:
    """The row with its columns renamed as `config.columns` says, {our name: the row's name}.

    Raises `RowError` for a column that the row lacks, and for a new name that the row already uses.
    """
    row = dict(value)
    moved: dict[str, Any] = {}
    for ours, theirs in config.columns.items():
        if theirs not in row:
            have = ", ".join(map(str, row)) or "none"
            raise RowError(f"no column {theirs!r}, which columns.{ours} names; its columns are: {have}")
        moved[ours] = row.pop(theirs)
    clash = next((name for name in moved if not is_absent(row.get(name))), None)
    if clash is not None:
        raise RowError(f"{clash}: columns.{clash} names {config.columns[clash]!r}, but the row has {clash!r} too")
    return {**row, **moved}


def take_conversation(value: dict[str, Any], kind: Kind, config: DataConfig) -> tuple[Message, ...]:
    """Remove the columns of a conversation from a row and return it. Raises `RowError`."""
    refuse_columns(value)
    found = config.format or detect(value, kind)
    if found == "pairs":
        raise RowError("format: pairs is for the dpo stage; set another, or leave it out")
    _require(value, found, kind)
    roles = config.roles
    if found == "text":
        if kind == "prompt":
            raise RowError("format: text has no prompt; name its column, such as columns: {prompt: text}")
        return to_messages([{"role": "text", "content": value.pop("text")}], "text", texts=True)
    if found == "messages":
        turns = take_turns(value, "messages", "user", roles=roles)
    elif found == "sharegpt":
        name = next(name for name in CONVERSATIONS if not is_absent(value.get(name)))
        turns = take_turns(value, name, "user", roles=roles)
    elif found == "alpaca":
        turns = take_instruction(value)
        if kind == "supervised":
            turns += take_turns(value, "output", "assistant", roles=roles)
    else:
        turns = take_turns(value, "prompt", "user", roles=roles)
        if kind == "supervised":
            given = [name for name in REPLY_FIELDS if not is_absent(value.get(name))] or list(REPLY_FIELDS[:1])
            if len(given) > 1 and value[given[0]] != value[given[1]]:
                raise RowError(f"{' and '.join(given)}: a row has one reply; rename or remove one of these columns")
            reply = given[0]
            turns += take_turns(value, reply, "assistant", roles=roles)
    if found == "kto" and kind == "supervised" and not label_of(value):
        raise RowError("label: got False: a reply that is marked as bad is not trained on; remove the row")
    return with_context(value, turns, whole=found in ("messages", "sharegpt"))


def detect(value: Mapping[str, object], kind: Kind) -> str:
    """The format of a row by its columns. Raises `RowError` if none or several fit."""
    fitting = [name for name in _COLUMNS if not _lacking(value, name, kind)]
    if "kto" in fitting and (kind == "prompt" or not isinstance(value["label"], bool | int | float)):
        fitting.remove("kto")
    if "kto" in fitting:
        if not isinstance(value["label"], bool):
            raise RowError(
                f"label: got {shown(value['label'])}: set format: kto if it says whether the reply is good, or format: "
                "prompt_completion if it is a column like others"
            )
        fitting.remove("prompt_completion")
    if "text" in fitting and (len(fitting) > 1 or kind == "prompt"):
        fitting.remove("text")
    if "messages" in fitting and "prompt_completion" in fitting and _agree(value):
        fitting.remove("prompt_completion")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise RowError(f"the columns fit several formats: {', '.join(fitting)}; set format to one of them")
    raise RowError(_unknown(value, kind))


def _agree(value: Mapping[str, object]) -> bool:
    """Whether the column `prompt` beside `messages` only repeats the beginning of the conversation or one turn."""
    turns, prompt = value["messages"], value["prompt"]
    if isinstance(prompt, str) and isinstance(turns, list):
        return any(isinstance(turn, Mapping) and turn.get("content") == prompt for turn in turns)
    return isinstance(turns, list) and isinstance(prompt, list) and turns[: len(prompt)] == prompt


def _needed(name: str, kind: Kind) -> tuple[str, ...]:
    """The columns of a format that a row must have. A prompt needs no reply."""
    columns = _COLUMNS[name]
    return columns[:1] if kind == "prompt" and name in ("alpaca", "prompt_completion") else columns


def _lacking(value: Mapping[str, object], name: str, kind: Kind) -> list[str]:
    """The columns of a format that a row lacks."""
    return [column for column in _needed(name, kind) if not _has(value, column)]


def _has(value: Mapping[str, object], column: str) -> bool:
    names = {_REPLY: REPLY_FIELDS, "conversations": CONVERSATIONS}.get(column, (column,))
    return any(value.get(name) is not None for name in names)


def _require(value: Mapping[str, object], name: str, kind: Kind) -> None:
    if lacking := _lacking(value, name, kind):
        have = ", ".join(map(str, value)) or "none"
        raise RowError(f"format: {name} needs {' and '.join(lacking)}; its columns are: {have}; set columns or format")


def _unknown(value: Mapping[str, object], kind: Kind) -> str:
    have = ", ".join(sorted(map(str, value))) or "none"
    if _has(value, "chosen") and _has(value, "rejected"):
        return f"no known format: it is a preference pair, which the dpo stage reads; its columns are: {have}"
    near = [
        f"{name} (lacks {', '.join(lacking)})"
        for name in _COLUMNS
        if (lacking := _lacking(value, name, kind)) and len(lacking) < len(_needed(name, kind))
    ]
    nearest = f"near are {'; '.join(near)}" if near else f"the formats are {', '.join(_COLUMNS)}"
    example = example_of_columns(value)
    return f"no known format; its columns are: {have}; {nearest}; set columns to name them, such as {example}"


# --- functions that pairs.py uses too ---


def take_turns(
    value: dict[str, Any], name: str, role: str, *, roles: Mapping[str, str] | None = None
) -> tuple[Message, ...]:
    """Remove a column from a row and return its messages. A plain text becomes one turn with the role `role`."""
    turns = value.pop(name)
    if isinstance(turns, str) and name in ("messages", *CONVERSATIONS):
        turns = json_list(turns)
    elif isinstance(turns, str):
        turns = [{"role": role, "content": turns}]
    if isinstance(turns, Mapping) and ("role" in turns or "from" in turns):
        turns = [turns]
    if isinstance(turns, list):
        turns = [_turn(item, roles or {}, f"{name}[{index}]") for index, item in enumerate(turns)]
    return to_messages(turns, name)


def json_list(text: str) -> Any:
    """The list that a JSON text holds, as in CSV files, which have no lists; the text itself if it holds none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, list) else text


def _turn(item: object, roles: Mapping[str, str], where: str) -> Any:
    """A turn with ShareGPT's keys and role names replaced by `role`, `content` and this package's roles."""
    if not isinstance(item, Mapping):
        return item
    turn = dict(item)
    if "role" not in turn and "from" in turn:
        if "value" not in turn and "content" not in turn:
            have = ", ".join(map(str, turn))
            raise RowError(f"{where}: no 'value': a turn has 'from' and 'value'; its keys are: {have}")
        turn = {"role": turn.pop("from"), "content": turn.pop("value", None), **turn}
        roles = {**_SHAREGPT_ROLES, **roles}
    if isinstance(role := turn.get("role"), str):
        turn["role"] = roles.get(role, role)
    if turn.get("role") == "function_call":
        try:
            calls = json.loads(turn["content"])
        except (TypeError, ValueError, RecursionError):
            raise RowError(f"{where}: got {shown(turn['content'])}: must be the JSON text of a call") from None
        turn.update(role="assistant", content="", tool_calls=calls if isinstance(calls, list) else [calls])
    return turn


def take_instruction(value: dict[str, Any]) -> tuple[Message, ...]:
    """Remove the instruction and input of an alpaca row and return one user turn: both, with an empty line between."""
    texts = [value.pop("instruction"), value.pop("input", None)]
    for name, text in zip(("instruction", "input"), texts, strict=True):
        if not isinstance(text, str) and not is_absent(text):
            raise RowError(f"{name}: got {shown(text)}: must be text")
    return to_messages([{"role": "user", "content": "\n\n".join(text for text in texts if text)}], "instruction")


def with_context(value: dict[str, Any], turns: tuple[Message, ...], *, whole: bool = False) -> tuple[Message, ...]:
    """The turns with the row's `system` and `history` before them. whole: `turns` are a conversation with its history.

    Raises `RowError` for a `history` or a different `system` text beside a conversation that has its own.
    """
    history, system = value.pop("history", None), value.get("system")
    if not is_absent(history):
        if whole or turns[0].role == "system":
            raise RowError(
                f"history: got {shown(history)} beside a conversation; write its turns into the conversation"
            )
        turns = (*_history(history), *turns)
    if is_absent(system):
        value.pop("system", None)
        return turns
    if not isinstance(system, str):
        raise RowError(f"system: got {shown(system)}: must be the text of a system turn")
    if turns[0].role == "system" and turns[0].content != system:
        raise RowError(f"system: got {shown(system)}, but the conversation begins with another system turn; remove one")
    value.pop("system")
    return (
        turns
        if turns[0].role == "system"
        else (*to_messages([{"role": "system", "content": system}], "system"), *turns)
    )


def _history(history: object) -> tuple[Message, ...]:
    rule = "must be a list of [user, assistant] texts"
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError(f"history: got {shown(history)}: {rule}")
    turns = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return to_messages(turns, "history")


def label_of(value: dict[str, Any]) -> bool:
    """Remove and return KTO's label: whether the reply is good."""
    label = value.pop("label", None)
    if not isinstance(label, bool) and label not in (0, 1):
        raise RowError(f"label: got {shown(label)}: must be true (a good reply) or false")
    return bool(label)


def refuse_columns(value: Mapping[str, object]) -> None:
    """Raise `RowError` for a column by which other tools change what is trained on.

    A column whose value changes nothing, such as `train: true`, is accepted.
    """
    for name, advice in _REFUSED.items():
        given = value.get(name)
        if is_absent(given) or (name in _FLAGS and is_flag_set(given) is (name != "masked")):
            continue
        if name == "labels" and not (isinstance(given, Sequence) and all(isinstance(item, int) for item in given)):
            continue  # tags of the row, not of its tokens
        raise RowError(f"{name}: got {shown(given)}: {advice}")
