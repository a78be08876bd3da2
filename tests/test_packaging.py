"""The wheel holds all that a checkout holds, and works without the checkout."""

import configparser
import email.message
import json
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
# The folders at the top of the checkout, and where they lie in the wheel.
SHIPPED = {
    "posttrain": "posttrain",
    "rewards": "posttrain/rewards",
    "pipelines": "posttrain/pipelines",
    "configs": "posttrain/configs",
}


@pytest.fixture(scope="module")
def names(built_wheel: Path) -> set[str]:
    with zipfile.ZipFile(built_wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(built_wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(built_wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@pytest.mark.parametrize("folder", SHIPPED)
def test_every_file_is_in_the_wheel(folder: str, names: set[str]) -> None:
    wanted = {
        f"{SHIPPED[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted
    assert wanted <= names, (
        f"not in the wheel: {sorted(wanted - names)}; add the suffix to package-data in pyproject.toml"
    )


def test_nothing_else_is_in_the_wheel(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"posttrain", "posttrain-0.1.0.dist-info"}


def test_every_python_folder_is_a_package() -> None:
    """Without an __init__.py a folder is a namespace: another distribution could add to it or hide it."""
    for folder in SHIPPED:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


TRACKERS = ("tensorboard", "trackio", "wandb")


def test_metadata_names_extras_python_and_licence(metadata: email.message.Message, names: set[str]) -> None:
    assert set(metadata.get_all("Provides-Extra", [])) == {"cpu", "gpu", "dev", *TRACKERS}
    requirements = metadata.get_all("Requires-Dist", [])
    assert not any(line.startswith("vllm") and "extra" not in line for line in requirements)
    assert any(line.startswith("torch==") for line in requirements)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_installer_takes_the_same_pythons(metadata: email.message.Message) -> None:
    source = (ROOT / "scripts" / "install.py").read_text()
    assert "OLDEST_PYTHON, FIRST_TOO_NEW = (3, 11), (3, 14)" in source
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    classifiers = metadata.get_all("Classifier", [])
    assert [line[-4:] for line in classifiers if "Python :: 3." in line] == ["3.11", "3.12", "3.13"]


def test_versions_agree(metadata: email.message.Message) -> None:
    import posttrain

    assert metadata["Version"] == posttrain.__version__


def test_constraints_hold_every_pinned_version() -> None:
    """The tested set and the pins cannot drift apart. torch and the GPU engine are not in it: they vary by machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = [*project["dependencies"], *extras["cpu"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    for pin in pins:
        name, version = pin.split("==")
        if name != "torch":
            assert f"{name.split('[')[0]}=={version}".lower().replace("_", "-") in lines, pin


def test_entry_points_resolve_in_the_wheel(built_wheel: Path, installed_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built_wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment]
        parser.read_string(archive.read(name).decode())
    assert dict(parser["console_scripts"]) == {"posttrain": "posttrain.cli.main:main"}
    code = (
        "from importlib.metadata import distribution\n"
        "for entry in distribution('posttrain').entry_points:\n"
        "    assert callable(entry.load()), entry\n"
        "    print(entry.group, entry.name)\n"
    )
    printed = run_in_wheel(installed_wheel, tmp_path, code)
    assert {f"posttrain.rewards {name}" for name in parser["posttrain.rewards"]} <= set(printed.splitlines())


def test_bundled_files_are_found_in_the_wheel(installed_wheel: Path, tmp_path: Path) -> None:
    """The same names as in the checkout, in the environment of the wheel and not in the checkout."""
    from posttrain.resources import bundled_dir, bundled_names

    code = (
        "import json, posttrain.resources as r\n"
        "print(json.dumps({k: [str(r.bundled_dir(k)), r.bundled_names(k)] for k in ('pipelines', 'configs')}))\n"
    )
    found = json.loads(run_in_wheel(installed_wheel, tmp_path, code))
    for kind in ("pipelines", "configs"):
        folder, listed = found[kind]
        assert listed == bundled_names(kind)
        assert Path(folder).is_relative_to(installed_wheel.parent.parent)
        assert bundled_dir(kind) == ROOT / kind


def test_command_runs_from_an_empty_folder(installed_wheel: Path, tmp_path: Path) -> None:
    done = subprocess.run([installed_wheel, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("run", "filter", "sft", "rl", "dpo", "eval", "doctor", "validate"):
        assert command in done.stdout
    assert not list(tmp_path.iterdir())


def run_in_wheel(installed_wheel: Path, folder: Path, code: str) -> str:
    """What a program prints under the wheel's Python, started in an empty folder."""
    python = installed_wheel.parent / "python"
    done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_vllm_the_core_says_what_is_missing(built_wheel: Path, tmp_path: Path) -> None:
    """A real environment that holds everything but vLLM: one line, before anything starts."""
    import sys
    import sysconfig
    import venv

    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site_packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if (
            not entry.name.startswith(("vllm", "posttrain", "__editable__"))
            and not (site_packages / entry.name).exists()
        ):
            (site_packages / entry.name).symlink_to(entry)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, str(built_wheel)], check=True, capture_output=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [str(python.with_name("posttrain")), "run", "quickstart"], cwd=empty, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "vllm" in said.lower()
    assert "pip install" in said
    assert "Traceback" not in said
    assert not list(empty.rglob("DONE"))
