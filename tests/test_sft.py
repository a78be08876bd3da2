"""The SFT stage with real TRL on a tiny model: what is trained, what packing does, what survives a kill.

Where the stage is run, it trains on a real rank with a DeepSpeed engine.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
from closeness import assert_as_exact, float64_inside
from hypothesis import given
from hypothesis import strategies as st
from tiny_policy import write_sums
from torch.nn import functional

from posttrain.base.tokenizer import build_tokenizer
from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.chat import render_prompt
from posttrain.data.ends import end_token_ids, folder_end_ids
from posttrain.data.rows import load_rows, write_rows
from posttrain.errors import CheckpointError, ConfigError, DataError, StageError
from posttrain.files import read_jsonl, write_jsonl
from posttrain.model import load_model, load_tokenizer
from posttrain.model.load import load_policy
from posttrain.parallel.ranks import run_on_ranks
from posttrain.records import Message, Row, ToolCall
from posttrain.sft import stage
from posttrain.sft.config import SftConfig
from posttrain.sft.examples import tokenize
from posttrain.sft.isolation import packing_difference, require_isolation
from posttrain.sft.packing import IGNORED, blank_record, pack, to_records
from posttrain.sft.trainer import RowTrainer
from posttrain.tune.adapters import adapter_config
from posttrain.tune.drift import DriftProbe
from posttrain.tune.dropout import use_row_dropout
from posttrain.tune.examples import Example
from posttrain.tune.home import EVALUATIONS
from posttrain.tune.steps import rows_and_blank

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks do not find the tests' folder


def make_config(policy: Path, data: Path, **changes) -> SftConfig:
    settings = {
        "model": {"path": str(policy), "dtype": "float32"},
        "data": {"path": str(data)},
        "batch_tokens": 256,
        "max_length": 128,
        "optimizer": {"learning_rate": 1e-3},
        **changes,
    }
    return validate_config(SftConfig, settings, "test")


def make_context(folder: Path, seed: int = 0) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    return StageContext("sft", folder, folder / "events.jsonl", seed)


def examples_of(policy: Path, data: Path) -> Sequence[Example]:
    return tokenize(load_tokenizer(policy), load_rows(data, kind="supervised"), 128, overlong="error")[0]


def steps_of(folder: Path) -> list[dict]:
    return [record for record in read_jsonl(folder / "metrics.jsonl") if "learning_rate" in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, dtype="float32").state_dict())


def make_trainer(config: SftConfig, folder: Path) -> RowTrainer:
    """The trainer that the stage uses, without an engine and not started."""
    from trl import SFTConfig

    examples = examples_of(Path(config.model.path), Path(str(config.data.path)))
    rows = to_records(examples, config.batch_tokens, seed=0)
    model = load_policy(config.model)
    trainer = RowTrainer(
        model=model,
        args=SFTConfig(**stage.trainer_arguments(config, folder)),
        train_dataset=rows_and_blank(rows, blank_record(examples[0], packed=config.packing)),
        processing_class=load_tokenizer(config.model.path),
        peft_config=adapter_config(model, config.lora) if config.lora else None,
    )
    if config.lora and config.lora.dropout:
        trainer.row_keys = use_row_dropout(trainer.model, seed=0)
    return trainer


def test_only_assistant_tokens_are_trained_on(policy, data, tmp_path):
    """From the batches that TRL really makes: decode what has a label."""
    tokenizer = load_tokenizer(policy)
    rows = load_rows(data, kind="supervised")
    expected = sorted(row.messages[-1].content + "<|eot|>" for row in rows)
    for changes in ({}, {"packing": False, "batch_tokens": None, "batch_size": 4}):
        trainer = make_trainer(make_config(policy, data, **changes), tmp_path)
        found = []
        for batch in trainer.get_train_dataloader():
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                trained = labels != IGNORED
                assert torch.equal(ids[trained], labels[trained])
                starts = trained & ~torch.cat([torch.tensor([False]), trained[:-1]])
                runs = torch.split(ids[trained], torch.diff(torch.cat([
                    (trained.cumsum(0)[starts] - 1), trained.sum()[None]
                ])).tolist())  # fmt: skip
                found += [tokenizer.decode(run) for run in runs]
        assert sorted(found) == expected


def test_context_turns_and_results_of_tools_have_no_label_and_no_loss(policy, tmp_path):
    """In the batches that TRL really makes. The loss of a batch is its mean over the trained tokens alone."""
    tokenizer = load_tokenizer(policy)
    call = ToolCall("add", {"a": 1, "b": 2}, "1")
    rows = [
        Row("flag", "sums", (Message("user", "Sum: 1 + 1"), Message("assistant", "Answer: 3", trained=False),
                             Message("user", "Sum: 1 + 1"), Message("assistant", "Answer: 2", trained=True))),
        Row("tool", "sums", (Message("user", "Sum: 1 + 2"), Message("assistant", "Run:", (call,)),
                             Message("tool", "3", tool_call_id="1"), Message("assistant", "Answer: 3"))),
    ]  # fmt: skip
    write_rows(tmp_path / "d.jsonl", rows)
    changes = {"packing": False, "batch_tokens": None, "batch_size": 2, "max_length": 200}
    trainer = make_trainer(make_config(policy, tmp_path / "d.jsonl", **changes), tmp_path)
    (batch,) = trainer.get_train_dataloader()
    found = [
        tokenizer.decode(ids[labels != IGNORED])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    calling = 'Run:{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot|>'
    assert sorted(found) == ["Answer: 2<|eot|>", f"{calling}Answer: 3<|eot|>"]
    model, total, count = trainer.model.eval(), 0.0, 0
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        whole = ids[: int((ids != tokenizer.pad_token_id).sum())]
        logps = model(input_ids=whole[None]).logits[0, :-1].log_softmax(-1)
        learned = labels[1 : len(whole)] != IGNORED
        total -= logps.gather(1, whole[1:, None])[learned].sum().item()
        count += int(learned.sum())
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)


def test_tokens_before_the_reply_are_what_sampling_sends(policy, data):
    tokenizer = load_tokenizer(policy)
    rows = load_rows(data, kind="supervised")
    for row, example in zip(rows, examples_of(policy, data), strict=True):
        start = list(example.mask).index(1)
        assert list(example.ids[:start]) == render_prompt(tokenizer, row.messages[:-1])
        assert example.ids[-1] in end_token_ids(tokenizer)
        assert example.mask[-1] == 1


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 5))
def test_packing_keeps_every_conversation_whole_once_within_the_capacity(lengths, seed):
    rows = pack(lengths, 40, seed)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= 40 for total in sums)
    # Best fit leaves at most one row half empty or less.
    assert sum(total <= 20 for total in sums) <= 1
    assert list(rows) == list(pack(lengths, 40, seed))


def test_packed_rows_are_full_and_mixed():
    """Close to as full as rows can be, and no row of long conversations only."""
    rng = random.Random(0)
    lengths = [rng.randint(10, 100) for _ in range(2000)]
    rows = pack(lengths, 1024, 0)
    assert len(rows) <= 1.03 * sum(lengths) / 1024
    means = [sum(lengths[index] for index in row) / len(row) for row in rows[:-1]]
    assert max(means) < 2.5 * min(means)  # sorted by length it would be 8
    with pytest.raises(ValueError, match="length 5 is above the capacity 4"):
        pack([5], 4, 0)


def loss_and_gradient(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss a token over the whole dataset, and its gradient, from one accumulated step."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    trainer.model.zero_grad()
    for batch in trainer.get_train_dataloader():
        num = int((batch["labels"][:, 1:] != IGNORED).sum())
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
        loss.backward()
        total += loss.detach()
        count += num
    named = sorted(trainer.model.named_parameters())
    gradient = torch.cat([weight.grad.flatten() for _, weight in named if weight.grad is not None])
    return total / count, gradient / count


def exact_loss_and_gradient(policy: Path, trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of transformers' model in float64: the native one's grouped products have none."""
    model = load_model(policy, "transformers").double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    with float64_inside():
        for batch in trainer.get_train_dataloader():
            labels = batch["labels"][:, 1:]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            loss = functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="sum")
            loss.backward()
            total += loss.detach()
            count += int((labels != IGNORED).sum())
    gradient = torch.cat([weight.grad.flatten() for _, weight in sorted(model.named_parameters())])
    return total / count, gradient / count


