"""CONTRIBUTING.md leads a new reader through the code, so every file that it names must exist."""

import re
from pathlib import Path

import posttrain

ROOT = Path(posttrain.__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LAYOUT = TEXT.split("```")[3]
# A file or folder, such as `rl/loop/controller.py` or `scoring/`.
PATH = re.compile(r"(?<![\w./-])[\w./-]*\w(?:\.py|\.md|/)(?![\w/])")


def named() -> set[str]:
    """The paths in the first column of the layout, and those in backticks or parentheses anywhere else."""
    columns = " ".join(line.strip().split("  ")[0] for line in LAYOUT.splitlines())
    quoted = " ".join(re.findall(r"`([^`\n]+)`", TEXT.replace(LAYOUT, "")))
    return set(PATH.findall(columns)) | set(PATH.findall(quoted)) | set(re.findall(r"docs/\w+\.md", TEXT))


def exists(name: str, places: list[str]) -> bool:
    return any(f"/{place}".endswith(f"/{name.rstrip('/')}") for place in places)


def test_every_path_that_it_names_exists():
    folders = [
        ROOT / name
        for name in ("posttrain", "rewards", "pipelines", "configs", "clusters", "benchmarks", "tests", "docs")
    ]
    places = [path.relative_to(ROOT).as_posix() for top in folders for path in (top, *top.rglob("*"))]
    names = named()
    assert len(names) > 50, "the paths are not found in the text"
    assert [name for name in sorted(names) if not exists(name, places)] == []


def test_the_layout_names_every_part_of_the_package():
    parts = {
        path.name for path in (ROOT / "posttrain").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    listed = {name.rstrip("/") for name in re.findall(r"[\w.]+(?:/|\.py)", LAYOUT)}
    assert parts - listed - {"rewards", "pipelines", "configs"} == set()
