"""The first files of a new user, checked with `posttrain validate`: the shortest YAML of each stage, and common
mistakes. Each mistake gives one message that says what to do.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rollout_records import one_turn

from posttrain.base.tokenizer import build_tokenizer
from posttrain.cli.main import main
from posttrain.config.base import key_paths
from posttrain.data.rows import load_rows
from posttrain.pipeline.kinds import KINDS, load_schema
from posttrain.records import VersionSpan
from posttrain.scoring.plugins.lookup import load_reward

ROWS = {
    "train.jsonl": [{"prompt": "2 + 2?", "completion": "4", "capability": "math"}] * 3,
    "prompts.jsonl": [{"prompt": "2 + 2?", "answer": "4", "capability": "math"}] * 3,
    "pairs.jsonl": [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}],
}
MODEL = {"model_type": "llama", "max_position_embeddings": 2048, "vocab_size": 495}
MATH = {"name": "math"}
# Model and data, and the reward where replies are scored.
SHORTEST: dict[str, dict[str, Any]] = {
    "base": {},
    "filter": {"judge": {"path": "model"}, "data": {"path": "train.jsonl"}},
    "sft": {"model": {"path": "model"}, "data": {"path": "train.jsonl"}},
    "rl": {"model": {"path": "model"}, "prompts": {"path": "prompts.jsonl"}, "reward": MATH},
    "dpo": {"model": {"path": "model"}, "pairs": {"path": "pairs.jsonl"}},
    "eval": {"model": {"path": "model"}, "data": {"path": "prompts.jsonl"}, "reward": MATH},
}
REWARDS = """
def trl(prompts, completions, answer, **kwargs):
    return [1.0 for _ in completions]


def trl_short(completions, **kwargs):
    return [1.0 for _ in completions]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, rows in ROWS.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, config in SHORTEST.items():
        Path(f"{kind}.yaml").write_text(yaml.safe_dump(config))
    Path("rw.py").write_text(REWARDS)
    model_folder("model")
    return tmp_path


def model_folder(path: str, header: bytes = b"{}", content: bytes = b"", **config: Any) -> None:
    build_tokenizer().save_pretrained(path)
    Path(path, "config.json").write_text(json.dumps({**MODEL, **config}))
    Path(path, "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content)


def validate(kind: str, *overrides: str) -> int:
    return main(["validate", f"{kind}.yaml", *overrides, "--kind", kind])


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_shortest_file_of_a_stage_is_valid(kind: str, capsys: pytest.CaptureFixture[str]):
    assert validate(kind) == 0, capsys.readouterr().err
    assert f"{kind} ({kind})  [run: new]" in capsys.readouterr().out


ONE_TENSOR = b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
DAMAGED = {
    "cut": (ONE_TENSOR, b"\0" * 9),
    "longer": (ONE_TENSOR, b"\0" * 17),
    "not json": (b"{{}}", b""),
    "no offsets": (b'{"w": {"dtype": "F32"}}', b""),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights_are_found_by_their_header(damage: str, capsys: pytest.CaptureFixture[str]):
    model_folder("whole", ONE_TENSOR, b"\0" * 16)
    model_folder("damaged", *DAMAGED[damage])
    assert validate("eval", "model.path=whole") == 0
    capsys.readouterr()
    assert validate("eval", "model.path=damaged") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.path: got 'damaged': this folder has model.safetensors, which cannot be read as safetensors: " in line
    assert "copy or download it again" in line


def test_a_header_longer_than_the_file_is_refused(capsys: pytest.CaptureFixture[str]):
    Path("model", "model.safetensors").write_bytes(b"\xff" * 12)
    assert validate("eval") == 2
    assert "its header would end after the file's 12 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensor", "dtype"), [("q.weight", "F8_E4M3"), ("q.qweight", "I32"), ("q.weight_scale_inv", "F32"), ("q", "F4")]
)
def test_quantized_weights_are_known_by_their_tensors_too(tensor: str, dtype: str, capsys: pytest.CaptureFixture[str]):
    header = json.dumps({tensor: {"dtype": dtype, "shape": [4], "data_offsets": [0, 16]}}).encode()
    Path("model", "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert validate("eval") == 0
    assert validate("sft") == 2
    assert f"its weights are quantized ({tensor} in model.safetensors is {dtype})" in capsys.readouterr().err


def test_a_model_that_lacks_a_part_of_its_weights_is_refused(capsys: pytest.CaptureFixture[str]):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    Path("model", "model.safetensors").rename(Path("model", "model-00001-of-00002.safetensors"))
    path = Path("model", "model.safetensors.index.json")
    path.write_text(json.dumps(index))
    assert validate("eval") == 2
    assert "this folder lacks model-00002-of-00002.safetensors, which model.safet" in capsys.readouterr().err
    path.write_text('{"weight_map": ')
    assert validate("eval") == 2
    assert "model.safetensors.index.json, which cannot be read as an index of weights" in capsys.readouterr().err


def test_quantized_weights_are_served_and_not_trained(capsys: pytest.CaptureFixture[str]):
    model_folder("small", quantization_config={"quant_method": "gptq", "bits": 4})
    assert validate("eval", "model.path=small") == 0
    for kind in ("sft", "rl", "dpo"):
        capsys.readouterr()
        assert validate(kind, "model.path=small") == 2
        assert "its weights are quantized (gptq; quantization_config in config.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "sft",
            ["model.path=Qwen/Qwen2.5-0.5B-Instruct"],
            "no such folder; models are not downloaded by name: hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir "
            "models/Qwen2.5-0.5B-Instruct, then give models/Qwen2.5-0.5B-Instruct\n",
        ),
        ("sft", ["model.path=nowhere"], "got 'nowhere': no such folder\n"),
        (
            "sft",
            ["model.path=${oc.env:MODEL}"],
            "must have the form ${stage.output}; environment variables are not read",
        ),
        ("rl", ["engine.max_model_len=4096"], "got 4096: the model in 'model' can hold 2048 tokens"),
        ("rl", ["mixture={coding: 1}"], "mixture.coding: no prompt has this capability; there are: math\n"),
        (
            "rl",
            ["reward.name=rw.py:trl"],
            "it has the parameters of a reward for TRL; wrap it: def reward(rollout, row): return "
            "trl(prompts=[row.messages], completions=[rollout.text], answer=[row.answer])[0]\n",
        ),
        ("eval", ["reward.name=rw.py:trl_short"], "return trl_short(completions=[rollout.text])[0]\n"),
        (
            "rl",
            ["reward.name=rw.py:verl"],
            "it has the parameters of a reward for verl; wrap it: def reward(rollout, row): return "
            "verl(data_source=row.capability, solution_str=rollout.text, ground_truth=row.answer)\n",
        ),
    ],
)
def test_a_usual_mistake_is_one_message_with_the_way_out(
    kind: str, overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
):
    assert validate(kind, *overrides) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


