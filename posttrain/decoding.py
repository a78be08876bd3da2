"""What is said of a record that cannot be decoded: which of its fields is wrong."""

import re
from typing import Any

import msgspec


def named_field(error: msgspec.ValidationError, kind: object) -> str:
    """The message of `error`, which decoding a `kind` raised, with the names of fields in its path.

    msgspec numbers the fields of a record that travels as an array: "Expected `str`, got `int` - at `$[0][1]`" becomes
    "Expected `str`, got `int` - at `[0].text`".
    """
    message, mark, path = str(error).rpartition(" - at `$")
    if not mark:
        return str(error)
    info: Any = msgspec.inspect.type_info(kind)
    named = ""
    for part in re.findall(r"\[[^\]]*\]|\.\w+", path):
        if isinstance(info, msgspec.inspect.UnionType):
            info = next((item for item in info.types if not isinstance(item, msgspec.inspect.NoneType)), None)
        fields = info.fields if isinstance(info, msgspec.inspect.StructType) else ()
        field = next((one for at, one in enumerate(fields) if part in (f"[{at}]", f".{one.encode_name}")), None)
        named += part if field is None else f".{field.name}"
        info = field.type if field is not None else getattr(info, "item_type", None)
    return f"{message} - at `{named.removeprefix('.')}`"
