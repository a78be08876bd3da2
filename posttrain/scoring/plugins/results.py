"""What a reward or an environment returned, as a RewardResult, or why it is no reward."""

import math
import numbers
from typing import Any

from posttrain.errors import PluginError
from posttrain.records import RewardResult

MAX_REASON = 2000


def to_result(value: Any, what: str = "reward") -> RewardResult:
    """What the function returned, as a RewardResult. what: the kind of plug-in, for the message.

    Raises PluginError where it is no reward. The message begins with what was returned instead, in a word: none, text,
    nan, inf, or a type.
    """
    if isinstance(value, numbers.Real):
        value = RewardResult(float(value))
    if not isinstance(value, RewardResult):
        word = {"NoneType": "none", "str": "text"}.get(type(value).__name__, type(value).__name__)
        raise PluginError(
            f"{word}: the {what} returned {_short(value)}; it must return a float, a bool or a RewardResult"
        )
    parts = {str(name): float(part) for name, part in value.parts.items()}
    for name, number in {"value": float(value.value), **parts}.items():
        if not math.isfinite(number):
            raise PluginError(f"{str(number).lstrip('-')}: the {what}'s {name} is {number}; it must be finite")
    return RewardResult(float(value.value), parts, str(value.reason)[:MAX_REASON])


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}" if value is not None else "None"
