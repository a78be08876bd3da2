"""The quick start's base: puzzles and their sets, the tokenizer, Muon, and training that the seed alone determines."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from rollout_records import one_turn

from posttrain.base.cache import cache_key
from posttrain.base.config import ModelSizes, SetSizes, StageConfig, TextConfig
from posttrain.base.corpus import JUDGE_TEMPLATE, RATINGS, Corpus
from posttrain.base.model import build_model
from posttrain.base.muon import Muon, orthogonalize
from posttrain.base.problem import LEVELS
from posttrain.base.rank import learning_rate_scale
from posttrain.base.sets import SYSTEM_INSTRUCTIONS, draw_sets, with_system, write_sets
from posttrain.base.stage import run
from posttrain.base.tasks import FAMILIES, draw_distinct, solve
from posttrain.base.tokenizer import build_tokenizer, save_tokenizer
from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.samples import render_conversation
from posttrain.errors import ConfigError, DataError, StageError
from posttrain.files import read_jsonl
from posttrain.records import Row
from posttrain.rewards.puzzles import puzzles

SMALL_SETS = SetSizes(sft=40, prompts=40, heldout=20, tune=20)
SMALL = StageConfig(
    steps=6,
    batch_tokens=512,
    processes=2,
    warmup_steps=2,
    model=ModelSizes(hidden=32, layers=4, heads=2, head_dim=16, ffn=48, expert_ffn=32, experts=4),
    sets=SMALL_SETS,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def reward(problem, text):
    row = Row("r", "math", (), problem.answer, {"family": problem.family, **problem.fields})
    return puzzles(one_turn("r", "g", 0, (), (), text, (), (), "stop"), row).value


def test_right_solutions_are_rewarded_and_flawed_ones_mostly_not():
    rng = random.Random(3)
    problems = draw_distinct(400, rng)
    for worked in (True, False):
        assert all(reward(problem, solve(problem, rng, worked)) == 1.0 for problem in problems)
    slips = [reward(problem, solve(problem, rng, worked=True, flaw=1.0)) for problem in problems]
    careless = [reward(problem, solve(problem, rng, worked=False, flaw=1.0)) for problem in problems]
    assert sum(slips) < 0.3 * len(slips)
    assert sum(careless) < 0.5 * len(careless)


def test_every_family_and_level_is_drawn():
    drawn = {(problem.family, problem.level) for problem in draw_distinct(300, random.Random(0))}
    assert drawn == {(family, level) for family in FAMILIES for level in LEVELS}


def test_key_is_blind_to_order_where_order_does_not_matter():
    """Sorting the numbers of a prompt gives the same key as the prompt's own order, for 200 prompts of each family."""
    rng, seen = random.Random(5), {}
    for _ in range(3000):
        problem = FAMILIES["sum"].draw(rng.choice(LEVELS), rng)
        numbers = tuple(sorted(problem.prompt.removeprefix("Sum: ").split(" + "), key=int))
        assert seen.setdefault(numbers, problem.key) == problem.key
    assert len(set(seen.values())) == len(seen)


def test_sets_share_no_problem_with_each_other_or_with_the_text(tokenizer):
    sets = draw_sets(0, SetSizes())
    parts = (sets.sft, sets.prompts, sets.heldout, sets.tune)
    keys = [problem.key for part in parts for problem in part]
    assert len(set(keys)) == len(keys) == 1200 + 1600 + 400 + 300
    corpus = Corpus(tokenizer, TextConfig(), sets.keys(), seed="test")
    texts = [tokenizer.decode(corpus.document(late).ids) for _ in range(800) for late in (False, True)]
    prompts = {problem.prompt for part in parts for problem in part}
    asked = [text.split("\n\n")[-2] if "user" in text else text.split("\n")[0] for text in texts]
    for text in asked:
        prompt = text.removeprefix("<|begin_of_text|>").removeprefix("Rate: ").partition("<|eot|>")[0]
        assert prompt not in prompts


