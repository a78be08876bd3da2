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
from posttrain.cli.hints import key_paths
from posttrain.cli.main import main
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
