"""Bundled YAML is found by name."""

import pytest

from posttrain.errors import ConfigError
from posttrain.resources import bundled, bundled_names


@pytest.mark.parametrize("kind", ["pipelines", "configs"])
def test_every_bundled_name_is_a_file(kind: str) -> None:
    for name in bundled_names(kind):  # type: ignore[arg-type]
        assert bundled(kind, name).is_file()  # type: ignore[arg-type]
        assert bundled(kind, f"{name}.yaml") == bundled(kind, name)  # type: ignore[arg-type]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no bundled file of that name in pipelines") as caught:
        bundled("pipelines", "no-such-pipeline")
    for name in bundled_names("pipelines"):
        assert name in str(caught.value)


def test_a_name_cannot_leave_the_folder() -> None:
    with pytest.raises(ConfigError):
        bundled("configs", "../pyproject")