def test_only_training_sets_depend_on_the_seed():
    one, other = draw_sets(1, SMALL_SETS), draw_sets(2, SMALL_SETS)
    assert one == draw_sets(1, SMALL_SETS)
    assert (one.heldout, one.tune) == (other.heldout, other.tune)
    assert one.sft != other.sft
    assert one.prompts != other.prompts


def test_rows_have_the_roles_and_capabilities_of_their_set_and_right_replies(tmp_path):
    paths = write_sets(draw_sets(0, SetSizes(sft=200, prompts=50, heldout=50, tune=50)), tmp_path, seed=0)
    sft, prompts = (list(read_jsonl(paths[name])) for name in ("sft", "prompts"))
    assert {row["capability"] for row in prompts} == {"math", "coding", "reasoning", "instruction_following"}
    assert all([turn["role"] for turn in row["messages"]] == ["user"] for row in prompts)
    assert all(row["messages"][-1]["role"] == "assistant" for row in sft)
    systems = [row["messages"][0]["content"] for row in sft if row["messages"][0]["role"] == "system"]
    assert set(systems) == set(SYSTEM_INSTRUCTIONS)
    assert 70 < len(systems) < 130
    for row in sft:
        fields = {name: row[name] for name in ("family", "numbers", "target") if name in row}
        rollout = one_turn(row["id"], "g", 0, (), (), row["messages"][-1]["content"], (), (), "stop")
        assert puzzles(rollout, Row(row["id"], row["capability"], (), row["answer"], fields)).value == 1.0


def test_tokenizer_knows_the_words_of_the_puzzles(tokenizer, tmp_path):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    words = [f" {number}" for number in range(100)] + ["easy", "medium", "hard", " easy", " medium", " hard"]
    assert all(len(encode(word)) == 1 for word in words)
    assert len({encode(word)[0] for word in words}) == len(words)
    assert len(encode("; x += 12")) == 3
    assert 480 <= len(tokenizer) <= 560
    strange = "naïve  \t→ 𝛑 <b>\r\n\n12345 x+=1"
    assert tokenizer.decode(encode(strange)) == strange
    save_tokenizer(tokenizer, tmp_path)
    from transformers import AutoTokenizer, GenerationConfig

    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(strange) == encode(strange)
    assert loaded.eos_token == "<|eot|>"
    assert loaded.chat_template == tokenizer.chat_template
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(tmp_path).eos_token_id


def test_fast_rendering_equals_the_chat_template(tokenizer):
    corpus, rng = Corpus(tokenizer, TextConfig(), frozenset(), seed="x"), random.Random(0)
    for problem in draw_distinct(200, rng):
        turns, reply = with_system(problem.prompt, rng), solve(problem, rng, worked=rng.random() < 0.5)
        ids, mask = render_conversation(tokenizer, [*turns, {"role": "assistant", "content": reply}])
        document = corpus.renderer.document(turns, reply)
        assert list(document.ids) == ids
        assert document.replies == ((mask.index(1), len(ids)),)


def test_corpus_rates_puzzles_in_the_words_of_the_judge_template(tokenizer):
    corpus = Corpus(tokenizer, TextConfig(rate_share=1.0), frozenset(), seed="x")
    texts = [tokenizer.decode(corpus.document(late=False).ids) for _ in range(60)]
    start = JUDGE_TEMPLATE.partition("{")[0]
    assert all(f"user<|header_end|>\n\n{start}" in text for text in texts)
    assert {text.split("\n\n")[-1].removesuffix("<|eot|>") for text in texts} == set(RATINGS.values())


