"""Public names of a package that are imported when they are first used (PEP 562).

An `__init__.py` says once where each name lives; importing the package then loads neither torch, Ray nor vLLM:

    __all__ = ["load_rows", "write_rows"]
    __getattr__, __dir__ = lazy_names(__name__, {"rows": ["load_rows", "write_rows"]})

Type checkers and editors read the same names from imports below `if TYPE_CHECKING:`.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package. `homes`: module below the package -> names that it defines."""
    home_of = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)  # from now on without this function
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return __getattr__, __dir__