def test_packed_loss_and_gradient_equal_unpacked(policy, data, tmp_path):
    packed = loss_and_gradient(make_trainer(make_config(policy, data), tmp_path))
    alone = make_config(policy, data, packing=False, batch_tokens=None, batch_size=1)
    unpacked = loss_and_gradient(make_trainer(alone, tmp_path))
    for found in zip(packed, unpacked, exact_loss_and_gradient(policy, make_trainer(alone, tmp_path)), strict=True):
        assert_as_exact(*found)


def test_a_model_that_leaks_between_packed_documents_is_refused(policy, data):
    examples = examples_of(policy, data)
    assert require_isolation(load_model(policy, dtype="float32"), examples) < 1e-5
    # transformers' Llama 4 counts chunks and temperature through the row.
    other = load_model(policy, "transformers", "float32")
    assert packing_difference(other, examples[:3]) > 1e-2
    with pytest.raises(ConfigError, match="set packing: false and batch_size, or model"):
        require_isolation(other, examples)


@pytest.mark.slow
def test_the_stage_trains_measures_and_exports(ranks, policy, data, tmp_path):
    result = stage.run(make_config(policy, data, epochs=2), make_context(tmp_path))
    assert result["model"] == str(tmp_path / "model")
    assert result["loss_last"] < result["loss_first"]
    assert result["kl_from_start"] > 1e-3
    examples = examples_of(policy, data)
    assert result["trained_tokens"] == 2 * sum(sum(example.mask) for example in examples)
    lines = steps_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, result["steps"] + 1))
    assert lines[-1]["tokens"] == result["tokens"] == 2 * sum(len(example.ids) for example in examples)
    before, after = load_model(policy, dtype="float32"), load_model(result["model"], dtype="float32")
    assert {**after.config.to_dict(), "_name_or_path": ""} == {**before.config.to_dict(), "_name_or_path": ""}
    probe = DriftProbe(before, examples)
    assert probe.measure(before).kl == 0.0
    events = list(read_jsonl(tmp_path / "events.jsonl"))
    assert {"data", "packing_checked", "progress", "busy", "checkpoint"} <= {event["event"] for event in events}
    busy = [event for event in events if event["event"] == "busy"]
    assert all(event["start"] <= event["end"] for event in busy)


