"""The events about faults and recoveries, and the words for each.

The terminal and the report show them in the same words. Left out: the end of a stage, which both show separately.
"""

from collections.abc import Mapping

WORDS = {
    "alarm": "alarm",
    "doubtful": "doubtful",
    "engine_given_up": "engine given up",
    "engine_refused": "engine not added",
    "engine_replaced": "engine replaced",
    "reward_restarted": "reward processes restarted",
    "rolled_back": "rolled back",
    "rows_set_aside": "rows set aside",
    "tracker_failed": "tracker turned off",
    "unscored": "unscored",
}
SUBJECTS = ("name", "tracker", "reason", "error")  # said first and without their key
OF_EVERY_EVENT = ("time", "t", "stage", "event")


def fault_words(event: Mapping[str, object]) -> tuple[str, str] | None:
    """(what happened, details) of an event that is a fault or a recovery, else None.

    If the event has a sentence of its own (the field `text`), that is the details. Otherwise its fields are listed.
    """
    what = WORDS.get(str(event.get("event")))
    if what is None:
        return None
    if text := event.get("text"):
        return what, str(text)
    subjects = [str(event[key]).split("\n")[0] for key in SUBJECTS if event.get(key) not in (None, "")]
    others = {key: value for key, value in event.items() if key not in (*SUBJECTS, *OF_EVERY_EVENT)}
    values = others.pop("values", None)
    others |= values if isinstance(values, Mapping) else {} if values is None else {"values": values}
    figures = ", ".join(f"{key} {_short(value)}" for key, value in others.items())
    return what, ": ".join([*subjects, *([figures] if figures else [])])


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
