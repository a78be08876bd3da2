"""The whole recipe, from the built wheel, in an empty directory: a reduced quick start, then one's own data and reward.

Everything is real and only smaller: fewer steps of base training and RL, fewer prompts evaluated.
"""

import json
import os
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from posttrain.data.messages import messages_to_json
from posttrain.data.pairs import load_pairs
from posttrain.files import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REDUCED = [
    "base.steps=200",
    "rl.steps=5",
    "rl.groups_per_step=16",
    "evaluate.pass_k_limit=20",
]
CAPABILITIES = {"math", "coding", "reasoning", "instruction_following"}


def call(posttrain: Path, folder: Path, *words: str, expect: int = 0, timeout: float = 600) -> str:
    environment = {**os.environ, "POSTTRAIN_CACHE": str(folder.parent / "cache"), "COLUMNS": "200"}
    done = subprocess.run(
        [str(posttrain), *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user") / "empty"


@pytest.fixture(scope="module")
def run(installed_wheel: Path, empty: Path) -> Path:
    empty.mkdir()
    said = call(installed_wheel, empty, "run", "quickstart", *REDUCED)
    assert said.rstrip().endswith("report.html")
    return empty / "runs" / "quickstart"


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_stages_train_on_deepspeed_engines(summary):
    stats = {stage["name"]: stage["stats"] for stage in summary["stages"]}
    layouts = {"sft": (2, 2), "rl": (1, 1), "dpo": (1, 1)}
    for name, layout in layouts.items():
        assert stats[name]["engine"] == "DeepSpeedEngine"
        assert (stats[name]["processes"], stats[name]["expert"]) == layout


def test_every_stage_is_done_and_measured(run, summary):
    assert summary["status"] == "done"
    stages = {stage["name"]: stage for stage in summary["stages"]}
    assert {"base", "filter", "sft", "rl", "dpo"} <= stages.keys()
    assert all(stage["status"] == "done" and stage["wall_s"] > 0 for stage in stages.values())
    assert {"torch", "vllm", "ray", "trl", "transformers", "python"} <= {
        name.removesuffix("-cpu") for name in summary["versions"]
    }
    assert summary["peak_rss_gib"] < 12
    assert set(summary["eval"]) == {"base", "sft", "rl", "dpo"}
    for results in summary["eval"].values():
        assert set(results) >= CAPABILITIES | {"all"}
        for figures in (results[name] for name in (*CAPABILITIES, "all")):
            low, high = figures["greedy_ci95"]
            assert 0 <= low <= figures["greedy"] <= high <= 1
            assert 0 <= figures["pass@1"] <= figures["pass@k"] <= 1
            assert figures["unscored"] == 0
        assert results["all"]["n"] == 400
    assert summary["eval"]["base"]["all"]["greedy"] > 0.1  # 200 steps teach something already


def test_models_load_in_transformers(run):
    from transformers import AutoTokenizer, Llama4ForCausalLM

    for stage in ("base", "sft", "rl", "dpo"):
        model = Llama4ForCausalLM.from_pretrained(run / stage / "model")
        assert model.config.architectures == ["Llama4ForCausalLM"]
        assert AutoTokenizer.from_pretrained(run / stage / "model").chat_template
        assert (run / stage / "DONE").exists()


def test_filter_keeps_exactly_the_harder_half(run):
    kept, dropped = (list(read_jsonl(run / "filter" / name)) for name in ("kept.jsonl", "dropped.jsonl"))
    assert len(kept) == len(dropped) == 600
    for capability in CAPABILITIES:
        hardest_dropped = max(row["difficulty"]["score"] for row in dropped if row["capability"] == capability)
        easiest_kept = min(row["difficulty"]["score"] for row in kept if row["capability"] == capability)
        assert easiest_kept >= hardest_dropped


def test_rl_was_asynchronous_mixed_and_bounded(run):
    metrics = list(read_jsonl(run / "rl" / "metrics.jsonl"))
    assert [line["step"] for line in metrics] == list(range(5))
    assert max(line["staleness_max"] for line in metrics) <= 3
    assert max(line["staleness_max"] for line in metrics) >= 1  # generation ran ahead of training
    rollouts = [
        row for path in sorted((run / "rl" / "rollouts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    trained = [row for row in rollouts if row["status"] == "trained"]
    assert len(trained) == 5 * 16 * 8
    assert len({json.loads(row["prompt"])[0]["content"] for row in trained if "system" in row["prompt"]}) > 1
    # The first group of each prompt tells how hard it is: those that were trained on, and those that taught nothing.
    difficulty = pq.read_table(run / "rl" / "difficulty.parquet").to_pylist()
    assert {row["prompt_id"] for row in trained} <= {row["prompt_id"] for row in difficulty}
    assert {row["n"] for row in difficulty} <= {2, 8}  # sampled at once, or begun with two replies
    # Every capability has its place in a batch, and no batch held one alone.
    shares = Counter(row["capability"] for row in read_jsonl(run / "base" / "data" / "prompts.jsonl"))
    expected = {name for name, count in shares.items() if count / shares.total() >= 2 / 16}
    assert expected == CAPABILITIES
    mixed = [{key for key in line if key.startswith("reward/")} for line in metrics]
    assert {f"reward/{name}" for name in expected} <= set().union(*mixed)
    assert all(len(capabilities) >= 2 for capabilities in mixed)
    busy = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "busy" and event["stage"] == "rl"]
    assert {event["what"] for event in busy} >= {"generate", "train", "update_weights"}
    training = [(e["start"], e["end"]) for e in busy if e["what"] == "train"]
    generating = [(e["start"], e["end"]) for e in busy if e["what"] == "generate"]
    assert any(a < d and c < b for a, b in training for c, d in generating)


def test_dpo_pairs_prefer_the_right_reply(run):
    pairs = load_pairs(run / "dpo" / "pairs.jsonl")
    assert pairs
    rewards = defaultdict(set)  # of each reply to each prompt: equal texts may have ended in different ways
    for path in (run / "rl" / "rollouts").glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            rewards[json.dumps(json.loads(row["prompt"])), row["reply"].strip()].add(row["reward"])
    for pair in pairs:
        prompt = json.dumps(messages_to_json(pair.prompt))
        assert pair.fields["chosen_reward"] in rewards[prompt, pair.chosen]
        assert pair.fields["rejected_reward"] in rewards[prompt, pair.rejected]
        assert pair.fields["chosen_reward"] > (pair.fields["rejected_reward"] or 0)


def test_report_is_one_self_contained_page(run):
    page = (run / "report.html").read_text()
    assert len(page) > 100_000
    assert not re.search(r"""<(script|img|link|iframe|source)\b[^>]*\b(src|href)=["']?https?:""", page)


def test_nothing_is_left_running(run):
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(run.parent.parent) in " ".join(process.info["cmdline"] or [])
    ]
    _, alive = psutil.wait_procs(left, timeout=10)  # those that are just ending
    assert [process.info["cmdline"] for process in alive] == []


def test_second_run_skips_what_is_done(run, installed_wheel, empty):
    said = call(installed_wheel, empty, "run", "quickstart", *REDUCED)
    whole = json.loads((run / "summary.json").read_text())
    assert {stage["status"] for stage in whole["stages"]} == {"skipped"}, said
    assert whole["eval"].keys() == {"base", "sft", "rl", "dpo"}
    planned = call(installed_wheel, empty, "run", "quickstart", *REDUCED, "dpo.beta=0.2", "--dry-run")
    changed = {line.split()[0] for line in planned.splitlines() if "[run" in line}
    assert changed == {"dpo", "dpo.eval"}, planned
    refused = call(installed_wheel, empty, "run", "quickstart", *REDUCED, "dpo.beta=0.2", expect=2)
    assert "dpo, a finished result: beta: 0.1 → 0.2" in refused
    assert "dpo.eval, a finished result: stage dpo runs anew" in refused
    assert (run / "dpo" / "DONE").exists()


@pytest.mark.full  # test_pipeline_run.py runs a changed stage again, and its evaluation
def test_only_a_changed_stage_is_run_again(run, installed_wheel, empty):
    call(installed_wheel, empty, "run", "quickstart", *REDUCED, "dpo.beta=0.2", "--overwrite")
    whole = json.loads((run / "summary.json").read_text())
    status = {stage["name"]: stage["status"] for stage in whole["stages"] + whole["evaluations"]}
    assert {name for name, value in status.items() if value == "done"} == {"dpo", "dpo.eval"}


# ------------------------------------------------------------------ one's own data, one stage at a time

REWARD = '''
def right(rollout, row):
    """1 if the reply ends its turn with the right answer."""
    return float(rollout.finish_reason == "stop" and rollout.text.split("Answer:")[-1].strip() == row.answer)
'''
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def readme_block(language: str) -> str:
    """The README's first block of code in a language."""
    return README.split(f"```{language}\n")[1].split("```")[0]


# Nothing here says how large an engine's cache is, or how long its sequences are, as in a user's first file.


@pytest.fixture(scope="module")
def own(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory with a user's model, rows and reward."""
    folder = tmp_path_factory.mktemp("own") / "work"
    folder.mkdir()
    for name in ("policy", "my-model"):
        (folder / name).symlink_to(run / "base" / "model")
    (folder / "brevity.py").write_text(readme_block("python"))
    (folder / "right.py").write_text(REWARD)
    rows = [(a, b) for a in range(2, 8) for b in range(2, 8)]
    with (folder / "prompts.jsonl").open("w") as prompts, (folder / "train.jsonl").open("w") as train:
        for a, b in rows:
            ask = {"role": "user", "content": f"Sum: {a} + {b}"}
            prompts.write(json.dumps({"messages": [ask], "answer": str(a + b), "capability": "math"}) + "\n")
            reply = {"role": "assistant", "content": f"Answer: {a + b}"}
            train.write(json.dumps({"messages": [ask, reply], "capability": "math"}) + "\n")
    return folder


CONFIGS = {
    "filter": "judge: {path: policy, dtype: float32}\ndata: {path: train.jsonl}\nkeep_fraction: 0.5\n"
    'template: "Rate: {prompt}"\n',
    "sft": 'model: {path: policy, dtype: float32}\ndata: {path: "${filter.kept}"}\nepochs: 1\n'
    "max_length: 192\nbatch_tokens: 512\noptimizer: {learning_rate: 1e-4}\n",
    "rl": readme_block("yaml"),
    "dpo": "model: {path: policy, dtype: float32}\nrollouts: runs/rl/rl/rollouts\nmax_length: 192\n"
    "optimizer: {learning_rate: 1e-5}\n",
    "eval": "model: {path: runs/rl/rl/model, dtype: float32}\ndata: {path: prompts.jsonl}\n"
    "reward: {name: right.py:right}\nsampling: {max_tokens: 48}\nsamples: 4\nk: 4\n",
}
PIPELINE = """name: own
warm_engines: true
stages:
  - {name: filter, kind: filter, config: filter.yaml}
  - {name: sft, kind: sft, config: sft.yaml}
  - {name: dpo, kind: dpo, config: dpo.yaml}
  - {name: eval, kind: eval, config: eval.yaml}
"""


def test_stages_over_ones_own_data(own, installed_wheel):
    """RL by its own command, as in the README, and a pipeline of the others, two of which use what RL has made."""
    for kind, text in CONFIGS.items():
        (own / f"{kind}.yaml").write_text(text)
        assert len(text.splitlines()) <= 12
    (own / "own.yaml").write_text(PIPELINE)
    # Fewer steps, for time; the README changes a key in this way too.
    call(installed_wheel, own, "rl", "rl.yaml", "steps=3", "groups_per_step=8")
    call(installed_wheel, own, "run", "own.yaml")
    kept = list(read_jsonl(own / "runs/own/filter/kept.jsonl"))
    assert len(kept) == 18
    assert len(list(read_jsonl(own / "runs/rl/rl/metrics.jsonl"))) == 3
    results = json.loads((own / "runs/own/eval/results.json").read_text())
    assert results["math"]["n"] == results["all"]["n"] == 36
    assert all((own / f"runs/{run}/model/model.safetensors").exists() for run in ("own/sft", "rl/rl", "own/dpo"))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("sft", ["data.path=absent.jsonl"], ["absent.jsonl"]),
        ("sft", ["optimizer.lerning_rate=1"], ["optimizer.lerning_rate", "did you mean 'learning_rate'"]),
        ("rl", ["reward.name=mth"], ["mth", "math"]),
        ("rl", ["reward.name=broken.py:right"], ["broken.py:1: syntax error"]),
        ("rl", ["profile.band=[0.9,0.1]"], ["profile.band", "lowest <= highest"]),
        ("eval", ["data.path=row37.jsonl"], ["row 37", "messages"]),
        ("eval", ["data.path=nothing.jsonl"], ["nothing.jsonl", "holds no rows"]),
        ("eval", ["model.path=bare"], ["bare", "tokenizer"]),
    ],
)
def test_wrong_input_is_found_before_anything_heavy(own, installed_wheel, kind, changes, words):
    (own / f"{kind}.yaml").write_text(CONFIGS[kind])
    (own / "broken.py").write_text("def right(rollout, row:\n")
    (own / "nothing.jsonl").write_text("")
    lines = (own / "prompts.jsonl").read_text().splitlines()
    (own / "row37.jsonl").write_text("\n".join([*lines, '{"text": "no messages here"}']) + "\n")
    (own / "bare").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        if not (own / "bare" / name).exists():
            (own / "bare" / name).write_bytes((own / "policy" / name).read_bytes())
    said = call(installed_wheel, own, kind, f"{kind}.yaml", *changes, expect=2, timeout=60)
    assert all(word in said for word in words), said
    assert "Traceback" not in said
