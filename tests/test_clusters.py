"""The templates in clusters/, each read by the tool that would run it, as far as the tool is here."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

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
