"""Types of fields that many sections use. Each gives a rule and is checked when a config is read."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field


def _real_path(path: str) -> str:
    """The path with its `~` expanded. Raises ValueError for an environment variable, which only a shell expands."""
    variable = re.search(r"\$\w+", path)
    if variable and not Path(path).exists():
        raise ValueError(f"environment variables are not expanded here; write out what {variable[0]} stands for")
    return str(Path(path).expanduser()) if path.startswith("~") else path


PathText = Annotated[str, AfterValidator(_real_path)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