def test_drift_is_the_exact_divergence(policy, data):
    """Against log-softmax written out over one conversation."""
    start, now = load_model(policy, dtype="float32"), load_model(policy, dtype="float32")
    with torch.no_grad():
        now.lm_head.weight.mul_(1.5)
    example = examples_of(policy, data)[1]
    drift = DriftProbe(start, [example]).measure(now)
    ids = torch.tensor([example.ids])
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in (now, start))
    on = torch.tensor(example.mask[1:], dtype=torch.bool)
    assert drift.tokens == int(on.sum())
    assert drift.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1)[on].mean()), rel=1e-4)
    assert drift.entropy_after == pytest.approx(float(-(p.exp() * p).sum(-1)[on].mean()), rel=1e-4)


def test_every_field_reaches_trl(policy, data, tmp_path):
    from trl import SFTConfig

    config = make_config(
        policy, data, epochs=3, gradient_accumulation=5, gradient_checkpointing="full", checkpoint_every=17,
        optimizer={"learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 4, "beta1": 0.8, "beta2": 0.9,
                   "weight_decay": 0.2, "max_grad_norm": 0.7},
    )  # fmt: skip

    def arguments(config: SftConfig, seed: int = 0) -> SFTConfig:
        return SFTConfig(**stage.trainer_arguments(config, tmp_path, seed))

    args = arguments(config, seed=11)
    expected = {
        "num_train_epochs": 3, "gradient_accumulation_steps": 5, "learning_rate": 3e-4, "gradient_checkpointing": True,
        "save_steps": 17, "lr_scheduler_type": "cosine", "warmup_steps": 4, "adam_beta1": 0.8, "adam_beta2": 0.9,
        "weight_decay": 0.2, "max_grad_norm": 0.7, "seed": 11, "data_seed": 11, "packing": True,
        "packing_strategy": "bfd", "max_length": 256, "per_device_train_batch_size": 1, "report_to": [], "bf16": False,
        "output_dir": str(tmp_path / "checkpoints"), "use_cpu": not torch.cuda.is_available(), "push_to_hub": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.gradient_checkpointing_kwargs is None
    args = arguments(make_config(policy, data, gradient_checkpointing="selective"))
    assert (args.gradient_checkpointing, list(args.gradient_checkpointing_kwargs)) == (
        True, ["use_reentrant", "context_fn"],
    )  # fmt: skip
    assert not arguments(make_config(policy, data)).gradient_checkpointing
    plain = make_config(policy, data, packing=False, batch_tokens=None, batch_size=6)
    args = arguments(plain)
    assert (args.packing, args.per_device_train_batch_size, args.max_length) == (False, 6, None)
    assert "ACCELERATE_USE_CPU" not in os.environ


@pytest.mark.slow
def test_lora_trains_adapters_and_exports_them_merged(ranks, policy, data, tmp_path):
    """Under a chat template of the config, which the exported folder carries with its end token."""
    (tmp_path / "mine.jinja").write_text(
        "{{ note }}" + build_tokenizer().chat_template.replace("<|eot|>", "<|end_of_text|>")
    )
    template = {"path": str(tmp_path / "mine.jinja"), "arguments": {"note": "Be kind."}}
    config = make_config(
        policy,
        data,
        model={"path": str(policy), "dtype": "float32", "chat_template": template},
        lora={"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "o_proj"]},
        optimizer={"learning_rate": 1e-2},
    )
    result = stage.run(config, make_context(tmp_path))
    tokenizer, trained = load_tokenizer(policy), load_tokenizer(result["model"])
    asked = [Message("user", "Sum: 1 + 1")]
    prompt = tokenizer.decode(render_prompt(tokenizer, asked)).replace("<|eot|>", "<|end_of_text|>")
    assert trained.decode(render_prompt(trained, asked)) == "Be kind." + prompt
    ends = trained.convert_tokens_to_ids(["<|eot|>", "<|end_of_text|>"])
    assert folder_end_ids(Path(result["model"])) == end_token_ids(trained) == ends
    assert folder_end_ids(policy) == end_token_ids(tokenizer) == ends[:1]
    events = {event["event"]: event for event in read_jsonl(tmp_path / "events.jsonl")}
    assert events["end_token_added"]["tokens"] == ["<|end_of_text|>"]
    before, after = weights(policy), weights(Path(result["model"]))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "o_proj.weight"))}
    assert result["kl_from_start"] > 0


