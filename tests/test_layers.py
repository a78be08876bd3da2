import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain
from posttrain.pipeline import hashing
from posttrain.pipeline.kinds import KINDS
from posttrain.pipeline.layers import FLOORS, ROOMS, may_import, parts_below

PACKAGE = Path(posttrain.__file__).parent
REWARDS = PACKAGE.parent / "rewards"


def modules(source: str, module: str) -> Iterator[str]:
    """The modules of this package that a source imports, wherever in it, relative imports resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "posttrain")
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name.split(".")[0] == "posttrain":
                # `from posttrain.rl import stage` imports posttrain.rl.stage
                yield from (f"{name}.{alias.name}" for alias in node.names)


def sources() -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every module of the package, the rewards among them."""
    for root, prefix in ((PACKAGE, "posttrain"), (REWARDS, "posttrain.rewards")):
        for path in sorted(root.rglob("*.py")):
            yield ".".join([prefix, *path.relative_to(root).with_suffix("").parts]), path.read_text()


def forbidden(module: str, source: str) -> list[str]:
    """The imports of a module that the table of layers forbids."""
    parts = module.split(".")
    if parts[1] == "__init__":  # the public face, which hands names of every part on
        return []
    bad = []
    for target in modules(source, module):
        other = target.split(".")
        if len(other) < 2 or other[1].startswith("__"):
            continue
        if not may_import(parts[1], other[1]):
            bad.append(f"{module} imports {target}")
            continue
        floors = ROOMS.get(parts[1]) if parts[1] == other[1] and parts[2] != "__init__" else None
        if floors and len(other) > 2 and not may_import(parts[2], other[2], floors):
            bad.append(f"{module} imports {target}")
    return bad


def test_imports_run_one_way():
    assert [line for module, source in sources() for line in forbidden(module, source)] == []


def renames(source: str) -> Iterator[int]:
    """Lines that put a file or folder in place: `os.replace`, `os.rename`, `shutil.move`, and a path's `rename`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if (of, node.func.attr) in {("os", "replace"), ("shutil", "move")} or node.func.attr in (
                "rename",
                "renames",
            ):
                yield node.lineno


# posttrain.files puts files and folders in place. The others cannot: a segment of weights must be locked under its
# first name, the ledger's copy is written before the folder that it is put into, and Ray's stand-in runs by path,
# without this package.
RENAMING = {
    "posttrain.files",
    "posttrain.sampling.weights",
    "posttrain.rl.loop.checkpoints",
    "posttrain.compat.ray_agent",
}


def test_files_are_put_in_place_by_one_module():
    found = {module for module, source in sources() if any(renames(source))}
    assert found == RENAMING


@pytest.mark.parametrize(
    "line", ["os.replace(a, b)", "os.rename(a, b)", "shutil.move(a, b)", "a.rename(b)", "Path('a').rename(b)"]
)
def test_every_way_to_put_a_file_in_place_is_seen(line):
    assert list(renames(line)) == [1]


def test_every_part_and_room_has_a_floor():
    def names(folder: Path) -> set[str]:
        return {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}

    assert {part for floor in FLOORS for part in floor} >= names(PACKAGE) - {"__init__"}
    for part, floors in ROOMS.items():
        assert {room for floor in floors for room in floor} == names(PACKAGE / part) - {"__init__"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("posttrain.rl.grading.judge", "from posttrain.filtering.prompts import JudgePrompts"),
        ("posttrain.sft.stage", "def run():\n    from posttrain.dpo import stage"),
        ("posttrain.data.rows", "import posttrain.model.load"),
        ("posttrain.rl.rollouts.weights", "from posttrain.rl.loop.tally import StepTally"),
        ("posttrain.rl.rollouts.weights", "from ..loop import tally"),
        ("posttrain.rl.grading.groups", "from posttrain.rl.config import RlConfig"),
        ("posttrain.config.base", "from posttrain import cli"),
        ("posttrain.dpo.stage", "from posttrain.rewards.coding import code"),
    ],
)
def test_a_forbidden_arrow_is_found(module, source):
    assert len(forbidden(module, source)) == 1


def test_a_stage_depends_on_itself_and_what_lies_below_it():
    assert {"rl", "judging", "sampling", "records"} <= parts_below("rl")
    assert not {"filtering", "sft", "pipeline", "cli", "report"} & parts_below("rl")


def test_a_change_of_the_judge_changes_the_hash_of_what_asks_it(tmp_path, monkeypatch):
    copy = tmp_path / "posttrain"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(posttrain, "__file__", str(copy / "__init__.py"))

    def hashes() -> list[dict[str, str]]:
        hashing._source_hashes.cache_clear()
        return [hashing.code_hashes(KINDS[name]) for name in ("filter", "rl")]

    try:
        before = hashes()
        assert hashes() == before
        for name in ("prompts.py", "forms.py", "requests.py"):
            (copy / "judging" / name).write_text((copy / "judging" / name).read_text() + "\n# changed\n")
            after = hashes()
            assert all(now != then for now, then in zip(after, before, strict=True))
            before = after
        (copy / "dpo" / "mine.py").write_text("# changed\n")
        assert hashes() == before, "no stage depends on another stage"
    finally:
        hashing._source_hashes.cache_clear()