def test_a_mixture_is_left_to_the_stage_where_not_all_rows_are_read():
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["prompts.jsonl"] * 40))
    assert validate("rl", "mixture={coding: 1}") == 0


def test_a_learning_rate_that_diverges_is_doubted(capsys: pytest.CaptureFixture[str]):
    for kind in ("sft", "rl", "dpo"):
        assert validate(kind, "optimizer.learning_rate=1000") == 0
        assert "doubtful  optimizer.learning_rate: got 1000; " in capsys.readouterr().out
        assert validate(kind, "optimizer.learning_rate=1e-3") == 0
        assert "doubtful" not in capsys.readouterr().out


def test_rollouts_longer_than_a_micro_batch_are_doubted(capsys: pytest.CaptureFixture[str]):
    for tokens, is_doubted in ((128, True), (192, False)):
        assert validate("rl", "engine.max_model_len=192", f"micro_batch_tokens={tokens}", "sampling.max_tokens=64") == 0
        said = f"doubtful  micro_batch_tokens: got {tokens}; a rollout may have 192 tokens (engine.max_model_len)"
        assert (said in capsys.readouterr().out) == is_doubted


# ------------------------------------------------------------------ docs/coming-from.md

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "coming-from.md").read_text()
NOT_KEYS = {"top_k", "weighted_sum"}  # a setting that is refused, and a reward


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_key_that_the_page_gives_for_another_tools_exists():
    sections = PAGE.split("\n## ")
    tables = [part for part in sections if part.startswith(("Supervised", "RL"))]
    cells = [line.split("|")[-2] for part in tables for line in part.splitlines() if line.startswith("| ")]
    named = {key for cell in cells for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:: [^`]*)?`", cell)} - NOT_KEYS
    known = [f".{key}" for kind in ("sft", "dpo", "rl") for key in key_paths(load_schema(KINDS[kind]))]
    assert len(named) > 30
    assert [name for name in sorted(named) if not any(key.endswith(f".{name}") for key in known)] == []


def test_the_pages_example_and_its_wrapped_rewards_work(folder: Path, capsys: pytest.CaptureFixture[str]):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
    }
    Path("gsm8k").mkdir()
    pq.write_table(pa.Table.from_pylist([row] * 3), "gsm8k/train.parquet")
    convert, wrap, _ = blocks("python")
    exec(compile(convert, "docs/coming-from.md", "exec"), {})
    Path("theirs.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(ground_truth in solution_str)\n\n\n"
        "def format_reward(completions, **kwargs):\n    return [len(turns[0]['content']) for turns in completions]\n"
    )
    Path("my_rewards.py").write_text(wrap + "\n\ndef accuracy(rollout, row):\n    return rollout.text == row.answer\n")
    Path("models").mkdir()
    model_folder("models/qwen")
    Path("rl.yaml").write_text(blocks("yaml")[0])
    rows = load_rows("prompts.jsonl", kind="prompt")
    reply = one_turn(rows[0].id, "g", 0, (5,), (6,), "it is 4", (-0.1,), (VersionSpan(0, 0, 1),), "stop")
    for name, value in (("from_trl", 7), ("from_verl", 1.0)):
        assert validate("rl", f"reward.name=my_rewards.py:{name}") == 0, capsys.readouterr().err
        assert load_reward(f"my_rewards.py:{name}")(reply, rows[0]) == value


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "target": "b"}, "columns: {prompt: question, completion: target}"),
        ({"Prompt": "a", "Response": "b"}, "columns: {prompt: Prompt, completion: Response}"),
        ({"dialogue": [{"role": "user", "content": "a"}]}, "columns: {messages: dialogue}"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "completion and response: a row has one reply"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "no 'value': a turn has 'from' and 'value'"),
        ({"messages": {"0": "a"}}, "messages: got {'0': 'a'}: must be a list of at least one message"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "rows of tokens cannot be read; give the text"),
        ([{"prompt": "a"}], "if the file is one JSON list, name it .json"),
    ],
)
def test_a_row_of_another_shape_says_how_it_is_named_here(row: Any, message: str, capsys) -> None:
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["data", "inspect", "rows.jsonl", "--kind", "supervised"]) == 2
    shown = capsys.readouterr()
    assert message in shown.out + shown.err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.csv", "prompt;completion\na;b\n", "the header is divided by ';'; columns of CSV are divided by commas"),
        ("rows.csv", "prompt,prompt\na,b\n", "two columns of the header are named 'prompt'"),
        ("rows.json", '{"version": 1, "data": [{"prompt": "a"}]}', "write the list under 'data' alone"),
        ("rows.json", '[{"prompt": "a", "completion": "b"}] x', "not JSON: Extra data: line 1 column 38"),
        ("rows.json", '[{"prompt": "a", "completion": "b"}\n {"prompt": "c"}]', "line 2 column 2"),
        ("rows.json", '[{"prompt": "a", "completion": "b"},\n\n{"prompt": "c]', "line 3 column 12"),
        ("rows.jsonl", '[\n {"prompt": "a"}\n]\n', "if the file is one JSON list, name it .json"),
        ("rows.jsonl", "", "holds no rows; at least one is needed"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b", "tools": "none"}\n', "row 'rows.jsonl:1': tools: "),
    ],
)
def test_a_file_of_another_shape_says_what_to_change(name: str, text: str, message: str, capsys) -> None:
    Path(name).write_text(text)
    assert main(["data", "inspect", name, "--kind", "supervised"]) == 2
    shown = capsys.readouterr()
    assert message in shown.out + shown.err


