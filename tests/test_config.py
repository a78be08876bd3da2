"""YAML and its strictness: every file of the repository under its own schema, and what a wrong one is told."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_leaves import find_leaves
from pydantic import BaseModel

from posttrain.config.base import (
    apply_overrides,
    dump_yaml,
    load_config,
    parse_yaml,
    read_yaml,
    sections_of,
    validate_config,
)
from posttrain.config.data import FilesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.errors import ConfigError
from posttrain.forecast.config import ClusterConfig, DeviceConfig
from posttrain.pipeline.config import PipelineConfig, read_pipeline
from posttrain.pipeline.inputs import walk
from posttrain.pipeline.kinds import KINDS, load_schema
from posttrain.planning.config import ModelShape
from posttrain.sft.config import SftConfig

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = sorted((ROOT / "pipelines").rglob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.yaml"))
DEVICES = sorted((ROOT / "configs" / "devices").glob("*.yaml"))
CLUSTERS = sorted((ROOT / "configs" / "scale").rglob("cluster.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(MODELS) - set(DEVICES) - set(CLUSTERS))
SFT = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "batch_tokens": 8192}


def kind_of(path: Path) -> str:
    """A config is named after its kind: sft.yaml, sft-lora.yaml."""
    return path.stem.split("-")[0].split("_")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_stage_file_fits_the_schema_of_its_kind(path: Path):
    assert kind_of(path) in KINDS, "name the file after the kind of its stage"
    load_config(load_schema(KINDS[kind_of(path)]), path)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_every_model_file_fits_the_schema_of_sizes(path: Path):
    load_config(ModelShape, path)


@pytest.mark.parametrize("path", [*DEVICES, *CLUSTERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_a_device_or_cluster_fits_its_schema(path: Path):
    load_config(ClusterConfig if path in CLUSTERS else DeviceConfig, path)


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_every_pipeline_and_the_files_it_names_fit_their_schemas(path: Path):
    raw = read_pipeline(path)
    assert raw.problems == []
    for stage in [*raw.stages, *([raw.evaluate] if raw.evaluate else [])]:
        validate_config(load_schema(KINDS[stage.kind]), stage.config, stage.file)


def datasets_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Key paths of the datasets of a schema, at any depth."""
    for name, info in schema.model_fields.items():
        for section in sections_of(info.annotation):
            if issubclass(section, FilesConfig):
                yield f"{prefix}{name}"
            else:
                yield from datasets_of(section, f"{prefix}{name}.")


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_table_matches_the_schemas(kind: str):
    """Every dataset field says what rows it holds, every plain path is a field, every schema exports."""
    schema = load_schema(KINDS[kind])
    exported = schema.model_json_schema()
    assert exported["type"] == "object"
    assert exported["additionalProperties"] is False
    assert set(datasets_of(schema)) == set(KINDS[kind].data)
    assert set(KINDS[kind].paths) <= {leaf.key for leaf in find_leaves(schema, {})}


SCALARS = {
    "1e-5": 1e-5, "1.5": 1.5, "0.1e+3": 100.0, "1.": 1.0, ".5": 0.5, "-.inf": float("-inf"), "1E3": 1000.0,
    "-3": -3, "+12": 12, "010": 10, "0o17": 15, "0x1F": 31, "true": True, "TRUE": True, "null": None, "~": None,
    "yes": "yes", "off": "off", "1:30": "1:30", "1_000": "1_000", "0b11": "0b11", "2024-01-01": "2024-01-01", "=": "=",
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str):
    value = parse_yaml(f"a: {text}", "x")["a"]
    assert (value, type(value)) == (SCALARS[text], type(SCALARS[text]))
    assert parse_yaml(dump_yaml({"value": value, "text": text}), "x") == {"value": value, "text": text}