@pytest.mark.slow
def test_lora_on_a_module_that_is_not_there_is_refused(ranks, policy, data, tmp_path):
    config = make_config(policy, data, lora={"target_modules": ["query"]})
    with pytest.raises(ConfigError, match=r"lora.target_modules: got query: the linear modules .* q_proj"):
        stage.run(config, make_context(tmp_path))


def killed_meanwhile(function: Callable[..., Any], config: SftConfig, context: StageContext, *arguments: Any) -> Any:
    """In a rank, which is killed when the second checkpoint and a later evaluation are there, whatever it does then."""

    def kill() -> None:
        while max((line["step"] for line in read_jsonl(context.dir / "checkpoints" / EVALUATIONS)), default=0) < 15:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    return function(config, context, *arguments)


@pytest.mark.slow
def test_a_killed_stage_goes_on_from_its_last_checkpoint_to_the_same_weights(
    ranks, policy, data, tmp_path, monkeypatch
):
    apart = {"rows": 6, "every": 5, "keep_best": True, "patience": 9}
    config = make_config(policy, data, epochs=12, checkpoint_every=7, held_out=apart)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = stage.run(config, make_context(whole, 5))
    with monkeypatch.context() as patch:
        patch.setattr(
            "posttrain.parallel.ranks.run_on_ranks",
            lambda parallel, resources, *work, **needed: run_on_ranks(
                parallel, resources, killed_meanwhile, *work, **needed
            ),
        )
        with pytest.raises(StageError, match="the training was lost in run"):
            stage.run(config, make_context(killed, 5))
    assert not (killed / "model").exists()
    (killed / "checkpoints" / "checkpoint-999").mkdir()  # what a kill in the middle of a save leaves
    again = stage.run(config, make_context(killed, 5))

    resumed = [event["step"] for event in read_jsonl(killed / "events.jsonl") if event["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 14
    before, after = weights(whole / "model"), weights(killed / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    one, other = ([[line[name] for name in names] for line in steps_of(folder)] for folder in (whole, killed))
    assert one == other
    made, twice = (list(read_jsonl(folder / "checkpoints" / EVALUATIONS)) for folder in (whole, killed))
    assert made == twice  # each evaluation once, the first before the first step
    assert [line["step"] for line in made][:4] == [0, 5, 10, 15]
    assert held_out_losses(whole) == held_out_losses(killed)
    assert {name: result[name] for name in result if name != "model"} == {
        name: again[name] for name in again if name != "model"
    }
    kept = {path.name for path in (killed / "checkpoints").glob("step_*")}
    assert kept == {path.name for path in (whole / "checkpoints").glob("step_*")}
    assert f"step_{result['best_step']}" in kept
    assert len(kept) in (2, 3)


@pytest.mark.slow
def test_more_epochs_go_on_from_the_last_checkpoint_to_the_weights_of_a_longer_training(ranks, policy, data, tmp_path):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    at_once = stage.run(make_config(policy, data, epochs=3, checkpoint_every=100), make_context(whole, 5))
    first = stage.run(make_config(policy, data, epochs=2, checkpoint_every=100), make_context(longer, 5))
    short = weights(longer / "model")
    second = stage.run(make_config(policy, data, epochs=3, checkpoint_every=50), make_context(longer, 5))
    assert [second[name] for name in ("steps", "loss_first", "loss_last")] == [
        at_once[name] for name in ("steps", "loss_first", "loss_last")
    ]
    resumed = [event["step"] for event in read_jsonl(longer / "events.jsonl") if event["event"] == "resumed"]
    assert resumed == [first["steps"]]
    before, after = weights(whole / "model"), weights(longer / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(short[name], after[name]) for name in short)


@pytest.mark.slow
def test_checkpoints_of_another_training_are_not_used(ranks, policy, data, tmp_path):
    stage.run(make_config(policy, data), make_context(tmp_path))
    other = make_config(policy, data, optimizer={"learning_rate": 2e-3})
    stage.run(other, make_context(tmp_path))
    assert "resumed" not in {event["event"] for event in read_jsonl(tmp_path / "events.jsonl")}
    assert [line["step"] for line in steps_of(tmp_path)].count(1) == 1
    stage.run(other, make_context(tmp_path))
    assert "resumed" in {event["event"] for event in read_jsonl(tmp_path / "events.jsonl")}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not(ranks, policy, data, tmp_path):
    config = make_config(policy, data)
    one, same, other = (
        weights(Path(stage.run(config, make_context(tmp_path / name, seed))["model"]))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_recomputed_activations_change_nothing(ranks, policy, data, tmp_path):
    for lora in (None, {"rank": 4}):
        none, *others = (
            weights(
                Path(stage.run(make_config(policy, data, lora=lora, gradient_checkpointing=mode), context)["model"])
            )
            for mode, context in (
                (mode, make_context(tmp_path / f"{mode}{bool(lora)}")) for mode in ("none", "full", "selective")
            )
        )
        for other in others:
            for name in none:
                torch.testing.assert_close(none[name], other[name], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_both_implementations_train_alike(ranks, policy, data, tmp_path):
    results = []
    for implementation in ("native", "transformers"):
        model = {"path": str(policy), "dtype": "float32", "implementation": implementation}
        config = make_config(policy, data, model=model, packing=False, batch_tokens=None, batch_size=4)
        stage.run(config, make_context(tmp_path / implementation))
        results.append([line["loss"] for line in steps_of(tmp_path / implementation)])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_stage(ranks, policy, data, tmp_path):
    config = make_config(policy, data, epochs=4, optimizer={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(StageError, match=r"sft: (loss|grad_norm) is (nan|inf) at step \d+; lower optimizer"):
        stage.run(config, make_context(tmp_path))
    assert not (tmp_path / "model").exists()


def test_bad_data_is_found_before_the_model_is_loaded(policy, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    config = make_config(tmp_path / "no-such-model", tmp_path / "d.jsonl")
    with pytest.raises(DataError, match="row 1: messages: the last turn is 'user'"):
        stage.run(config, make_context(tmp_path / "run"))
    with pytest.raises(CheckpointError):
        stage.run(make_config(tmp_path / "no-such-model", write_sums(tmp_path / "ok.jsonl", 2)), make_context(tmp_path))


def test_rows_that_are_too_long_are_an_error_or_dropped_and_counted(policy, data):
    tokenizer, rows = load_tokenizer(policy), load_rows(data, kind="supervised")
    lengths = sorted(len(example.ids) for example in examples_of(policy, data))
    limit = lengths[len(lengths) // 2]
    longer = sum(length > limit for length in lengths)
    with pytest.raises(DataError, match=rf"tokens, but max_length is {limit} \({longer} of 48 rows are too long\)"):
        tokenize(tokenizer, rows, limit, overlong="error")
    examples, dropped = tokenize(tokenizer, rows, limit, overlong="drop")
    assert dropped == longer
    assert max(len(example.ids) for example in examples) == limit
    with pytest.raises(DataError, match="all 48 rows are longer than max_length 3"):
        tokenize(tokenizer, rows, 3, overlong="drop")
    prepared = stage.prepare(make_config(policy, data, max_length=limit, overlong="drop"))
    assert (len(prepared.examples), prepared.counts["rows"], prepared.counts["dropped"]) == (48 - longer, 48, longer)


def test_a_template_that_renders_a_prompt_another_way_is_refused(policy, data):
    tokenizer = load_tokenizer(policy)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- if add_generation_prompt %}", "{%- if add_generation_prompt %}{{- 'Think.' }}"
    )
    with pytest.raises(DataError, match="row 'r0': the prompt before message 2 is not a prefix"):
        tokenize(tokenizer, load_rows(data, kind="supervised"), 128, overlong="error")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch_size": 4}, "packing: true takes batch_tokens and no batch_size"),
        ({"packing": False}, "packing: false takes batch_size and no batch_tokens"),
        ({"max_length": 512}, "batch_tokens 256 is less than max_length 512"),
        ({"resources": {"trainer": {"gpus": 2.0}}}, "a rank uses at most one GPU"),
        ({"batch_token": 3}, "unknown key; did you mean 'batch_tokens'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(policy, data, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        make_config(policy, data, **changes)


@pytest.mark.slow
def test_bf16_training_keeps_updates_that_bf16_would_round_away(ranks, policy, data, tmp_path):
    """Each step moves a weight by less than half a unit in its last place, yet the sum of the steps must be kept."""
    model = {"path": str(policy), "dtype": "bfloat16"}
    # Adam's steps are about as long as the learning rate; a bf16 weight of 0.2 has neighbours at 0.001.
    config = make_config(policy, data, model=model, epochs=8, optimizer={"learning_rate": 1e-4})
    result = stage.run(config, make_context(tmp_path))
    assert result["loss_last"] < result["loss_first"]
    start, end = (load_model(path, dtype="bfloat16").state_dict() for path in (policy, result["model"]))
    assert {value.dtype for value in end.values()} == {torch.bfloat16}
    large = {name: start[name].abs() > 0.2 for name in start}
    moved = [(start[name] != end[name])[large[name]].float() for name in start if large[name].any()]
    assert torch.cat(moved).mean() > 0.1  # rounded after each step, none of these would have moved


def ends_early(
    policy: Path, data: Path, context: StageContext, *, best: int, learning_rate: float, **layout: Any
) -> tuple[dict[str, Any], SftConfig]:
    """What a stage reports that ends early, and its config.

    The held-out replies are unlike those that are trained on, so that their loss rises after step `best`.
    """
    reply = {"role": "assistant", "content": "zyx! wvu? tsr; qpo." * 2}
    rows = [{"messages": [{"role": "user", "content": f"Say {index}"}, reply]} for index in range(9)]
    write_jsonl(context.dir / "apart.jsonl", rows)
    apart = {"path": str(context.dir / "apart.jsonl"), "every": 2, "keep_best": True, "patience": 2}
    changes = {"epochs": 9, "optimizer": {"learning_rate": learning_rate}, "checkpoint_every": 3}
    config = make_config(policy, data, held_out=apart, **changes, **layout)
    result = stage.run(config, context)
    lines = held_out_losses(context.dir)
    assert list(lines) == list(range(0, best + 5, 2))
    names = ("steps", "best_step", "result_step", "stopped_early", "rows", "held_out_rows")
    assert [result[name] for name in names] == [best + 4, best, best, True, 48, 9]
    assert result["held_out_loss_best"] == min(lines.values()) == lines[best]
    exported, held_out = load_model(result["model"], dtype="float32"), stage.prepare(config).held_out
    assert mean_loss(exported, held_out) == pytest.approx(result["held_out_loss_best"], rel=1e-4)
    return result, config


def held_out_losses(folder: Path) -> dict[int, float]:
    """The held-out loss by step."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def mean_loss(model: Any, examples: list[Example]) -> float:
    """The mean negative log-likelihood of trained tokens, one conversation at a time."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([list(example.ids)])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        on = torch.tensor(list(example.mask[1:]), dtype=torch.bool)
        total -= float(logps[on].sum())
        count += int(on.sum())
    return total / count


@pytest.mark.slow
def test_a_stage_ends_early_with_the_best_model_also_when_it_was_stopped(ranks, policy, data, tmp_path):
    """Stopped between the end of the training and its export, then with more epochs, and soon after the best step."""
    context = make_context(tmp_path / "run")
    result, config = ends_early(policy, data, context, best=2, learning_rate=3e-2)
    checkpoints, lines = context.dir / "checkpoints", held_out_losses(context.dir)
    assert {path.name for path in checkpoints.glob("step_*")} == {"step_2", "step_3", "step_6"}
    before = weights(context.dir / "model")
    again = stage.run(config.model_copy(update={"epochs": 12}), context)
    ends = [event for event in read_jsonl(context.events) if event["event"] in ("ended_early", "not_continued")]
    assert [event.pop("event") for event in ends] == ["ended_early", "not_continued"]
    for event in ends:
        assert [event[name] for name in ("step", "best_step", "misses", "patience")] == [6, 2, 2, 2]
    for name in ("step_3", "step_6"):
        shutil.rmtree(checkpoints / name)
    once_more = stage.run(config, context)
    assert [event["step"] for event in read_jsonl(context.events) if event["event"] == "resumed"] == [6, 2]
    for name in ("steps", "best_step", "stopped_early", "held_out_loss_best", "held_out_loss_last"):
        assert result[name] == again[name] == once_more[name], name
    assert held_out_losses(context.dir) == lines
    after = weights(context.dir / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
