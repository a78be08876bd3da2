"""The templates in clusters/, each read by the tool that would run it, or by a schema where the tool is not here."""

import copy
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_schemas import RAY_JOB, SKYPILOT_TASK
from jsonschema import Draft202012Validator

from posttrain.cli.main import main

CLUSTERS = Path(__file__).resolve().parent.parent / "clusters"
SKYPILOT = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
KUBERAY = yaml.safe_load((CLUSTERS / "kuberay.yaml").read_text())


def bash_problems(script: str) -> str:
    """What bash has to say about the syntax of a script, without running it."""
    found = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    return found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [(CLUSTERS / "slurm.sh").read_text(), SKYPILOT["setup"], SKYPILOT["run"]], ids=["slurm", "setup", "run"]
)
def test_scripts_are_bash(script: str):
    assert bash_problems(script) == ""
    assert bash_problems(script + "\nif then") != ""


def test_ray_accepts_its_template():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTERS / "ray-up.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="upscaling_sped"):
        validate_config({**config, "upscaling_sped": 1.0})


def problems(schema: dict[str, Any], config: Any) -> list[str]:
    """What is wrong with a template, with the place."""
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(config)]


def changed(config: Any, value: Any, *keys: str | int) -> Any:
    """A copy of a template with another value at a place; None: without it."""
    made = copy.deepcopy(config)
    *way, last = keys
    holder = made
    for key in way:
        holder = holder[key]
    if value is None:
        del holder[last]
    else:
        holder[last] = value
    return made


@pytest.mark.parametrize(("schema", "config"), [(RAY_JOB, KUBERAY), (SKYPILOT_TASK, SKYPILOT)])
def test_templates_follow_the_schema_of_their_tool(schema: dict[str, Any], config: Any):
    Draft202012Validator.check_schema(schema)
    assert problems(schema, config) == []


WORKERS = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
OF_HEAD = ("spec", "rayClusterSpec", "headGroupSpec")


@pytest.mark.parametrize(
    ("value", "keys", "problem"),
    [
        (8, (*OF_HEAD, "rayStartParams", "num-cpus"), "'num-cpus']: 8 is not of type 'string'"),
        ("SideCar", ("spec", "submissionMode"), "spec.submissionMode: 'SideCar' is not one of"),
        (True, ("spec", "shutdownAfterJobFinish"), "('shutdownAfterJobFinish' was unexpected)"),
        (None, (*WORKERS, "maxReplicas"), "'maxReplicas' is a required property"),
        (-1, (*WORKERS, "replicas"), "replicas: -1 is less than the minimum"),
        ("8 GB", (*WORKERS, "template", "spec", "containers", 0, "resources", "limits", "memory"), "'8 GB' does not"),
        ("Gpus", (*WORKERS, "groupName"), "groupName: 'Gpus' does not match"),
        ("ray.io/v1alpha1", ("apiVersion",), "apiVersion: 'ray.io/v1' was expected"),
    ],
)
def test_a_wrong_rayjob_is_found(value: Any, keys: tuple[str | int, ...], problem: str):
    [found] = problems(RAY_JOB, changed(KUBERAY, value, *keys))
    assert problem in found


@pytest.mark.parametrize(
    ("value", "keys", "problem"),
    [
        ("four", ("num_nodes",), "num_nodes: 'four' is not of type 'integer'"),
        ("x", ("envs", "MY-NAME"), "'MY-NAME' does not match any of the regexes"),
        ("x", ("setups",), "('setups' was unexpected)"),
        ({"H200": 8, "H100": 8}, ("resources", "accelerators"), "is not of type 'string'"),
    ],
)
def test_a_wrong_task_of_skypilot_is_found(value: Any, keys: tuple[str | int, ...], problem: str):
    [found] = problems(SKYPILOT_TASK, changed(SKYPILOT, value, *keys))
    assert problem in found


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_every_node_of_every_template_asks_for_the_token():
    assert "export RAY_AUTH_MODE=token" in (CLUSTERS / "slurm.sh").read_text()
    assert "export RAY_AUTH_MODE=token" in SKYPILOT["run"]
    assert KUBERAY["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    config = yaml.safe_load((CLUSTERS / "ray-up.yaml").read_text())
    starts = [line for line in strings(config) if "ray start" in line]
    assert len(starts) == 2
    assert all(line.startswith("RAY_AUTH_MODE=token ray start") for line in starts)


def test_the_command_of_the_rayjob_is_one_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = shlex.split(KUBERAY["spec"]["entrypoint"])
    assert words[0] == "posttrain"
    assert main([*words[1:], "--dry-run"]) == 2
    assert "/etc/posttrain/pipeline.yaml: no such file" in capsys.readouterr().err  # all options were understood


def test_the_options_of_ray_in_the_templates_exist():
    from ray.scripts.scripts import cli

    known = {option for parameter in cli.commands["symmetric-run"].params for option in parameter.opts}
    for script in ((CLUSTERS / "slurm.sh").read_text(), SKYPILOT["run"]):
        given = re.search(r"symmetric-run (.*?) -- ", script.replace("\\\n", ""))
        assert given is not None
        assert {word for word in given[1].split() if word.startswith("--")} <= known
