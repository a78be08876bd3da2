"""The DPO stage with real TRL on a tiny model: which tokens, which loss, which pairs.

Where the stage is run, it trains on a real rank with a DeepSpeed engine.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.chat import render_prompt
from posttrain.data.ends import end_token_ids
from posttrain.data.pairs import Pair, load_pairs, write_pairs
from posttrain.dpo import stage
from posttrain.dpo.config import DpoConfig, MiningConfig
from posttrain.dpo.examples import PairIds, blank_record, to_record, tokenize_pairs
from posttrain.dpo.mine import Reply, mine, read_replies
from posttrain.dpo.trainer import PairTrainer
from posttrain.errors import ConfigError, DataError, StageError
from posttrain.files import read_jsonl
from posttrain.model import load_model, load_tokenizer
from posttrain.model.load import load_policy
from posttrain.records import Message, ToolCall
from posttrain.tune.adapters import adapter_config
from posttrain.tune.dropout import use_row_dropout
from posttrain.tune.steps import rows_and_blank

PROMPT = json.dumps([{"role": "user", "content": "Sum: 1 + 2"}])

CHATML_THAT_CUTS = (
    "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else m.content.split('#')[-1] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_pairs(count: int) -> list[Pair]:
    return [
        Pair(f"p{i}", "sums", (Message("user", f"Sum: {i % 9} + {i // 9}"),), f"Answer: {i % 9 + i // 9}", "Answer: 99")
        for i in range(count)
    ]


def make_config(policy: Path, **changes: Any) -> DpoConfig:
    settings = {
        "model": {"path": str(policy), "dtype": "float32"},
        "batch_size": 8,
        "max_length": 128,
        "optimizer": {"learning_rate": 1e-3},
        **changes,
    }
    return validate_config(DpoConfig, settings, "test")


def make_context(folder: Path, seed: int = 0) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext("dpo", folder, folder / "events.jsonl", seed)


def steps_of(folder: Path) -> list[dict]:
    return [record for record in read_jsonl(folder / "metrics.jsonl") if "learning_rate" in record]


# --- tokens ---


def test_prompts_are_what_sampling_sends_and_replies_end_their_turn(policy):
    tokenizer = load_tokenizer(policy)
    pairs = make_pairs(3)
    ids, kept = tokenize_pairs(tokenizer, pairs, 128, overlong="error")
    assert kept == pairs
    for pair, item in zip(pairs, ids, strict=True):
        assert item.prompt_ids == render_prompt(tokenizer, pair.prompt)
        assert tokenizer.decode(item.chosen_ids) == pair.chosen + "<|eot|>"
        assert tokenizer.decode(item.rejected_ids) == pair.rejected + "<|eot|>"


def test_a_truncated_reply_gets_no_end_of_turn(policy):
    """It never sampled one: with it, training would push the end of turn down."""
    tokenizer = load_tokenizer(policy)
    pair = Pair("p", "sums", (Message("user", "Sum: 1 + 2"),), "Answer: 3", "1 + 2 = 3, 3", {"reason": "truncated"})
    (item,), _ = tokenize_pairs(tokenizer, [pair], 128, overlong="error")
    assert tokenizer.decode(item.rejected_ids) == "1 + 2 = 3, 3"
    assert not set(end_token_ids(tokenizer)) & set(item.rejected_ids)
    assert item.chosen_ids[-1] in end_token_ids(tokenizer)


def test_turns_of_tools_and_earlier_replies_are_context(policy):
    tokenizer = load_tokenizer(policy)
    calling = Message("assistant", "", (ToolCall("add", {"a": 1, "b": 2}, "1"),))
    result = Message("tool", "3", tool_call_id="1")
    prompt = (Message("user", "Sum: 1 + 2"), calling, result)
    (item,), _ = tokenize_pairs(tokenizer, [Pair("p", "sums", prompt, "Answer: 3", "Answer: 4")], 200, overlong="error")
    assert item.prompt_ids == render_prompt(tokenizer, prompt)
    text = tokenizer.decode(item.prompt_ids)
    assert '{"name": "add", "parameters": {"a": 1, "b": 2}}' in text
    assert (tokenizer.decode(item.chosen_ids), tokenizer.decode(item.rejected_ids)) == (
        "Answer: 3<|eot|>",
        "Answer: 4<|eot|>",
    )
    assert sum(item.chosen_example().mask) == len(item.chosen_ids)


def test_a_pair_may_begin_with_reasoning_that_its_template_removes_later(policy):
    """The earlier turn is context: it is rendered as sampling would see it, and need not be so at its own time."""
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = CHATML_THAT_CUTS
    prompt = (Message("user", "1?"), Message("assistant", "hm#1"), Message("user", "2?"))
    (item,), _ = tokenize_pairs(tokenizer, [Pair("p", "sums", prompt, "so#2", "so#3")], 128, overlong="error")
    assert tokenizer.decode(item.prompt_ids) == "user:1?<|eot|>assistant:1<|eot|>user:2?<|eot|>assistant:"
    assert tokenizer.decode(item.chosen_ids) == "so#2<|eot|>"


def test_pairs_that_are_too_long_are_an_error_or_dropped(policy):
    tokenizer = load_tokenizer(policy)
    pairs = [*make_pairs(2), Pair("long", "sums", (Message("user", "Sum: 1 + 2"),), "3", "1 + 2 = 3, " * 20)]
    with pytest.raises(DataError, match=r"pair 'long': \d+ tokens, but max_length is 64"):
        tokenize_pairs(tokenizer, pairs, 64, overlong="error")
    assert tokenize_pairs(tokenizer, pairs, 64, overlong="drop")[1] == pairs[:2]
    with pytest.raises(DataError, match="all 3 pairs are longer than max_length 4"):
        tokenize_pairs(tokenizer, pairs, 4, overlong="drop")


def test_replies_that_become_the_same_tokens_are_refused(policy):
    pair = Pair("p", "sums", (Message("user", "Sum: 1 + 2"),), "Answer: 3", "Answer: 3 ")
    with pytest.raises(DataError, match=r"pair 'p': chosen and rejected .* the same tokens"):
        tokenize_pairs(load_tokenizer(policy), [pair], 128, overlong="error")


# --- training ---


def reply_logprob(model, prompt_ids: list[int], reply_ids: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt_ids + reply_ids])
    logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :, 0]


def make_trainer(config: DpoConfig, ids: list[PairIds], folder: Path) -> PairTrainer:
    """The trainer that the stage uses, without an engine and not started."""
    from trl import DPOConfig

    model = load_policy(config.model)
    trainer = PairTrainer(
        model=model,
        args=DPOConfig(**stage.trainer_arguments(config, folder)),
        train_dataset=rows_and_blank([to_record(item) for item in ids], blank_record(ids[0])),
        processing_class=load_tokenizer(config.model.path),
        peft_config=adapter_config(model, config.lora) if config.lora else None,
        **stage.trainer_options(config),
    )
    if config.lora and config.lora.dropout:
        trainer.row_keys = use_row_dropout(trainer.model, seed=0)
    return trainer


def test_the_loss_is_the_formula(policy, tmp_path):
    """From the trainer of the stage, with a policy that has moved, against DPO written out."""
    ids, _ = tokenize_pairs(load_tokenizer(policy), make_pairs(4), 128, overlong="error")
    config = make_config(policy, pairs={"path": "x"}, batch_size=4, beta=0.3, nll_weight=0.2)
    trainer = make_trainer(config, ids, tmp_path)
    model, start = trainer.model, load_model(policy, dtype="float32")
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)))
        (batch,), counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts).item()
        plain = [[reply_logprob(m, i.prompt_ids, r) for r in (i.chosen_ids, i.rejected_ids)] for m in (model, start)
                 for i in ids]  # fmt: skip
    now, then = plain[:4], plain[4:]
    logits = [0.3 * ((n[0] - t[0]).sum() - (n[1] - t[1]).sum()) for n, t in zip(now, then, strict=True)]
    preference = sum(math.log1p(math.exp(-float(logit))) for logit in logits) / 4
    nll = -torch.cat([n[0] for n in now]).mean()
    assert loss == pytest.approx(preference + 0.2 * float(nll), rel=1e-4)


@pytest.mark.slow
def test_the_stage_trains_measures_and_exports(ranks, policy, tmp_path):
    write_pairs(tmp_path / "in.jsonl", make_pairs(40))
    config = make_config(policy, pairs={"path": str(tmp_path / "in.jsonl")}, epochs=2, max_pairs=32)
    result = stage.run(config, make_context(tmp_path / "run"))
    lines = steps_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the start policy
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert len(lines) == result["steps"] == 8
    assert result["loss_last"] < 0.6
    assert result["accuracy"] == 1.0
    assert result["margin"] > 0.1
    assert result["kl_from_start"] > 0
    assert load_pairs(result["pairs"]) == stage.read_pairs(config, 0)
    assert result["num_pairs"] == 32
    assert result["reasons"] == {"given": 32}
    before, after = load_model(policy, dtype="float32"), load_model(result["model"], dtype="float32")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.slow
def test_lora_uses_the_start_policy_as_reference_and_merges(ranks, policy, tmp_path):
    write_pairs(tmp_path / "in.jsonl", make_pairs(16))
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    config = make_config(
        policy, pairs={"path": str(tmp_path / "in.jsonl")}, lora=lora, optimizer={"learning_rate": 1e-2}, epochs=3
    )
    result = stage.run(config, make_context(tmp_path / "run"))
    lines = steps_of(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    before, after = (load_model(path, dtype="float32").state_dict() for path in (policy, result["model"]))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}


@pytest.mark.slow
def test_a_stopped_stage_goes_on_to_the_same_weights(ranks, policy, tmp_path):
    """From a checkpoint on: the reference must still be the start policy afterwards."""
    write_pairs(tmp_path / "in.jsonl", make_pairs(40))
    config = make_config(policy, pairs={"path": str(tmp_path / "in.jsonl")}, epochs=2, checkpoint_every=3)
    context = make_context(tmp_path / "run")
    whole = load_model(stage.run(config, context)["model"], dtype="float32").state_dict()
    lines = steps_of(context.dir)
    steps = sorted(int(path.name.removeprefix("step_")) for path in (context.dir / "checkpoints").glob("step_*"))
    for step in steps[1:]:
        shutil.rmtree(context.dir / "checkpoints" / f"step_{step}")
    again = load_model(stage.run(config, context)["model"], dtype="float32").state_dict()
    assert [event["step"] for event in read_jsonl(context.events) if event["event"] == "resumed"] == [steps[0]]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for name in ("step", "loss", "tokens"):
        assert [line[name] for line in steps_of(context.dir)] == [line[name] for line in lines]


@pytest.mark.slow
def test_the_stage_measures_held_out_pairs(ranks, policy, tmp_path):
    write_pairs(tmp_path / "in.jsonl", make_pairs(40))
    held_out = {"fraction": 0.2, "every": 3}
    config = make_config(policy, pairs={"path": str(tmp_path / "in.jsonl")}, epochs=2, held_out=held_out)
    context = make_context(tmp_path / "run")
    result = stage.run(config, context)
    assert (result["num_pairs"], result["held_out_pairs"]) == (32, 8)
    lines = [line for line in read_jsonl(context.dir / "metrics.jsonl") if "held_out_loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    assert lines[0]["held_out_loss"] == pytest.approx(math.log(2))  # the policy is its reference
    assert lines[-1]["held_out_loss"] < lines[1]["held_out_loss"] < math.log(2)
    assert lines[-1]["held_out_margin"] > 0
    assert result["held_out_loss_last"] == lines[-1]["held_out_loss"]
    shown = [event["values"] for event in read_jsonl(context.events) if event["event"] == "progress"]
    assert all("held-out loss" in values for values in shown)
    assert "loss" not in shown[0]


def test_every_field_reaches_trl(policy, tmp_path):
    from trl import DPOConfig

    config = make_config(policy, rollouts="x", beta=0.4, loss_type="ipo", batch_size=5, epochs=2,
                         gradient_accumulation=3, checkpoint_every=9, gradient_checkpointing="full",
                         optimizer={"learning_rate": 2e-5, "schedule": "linear", "warmup_steps": 2})  # fmt: skip
    args = DPOConfig(**stage.trainer_arguments(config, tmp_path, seed=4))
    expected = {
        "beta": 0.4, "loss_type": ["ipo"], "per_device_train_batch_size": 5,
        "num_train_epochs": 2, "gradient_accumulation_steps": 3, "save_steps": 9, "gradient_checkpointing": True,
        "learning_rate": 2e-5, "lr_scheduler_type": "linear", "warmup_steps": 2, "seed": 4, "max_length": None,
        "precompute_ref_log_probs": True, "bf16": False, "report_to": [],
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert stage.trainer_arguments(make_config(policy, rollouts="x"), tmp_path)["loss_type"] == ["sigmoid"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "exactly one of pairs and rollouts"),
        ({"pairs": {"path": "x"}, "rollouts": "y"}, "exactly one of pairs and rollouts"),
        ({"rollouts": "y", "mining": {"reasons": ["slow"]}}, "'wrong' or 'truncated'"),
        ({"rollouts": "y", "loss_type": "kto"}, "loss_type"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(policy, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        make_config(policy, **changes)


def test_bad_pairs_are_found_before_the_model_is_loaded(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "y"}) + "\n")
    config = make_config(tmp_path / "no-such-model", pairs={"path": str(tmp_path / "p.jsonl")})
    with pytest.raises(DataError, match="row 1: no 'rejected'"):
        stage.run(config, make_context(tmp_path / "run"))


# --- mining ---


def reply(text: str, reward: float | None, version: int = 0, prompt: str = PROMPT, **changes: Any) -> Reply:
    settings = {"prompt_id": "a", "capability": "sums", "complete": True, **changes}
    return Reply(prompt=prompt, text=text, reward=reward, policy_version=version, **settings)


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


def test_right_is_set_against_wrong_of_the_same_prompt():
    other = json.dumps([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Sum: 1 + 2"}])
    replies = [reply("right", 1.0), reply("wrong", 0.0), reply("other wrong", 0.0, prompt=other)]
    (pair,) = mine(replies, MiningConfig(), None, seed=0)
    assert (pair.chosen, pair.rejected, pair.capability) == ("right", "wrong", "sums")
    assert pair.prompt == (Message("user", "Sum: 1 + 2"),)
    assert pair.fields == {"reason": "wrong", "chosen_reward": 1.0, "rejected_reward": 0.0, "policy_version": 0}


def test_pairs_of_one_row_under_two_system_instructions_have_their_own_ids(tmp_path):
    other = json.dumps([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Sum: 1 + 2"}])
    replies = [reply(text, reward, prompt=p) for p in (PROMPT, other) for text, reward in (("yes", 1.0), ("no", 0.0))]
    pairs = mine(replies, MiningConfig(), None, seed=0)
    assert {pair.id for pair in pairs} == {"a:0:0", "a:0:1"}
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert load_pairs(tmp_path / "pairs.jsonl") == pairs


def test_the_tools_of_a_row_stay_with_its_pairs_and_episodes_are_left_out(tmp_path):
    folder = tmp_path / "rl" / "rollouts"
    write_rollouts(folder)
    tools = json.dumps([{"type": "function", "function": {"name": "add"}}])
    for number, file in enumerate(sorted(folder.iterdir())):
        table = pq.read_table(file)
        column = [tools if number else "" for _ in range(len(table))]
        parts = ['{"turns": 2}' if at % 9 == 8 else None for at in range(len(table))]
        table = table.append_column("tools", pa.array(column)).append_column("parts", pa.array(parts, pa.string()))
        pq.write_table(table, file)
    replies = read_replies(folder)
    assert len(replies) == 32
    pairs = mine(replies, MiningConfig(), None, seed=0)
    assert {json.dumps(pair.fields.get("tools")) for pair in pairs} == {tools, "null"}
    for file in folder.iterdir():
        table = pq.read_table(file).drop_columns(["parts"])
        pq.write_table(table.append_column("parts", pa.array(['{"turns": 2}'] * len(table))), file)
    with pytest.raises(DataError, match="all rollouts are episodes"):
        read_replies(folder)


def test_complete_is_set_against_truncated():
    replies = [reply("right", 1.0), reply("on and on", None, complete=False)]
    (pair,) = mine(replies, MiningConfig(), None, seed=0)
    assert (pair.rejected, pair.fields["reason"]) == ("on and on", "truncated")
    with pytest.raises(StageError):
        mine(replies, MiningConfig(reasons=["wrong"]), None, seed=0)


def test_the_newest_versions_come_first():
    replies = [reply(f"right {v}", 1.0, v) for v in range(4)] + [reply(f"wrong {v}", 0.0, v) for v in range(4)]
    pairs = mine(replies, MiningConfig(max_per_prompt=2), None, seed=0)
    assert texts(pairs) == [("right 3", "wrong 3"), ("right 2", "wrong 2")]
    other = json.dumps([{"role": "user", "content": "Sum: 5 + 5"}])
    replies += [reply("newer right", 1.0, 9, other, prompt_id="b"), reply("newer wrong", 0.0, 9, other, prompt_id="b")]
    assert mine(replies, MiningConfig(), 1, seed=0)[0].chosen == "newer right"


def test_no_reply_is_used_twice():
    replies = [reply("right", 1.0, v) for v in range(5)] + [reply(f"wrong {i}", 0.0) for i in range(5)]
    assert len(mine(replies, MiningConfig(max_per_prompt=5), None, seed=0)) == 1
    replies = [reply(f"right {i}", 1.0) for i in range(3)] + [reply("wrong", 0.0)] * 5
    assert len(mine(replies, MiningConfig(max_per_prompt=5), None, seed=0)) == 1
    graded = [reply(f"reply {i}", float(i)) for i in range(6)]
    used = Counter(text for pair in texts(mine(graded, MiningConfig(max_per_prompt=9), None, seed=0)) for text in pair)
    assert set(used.values()) == {1}


def test_rewards_must_differ_by_the_margin():
    replies = [reply("good", 0.9), reply("fair", 0.6), reply("poor", 0.2)]
    (pair,) = mine(replies, MiningConfig(min_margin=0.5), None, seed=0)
    assert (pair.chosen, pair.rejected) == ("good", "poor")
    with pytest.raises(StageError):
        mine(replies, MiningConfig(min_margin=0.8), None, seed=0)


def test_capabilities_take_turns_and_the_draw_follows_the_seed():
    replies = []
    for number in range(40):
        capability = "sums" if number < 36 else "sorting"
        prompt = json.dumps([{"role": "user", "content": f"prompt {number}"}])
        for text, reward in (("right", 1.0), ("wrong", 0.0)):
            replies.append(reply(text, reward, prompt=prompt, prompt_id=str(number), capability=capability))
    pairs = mine(replies, MiningConfig(), 6, seed=0)
    assert Counter(pair.capability for pair in pairs) == {"sums": 3, "sorting": 3}
    assert Counter(pair.capability for pair in mine(replies, MiningConfig(), 20, seed=0)) == {"sums": 16, "sorting": 4}
    assert mine(replies, MiningConfig(), 6, seed=0) == pairs
    assert mine(replies, MiningConfig(), 6, seed=1) != pairs
    assert len({pair.id for pair in mine(replies, MiningConfig(), None, seed=0)}) == 40


def test_the_error_about_nothing_to_mine_has_counts():
    replies = [reply("right", 1.0), reply("also right", 1.0), reply("lost", None)]
    with pytest.raises(StageError) as error:
        mine(replies, MiningConfig(), None, seed=0)
    assert "from 3 rollouts of 1 prompts: 2 are scored, 2 of them complete; prompts whose" in str(error.value)
    assert "or more: 0; reasons allowed: wrong, truncated" in str(error.value)


def write_rollouts(folder: Path) -> None:
    folder.mkdir(parents=True)
    replies = [("Answer: 3", 1.0, "stop"), ("Answer: 4", 0.0, "stop"), ("1 + 2 = 3, 3", 0.0, "length")]
    records = [
        {
            "step": number // 4,
            "group_id": f"g{number}",
            "prompt_id": f"p{number}",
            "capability": "sums",
            "index": index,
            "prompt": json.dumps([{"role": "user", "content": f"Sum: {number} + 2"}]),
            "reply": text,
            "reward": reward,
            "finish_reason": reason,
            "policy_version": number // 4,
            "num_tokens": 5,
            "status": "trained",
        }
        for number in range(12)
        for index, (text, reward, reason) in enumerate(replies)
    ]
    pq.write_table(pa.Table.from_pylist(records[:18]), folder / "step_0.parquet")
    pq.write_table(pa.Table.from_pylist(records[18:]), folder / "step_1.parquet")


def test_the_stage_mines_the_rollouts_of_an_rl_stage(policy, tmp_path):
    write_rollouts(tmp_path / "rl" / "rollouts")
    assert read_replies(tmp_path / "rl" / "rollouts") == read_replies(tmp_path / "rl")
    config = make_config(policy, rollouts=str(tmp_path / "rl"), mining={"max_per_prompt": 2}, max_pairs=10)
    prepared = stage.prepare(config, seed=0)
    pairs = prepared.pairs
    assert (len(prepared.ids), len(pairs), prepared.dropped) == (10, 10, 0)
    assert pairs[0].fields["policy_version"] == 2
    assert {pair.fields["reason"] for pair in pairs} <= {"wrong", "truncated"}


def test_rollouts_that_are_not_there_or_not_rollouts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no rollouts \(\*.parquet\)"):
        read_replies(tmp_path)
    pq.write_table(pa.table({"step": [1], "reply": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column prompt_id, capability, prompt, reward"):
        read_replies(tmp_path)
