"""How the report writes numbers: durations, counts, shares and times."""

from datetime import UTC, datetime

from posttrain.report.read import number

NONE = "–"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def seconds(value: object) -> str:
    """A duration, such as 12.3 s, 4 min 05 s or 2 h 10 min."""
    wall = number(value)
    if wall is None:
        return NONE
    if wall < 10:
        return f"{wall:.1f} s"
    if wall < 60:
        return f"{wall:.0f} s"
    minutes = round(wall) // 60
    if minutes < 60:
        return f"{minutes} min {round(wall) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: object) -> str:
    """A count with thin spaces, such as 1 234. A million or more is shortened to three digits, such as 1.23 M."""
    amount = number(value)
    if amount is None:
        return NONE
    if abs(amount) >= 1e9:
        return f"{amount / 1e9:.3g} B"
    if abs(amount) >= 1e6:
        return f"{amount / 1e6:.3g} M"
    return f"{round(amount):,}".replace(",", "\u202f")


def percent(value: object, digits: int = 0) -> str:
    """A share in [0, 1] as a percentage, such as 12.5%."""
    share = number(value)
    return NONE if share is None else f"{100 * share:.{digits}f}%"


def plain(value: object, digits: int = 3) -> str:
    """A number with `digits` significant digits. A very small one is written as 1.2 × 10⁻⁵, a large one as a count."""
    amount = number(value)
    if amount is None:
        return NONE
    if 0 < abs(amount) < 1e-4:
        mantissa, exponent = f"{amount:.{digits - 1}e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(RAISED)}"
    return f"{amount:.{digits}g}" if abs(amount) < 10**digits else count(amount)


def utc(value: object) -> str:
    """A Unix time as a date and minute in UTC."""
    moment = number(value)
    if moment is None:
        return ""
    return datetime.fromtimestamp(moment, UTC).strftime("%-d %B %Y, %H:%M UTC")


def plural(amount: float, noun: str) -> str:
    """A count with its noun: 1 step, 2 steps."""
    return f"{count(amount)} {noun}{'' if round(amount) == 1 else 's'}"