def test_a_merge_key_is_refused_in_plain_words():
    with pytest.raises(ConfigError, match=r"line 2: YAML 1\.2 has no merge key `<<`; write the keys out"):
        parse_yaml("common: &c {epochs: 2}\n<<: *c", "x")


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("model: {path: ${sft.model}}", False),
        ("model: {path: ${oc.env:MODEL}}", True),
        ("model: {path: ${env:MODEL}}", True),
        ("model: {path: ${MODEL}}", True),
    ],
)
def test_a_reference_in_braces_must_be_quoted(text, variables):
    with pytest.raises(ConfigError, match="within braces or brackets a reference is quoted") as error:
        parse_yaml(text, "x")
    assert ("environment variables are not read" in str(error.value)) is variables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n\tpath: x\n", "line 2: a tab character; YAML is indented with spaces only"),
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' appears twice"),
        ("a: [1, 2\n", "line "),
        ("- 1\n- 2\n", "holds list, but must hold a mapping of keys to values"),
        ("", "is empty, but must hold a mapping of keys to values"),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ],
)
def test_the_error_about_wrong_yaml_names_the_place(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_all_problems_of_a_file_come_at_once():
    data = {**SFT, "optimiser": {}, "epochs": "three", "optimizer": {"learning_rat": 1.0, "beta1": 1.5}, "model": {}}
    with pytest.raises(ConfigError) as error:
        validate_config(SftConfig, data, "sft.yaml")
    text = str(error.value)
    assert "sft.yaml: optimiser: unknown key; did you mean 'optimizer'?" in text
    assert "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?" in text
    assert "epochs: got 'three'" in text
    assert "optimizer.beta1: got 1.5" in text
    assert "model.path: required, but not set" in text
    assert len(error.value.problems) == 5


def test_a_path_in_the_home_folder_is_found_and_an_environment_variable_is_refused(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = validate_config(SftConfig, {**SFT, "model": {"path": "~/m"}, "data": {"path": ["~/d", "~", "e~"]}}, "x")
    assert (config.model.path, config.data.path) == (f"{tmp_path}/m", [f"{tmp_path}/d", str(tmp_path), "e~"])
    with pytest.raises(ConfigError) as error:
        validate_config(SftConfig, {**SFT, "model": {"path": "$HOME/m"}, "data": {"path": "${HOME}.x"}}, "x")
    assert error.value.problems == [
        "model.path: got '$HOME/m': environment variables are not expanded here; write out what $HOME stands for"
    ]
    (tmp_path / "$5").mkdir()
    validate_config(SftConfig, {**SFT, "model": {"path": f"{tmp_path}/$5"}}, "x")


@pytest.mark.parametrize("value", ["1", 1.0, True, None])
def test_types_are_not_coerced(value: object):
    with pytest.raises(ConfigError):
        validate_config(SftConfig, {**SFT, "epochs": value}, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_learning_rate_is_a_positive_number(value: float):
    with pytest.raises(ConfigError):
        validate_config(SftConfig, {**SFT, "optimizer": {"learning_rate": value}}, "x")


def test_overrides_set_any_depth_and_leave_the_rest():
    data = {"a": {"b": 1, "c": 2}}
    changed = apply_overrides(data, ["a.b=1e-4", "d.e=[1, x]", "f=", "a.g={h: true}"])
    assert changed == {"a": {"b": 1e-4, "c": 2, "g": {"h": True}}, "d": {"e": [1, "x"]}, "f": ""}
    assert data == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("override", ["a", "=1", " =1"])
def test_an_override_has_a_key_and_a_value(override: str):
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        apply_overrides({}, [override])


def test_walk_finds_configs_in_lists_and_mappings():
    schema = load_schema(KINDS["eval"])
    config = schema.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "reward": {"name": "r"},
            "exclude": [{"path": "x"}, {"path": "y"}],
            "key_field": "key",
        }
    )
    found = {key: value for key, value in walk(config) if isinstance(value, FilesConfig | ServedModelConfig)}
    assert set(found) == {"model", "data", "exclude.0", "exclude.1"}


def test_a_configuration_cannot_change():
    config = validate_config(SftConfig, SFT, "x")
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 2


def test_the_schema_of_a_pipeline_exports():
    assert set(PipelineConfig.model_json_schema()["properties"]) == {
        "name",
        "seed",
        "warm_engines",
        "storage",
        "trackers",
        "stages",
        "evaluate",
    }


def test_a_config_error_crosses_from_one_process_to_another():
    error = pickle.loads(pickle.dumps(ConfigError("lora.rank", ["got 0", "got text"])))
    assert (type(error), error.source, error.problems) == (ConfigError, "lora.rank", ["got 0", "got text"])
    assert str(error) == "lora.rank: got 0\nlora.rank: got text"
