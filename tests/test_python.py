"""`import posttrain` as a library: what it offers, what importing it loads, and the blocks of docs/python.md."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

import posttrain
from posttrain.errors import ConfigError, DataError
from posttrain.lazy import lazy_names
from posttrain.records import Message

ROOT = Path(__file__).resolve().parent.parent
LAZY = (
    "posttrain",
    "posttrain.data",
    "posttrain.filtering",
    "posttrain.model",
    "posttrain.pipeline",
    "posttrain.report",
)
HEAVY = {"torch", "ray", "vllm", "transformers", "deepspeed", "numpy", "pydantic", "msgspec", "pyarrow", "yaml"}
REWARD = """
def right(rollout, row):
    return float(rollout.text.strip().endswith(row.answer)) + len(rollout.text) % 3 / 10
"""
BLOCK = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


def module(name: str):
    return __import__(name, fromlist=["__all__"])


@pytest.mark.parametrize("name", LAZY)
def test_every_public_name_is_there_and_listed(name):
    package = module(name)
    assert package.__all__ == sorted(package.__all__, key=package.__all__.index)
    for public in package.__all__:
        assert getattr(package, public) is not None
        assert public in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = package.no_such_name


def test_what_rl_trains_with_is_a_trainer_as_offered():
    from posttrain.rl.training.trainer import PolicyTrainer

    asked = {name for name in vars(posttrain.Trainer) if not name.startswith("_")}
    assert {"step", "publish", "logprobs", "save", "save_checkpoint", "load_checkpoint", "report", "close"} <= asked
    for name in asked:
        parameters, own = (
            list(inspect.signature(getattr(t, name)).parameters) for t in (posttrain.Trainer, PolicyTrainer)
        )
        assert own == parameters, name


@pytest.mark.parametrize("name", LAZY)
def test_type_checkers_see_the_names_that_are_offered(name):
    tree = ast.parse(Path(module(name).__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(seen) == set(module(name).__all__) - {"__version__"}
    for public, home in seen.items():
        assert getattr(module(home), public) is getattr(module(name), public)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAZY)
def test_importing_a_package_loads_nothing_heavy(name):
    program = f"import sys; before = set(sys.modules); import {name}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"posttrain.lazy", name} <= loaded
    assert not HEAVY & {item.split(".")[0] for item in loaded}


@pytest.mark.slow
def test_the_process_of_a_stage_needs_no_torch(tiny_model, data):
    """Ranks and engines import torch in processes of their own. A stage that did so too would begin seconds later."""
    program = f"""
import sys
import posttrain.base.stage, posttrain.dpo.stage, posttrain.eval.stage, posttrain.filtering.stage, posttrain.rl.stage
from posttrain.rl.training.client import TrainerClient
from posttrain.sft.config import SftConfig
from posttrain.sft.stage import prepare
config = {{"model": {{"path": {str(tiny_model)!r}}}, "data": {{"path": {str(data)!r}}}}}
assert prepare(SftConfig.model_validate(config)).examples
print(*(name for name in ("torch", "trl", "vllm", "deepspeed") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_a_name_is_imported_once_and_then_cached(monkeypatch):
    package = type(sys)("offered")
    monkeypatch.setitem(sys.modules, "offered", package)
    monkeypatch.setitem(sys.modules, "offered.inner", type(sys)("offered.inner"))
    sys.modules["offered.inner"].answer = 42
    find, names = lazy_names("offered", {"inner": ["answer"]})
    assert "answer" in names()
    assert not hasattr(package, "answer")
    assert find("answer") == package.answer == 42


# ------------------------------------------------------------------ docs/python.md


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """The folder that the document's blocks start from."""
    (tmp_path / "policy").symlink_to(tiny_model)
    (tmp_path / "right.py").write_text(REWARD)
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for number in range(16):
            messages = [{"role": "user", "content": f"Sum: {number} + {number}"}]
            file.write(json.dumps({"messages": messages, "answer": str(2 * number), "capability": "math"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks() -> list[tuple[str, str]]:
    """(note, code) of each block of the document."""
    found = BLOCK.findall((ROOT / "docs" / "python.md").read_text())
    assert len(found) == (ROOT / "docs" / "python.md").read_text().count("```python")
    return found


def run_blocks(wanted) -> dict:
    names: dict = {}
    for note, code in blocks():
        if wanted(note):
            exec(compile(code, "docs/python.md", "exec"), names)
    return names


def test_blocks_that_need_no_engine(place):
    names = run_blocks(lambda note: not note)
    assert names["policy_logprobs"].grad.shape == (3,)
    assert len(posttrain.load_rows("hard.jsonl", kind="prompt")) == len(names["hard"]) == 4


def check_shared_run() -> None:
    """Run the blocks that need engines in the current folder, and look at what they leave."""
    names = run_blocks(lambda note: note and not note.startswith("not run"))
    result, trained = names["result"], names["trained"]
    assert (result.outputs["model"] / "model.safetensors").exists()
    assert result.outputs["rollouts"] == Path("runs/rl/rl/rollouts")
    rows = [
        row for path in sorted(result.outputs["rollouts"].glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert len(trained) == sum(row["status"] == "trained" for row in rows) == 2 * 4 * 8
    recorded = list(posttrain.read_rollouts(result.outputs["rollouts"]))
    assert [item.rollout.token_ids for item in recorded] == [tuple(row["token_ids"]) for row in rows]
    assert [item.reward for item in recorded] == [row["reward"] for row in rows]
    assert all(type(message) is Message for item in recorded for message in item.rollout.prompt.messages)
    assert msgspec.json.decode(msgspec.json.encode(trained[0]), type=type(trained[0])) == trained[0]
    assert names["rates"]["math"]["n"] == 16


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_blocks_that_share_a_run(place):
    """In a process of its own: a pipeline starts its own Ray, and other tests hold one in this process."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_python; test_python.check_shared_run()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_config_that_is_wrong_is_refused_before_anything_starts(place):
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        posttrain.run_stage("rl", {"model": {"path": "policy"}, "setps": 2}, "runs/rl")
    with pytest.raises(ConfigError, match="no such kind of stage; did you mean 'eval'"):
        posttrain.run_stage("evla", {}, "runs/x")
    with pytest.raises(ConfigError, match=r"absent\.yaml.*no such file"):
        posttrain.run_stage("sft", "absent.yaml")
    assert not (place / "runs").exists()


def test_a_folder_without_rollouts_is_refused(place):
    with pytest.raises(DataError, match="no rollouts"):
        list(posttrain.read_rollouts("runs/rl"))
    (place / "step_000000.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a whole parquet file"):
        list(posttrain.read_rollouts(place))