def test_late_text_is_mostly_terse(tokenizer):
    corpus = Corpus(tokenizer, TextConfig(rate_share=0.0), frozenset(), seed="x")
    early, late = (
        sum("Steps:" in tokenizer.decode(corpus.document(late).ids) for _ in range(400)) / 400 for late in (False, True)
    )
    assert early > 0.8
    assert late < 0.45


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16), (3, 16, 32)])
def test_orthogonalize_pushes_singular_values_towards_one(shape):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(update))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_descends_on_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    target, weight = (torch.randn(8, 12, generator=generator) for _ in range(2))
    weight = torch.nn.Parameter(weight)
    muon, losses = Muon([weight]), []
    for step in range(150):
        weight.grad = None
        loss = (weight - target).pow(2).mean()
        loss.backward()
        muon.step(0.1 * (1 - step / 150))
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_the_learning_rate_warms_up_stays_and_decays():
    config = StageConfig(steps=100, warmup_steps=10, decay_share=0.5)
    scales = [learning_rate_scale(config, step) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert scales[9:50] == [1.0] * 41
    assert scales[75] == pytest.approx(0.5)
    assert scales[99] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"model": {"heads": 3, "kv_heads": 2}}, "kv_heads: got 2, which does not divide heads 3"),
        ({"model": {"head_dim": 15}}, "head_dim: got 15; rotary position embeddings need an even number"),
        (
            {"batch_tokens": 200, "processes": 2},
            "batch_tokens: got 200 for 2 processes; give at least 128 for each, 256 in all",
        ),
        ({"stepz": 3}, "did you mean 'steps'"),
    ],
)
def test_a_wrong_config_is_refused_with_the_rule(data, problem):
    with pytest.raises(ConfigError, match=problem):
        validate_config(StageConfig, data, "base.yaml")


def test_sets_larger_than_the_number_of_puzzles_are_refused():
    with pytest.raises(DataError, match="make `sets` of the base smaller"):
        draw_distinct(40_000, random.Random(0))