def test_a_bad_item_of_a_json_list_is_one_bad_row(capsys) -> None:
    """The others are read, as in JSON lines."""
    rows = (
        '[{"prompt": "a", "completion": "b"}, {"prompt": "\\ud800", "completion": "b"}, {"prompt": "c", "x": 1e999}, 5]'
    )
    Path("rows.json").write_text(rows)
    assert main(["data", "inspect", "rows.json", "--kind", "supervised"]) == 2
    shown = capsys.readouterr().out
    assert "1 supervised rows, 3 bad" in shown
    assert "row 2: prompt: character 1 is half of a surrogate pair" in shown
    assert "row 3: x: got inf, which JSON cannot hold" in shown
    assert "row 4: holds int" in shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model": "model"}, "model: got 'model': must be a section of keys, such as {path: model}"),
        ({"data": ["train.jsonl"]}, "data: got ['train.jsonl']: must be a section of keys; its keys: path,"),
        ({"model": {"path": "model", "chat_template": "chatml"}}, "such as {builtin: chatml}"),
        ({"optimizer": 1e-5}, "optimizer: got 1e-05: must be a section of keys; its keys: learning_rate,"),
        ({"packing": "no"}, "packing: got 'no': must be true or false (yes, no, on and off are text in YAML 1.2)"),
        ({"lr": 1e-5}, "lr: unknown key; use optimizer.learning_rate"),
        ({"schedule": "constant"}, "schedule: unknown key; did you mean 'optimizer.schedule'?"),
        ({"bf16": True}, "bf16: unknown key; use model.dtype"),
        ({"output_dir": "x"}, "output_dir: unknown key; it is an option of the command: --run-dir FOLDER"),
        ({"max_seq_length": 9}, "max_seq_length: unknown key; use max_length"),
        ({"data": {"path": "$HOME/x"}}, "environment variables are not expanded here"),
    ],
)
def test_keys_of_other_tools_and_values_in_place_of_sections(extra: dict[str, Any], message: str, capsys) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({**SHORTEST["sft"], **extra}))
    assert main(["sft", "mine.yaml", "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sft", "train.jsonl"], "train.jsonl: is a file of rows; give the YAML file of a config"),
        (["sft", "."], ".: is a folder; give the YAML file of a config"),
        (["data", "convert", "train.jsonl", "train.jsonl"], "train.jsonl: is one of the files that are read"),
        (["data", "dedup", "train.jsonl", "--out", "x.jsonl", "--removed", "train.jsonl"], "is one of the files"),
    ],
)
def test_a_command_names_the_wrong_file_and_leaves_it_as_it_was(command: list[str], message: str, capsys) -> None:
    before = Path("train.jsonl").read_text()
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert Path("train.jsonl").read_text() == before


def test_the_version_is_printed(capsys) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"posttrain \d+\.\d+\.\d+\n", capsys.readouterr().out)