def context(tmp_path, name, seed=0):
    folder = tmp_path / name
    folder.mkdir()
    return StageContext(name, folder, tmp_path / "events.jsonl", seed)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of the stage with one seed: the first trains, the second finds it in the cache."""
    root = tmp_path_factory.mktemp("base")
    patch = pytest.MonkeyPatch()
    patch.setenv("POSTTRAIN_CACHE", str(root / "cache"))
    one, two = context(root, "one"), context(root, "two")
    outputs = run(SMALL, one)
    run(SMALL, two)
    yield root, one, two, outputs
    patch.undo()


@pytest.mark.slow
def test_the_stage_writes_the_outputs_that_it_returns(trained):
    _root, one, _two, outputs = trained
    assert set(outputs) == {"model", "sft_data", "prompts", "heldout", "tune"}
    assert len(list(read_jsonl(one.dir / "data" / "sft.jsonl"))) == 40
    metrics = list(read_jsonl(one.dir / "metrics.jsonl"))
    assert metrics[-1]["step"] == SMALL.steps
    assert metrics[-1]["loss"] < 7
    assert sorted(path.name for path in one.dir.iterdir()) == ["data", "metrics.jsonl", "model"]


@pytest.mark.slow
def test_second_run_comes_from_the_cache(trained):
    root, one, two, _outputs = trained
    events = [event for event in read_jsonl(root / "events.jsonl") if event["stage"] == "two"]
    assert "cached" in [event["event"] for event in events]
    assert not (two.dir / "metrics.jsonl").exists()
    assert all(torch.equal(tensor, weights(two.dir)[name]) for name, tensor in weights(one.dir).items())


@pytest.mark.slow
def test_training_is_reproducible(trained, tmp_path):
    again = context(tmp_path, "again")
    run(SMALL.model_copy(update={"cache": False}), again)
    assert all(torch.equal(tensor, weights(again.dir)[name]) for name, tensor in weights(trained[1].dir).items())


class CutAt(StageContext):
    """The context of a stage that is interrupted as soon as it has done its fourth step."""

    def progress(self, done, total, unit, *, values=None):
        if done == 4:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_training_that_was_cut_goes_on_to_the_same_weights(trained, tmp_path):
    (tmp_path / "stage").mkdir()
    config, parts = SMALL.model_copy(update={"cache": False}), ("stage", tmp_path / "stage", tmp_path / "events.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(config, CutAt(*parts))
    assert not (tmp_path / "stage" / "model").exists()
    run(config, StageContext(*parts))
    events = [event for event in read_jsonl(tmp_path / "events.jsonl") if event["event"] == "resumed"]
    assert len(events) == 1
    assert 3 <= events[0]["step"] < SMALL.steps
    assert all(
        torch.equal(tensor, weights(tmp_path / "stage")[name]) for name, tensor in weights(trained[1].dir).items()
    )
    assert [line["step"] for line in read_jsonl(tmp_path / "stage" / "metrics.jsonl")] == [SMALL.steps]
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["data", "metrics.jsonl", "model"]


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_not_continued(tmp_path):
    (tmp_path / "stage").mkdir()
    config, parts = SMALL.model_copy(update={"cache": False}), ("stage", tmp_path / "stage", tmp_path / "events.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(config, CutAt(*parts))
    run(config.model_copy(update={"adam_learning_rate": 1e-3}), StageContext(*parts))
    assert not any(event["event"] == "resumed" for event in read_jsonl(tmp_path / "events.jsonl"))


def test_the_cache_key_covers_all_that_the_weights_depend_on():
    key = cache_key(SMALL, 0)
    assert key == cache_key(SMALL.model_copy(update={"cache": False}), 0)
    assert len({key, cache_key(SMALL, 1), cache_key(SMALL.model_copy(update={"steps": 7}), 0)}) == 3


def test_the_initial_weights_depend_on_the_seed(tokenizer):
    one, same, other = (build_model(SMALL.model, tokenizer, 0.01, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert all(torch.equal(tensor, other[name]) == (tensor.dim() < 2) for name, tensor in one.items())


@pytest.mark.slow
def test_transformers_and_the_native_model_agree_on_the_folder(trained):
    from transformers import AutoTokenizer, Llama4ForCausalLM

    from posttrain.model.native import NativeLlama4ForCausalLM

    folder = trained[1].dir / "model"
    ids = AutoTokenizer.from_pretrained(folder)("Sum: 3 + 4\nSteps: 3 + 4 = 7.", return_tensors="pt").input_ids
    theirs, ours = (
        kind.from_pretrained(folder, dtype=torch.float32).eval()
        for kind in (Llama4ForCausalLM, NativeLlama4ForCausalLM)
    )
    with torch.no_grad():
        peer, got = theirs(ids, use_cache=False).logits, ours(ids, use_cache=False).logits
        with float64_inside():
            exact = theirs.double()(ids, use_cache=False).logits
    assert_as_exact(got, peer, exact)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Llama4ForCausalLM"]


@pytest.mark.slow
def test_failing_process_ends_the_stage_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    impossible = SMALL.model_copy(update={"cache": False})
    with pytest.raises(StageError, match=r"(?s)base training ended with.*Error"):
        run(impossible, context(tmp_path, "broken"))


@pytest.mark.slow
def test_processes_die_with_the_one_that_started_them(tmp_path):
    """A stage killed outright leaves no trainer behind."""
    (tmp_path / "stage").mkdir()
    script = (
        "import sys; from pathlib import Path; from posttrain.base.config import StageConfig\n"
        "from posttrain.base.stage import run; from posttrain.context import StageContext\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "run(StageConfig(steps=100000, cache=False), StageContext('s', folder / 'stage', folder / 'events.jsonl'))\n"
    )
    stage = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        _wait_for(lambda: (tmp_path / "stage" / "metrics.jsonl").exists())
        workers = _children(stage.pid)
        assert len(workers) == 2
    finally:
        stage.send_signal(signal.SIGKILL)
        stage.wait()
    _wait_for(lambda: not any(_alive(pid) for pid in workers))


def _wait_for(condition, deadline_s=120.0):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _children(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _alive(pid):
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
