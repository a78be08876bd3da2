"""Held-out rows: which rows they are, what is measured on them, and how the measurements end a training.

Whole stages with held-out rows are run in test_sft.py, test_dpo.py and test_parallel_stages.py, whose ranks are warm.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_dpo
import test_sft
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from posttrain.cli.outcome import notice_text
from posttrain.config.held_out import HeldOutConfig
from posttrain.context import StageContext
from posttrain.data.held_out import prompt_key, split
from posttrain.errors import ConfigError, DataError
from posttrain.files import read_jsonl, write_jsonl
from posttrain.model import load_model
from posttrain.pipeline.changes import find_changes
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS
from posttrain.records import Message
from posttrain.sft import stage as sft
from posttrain.sft.packing import blank_record, to_records
from posttrain.tune.held_out import HeldOutCallback, Standing, batches, evaluate
from posttrain.tune.home import StageHere
from posttrain.tune.run import training_recipe
from posttrain.tune.steps import rows_and_blank

# --- which rows ---


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(1, 40), st.randoms())
def test_the_split_follows_the_content_and_keeps_prompts_together(prompts: list[int], count: int, random: Any):
    keys = [f"prompt {prompt}" for prompt in prompts]
    config = HeldOutConfig(rows=count)
    if count >= len(prompts) or len(set(prompts)) == 1:
        with pytest.raises(DataError, match="none would be left to train on"):
            split(prompts, keys, config)
        return
    kept, apart = split(prompts, keys, config)
    assert kept
    assert apart
    assert sorted([*kept, *apart]) == sorted(prompts)
    assert not set(kept) & set(apart)
    fits = min(prompts.count(prompt) for prompt in prompts) <= count
    assert len(apart) <= count or not fits
    again = list(prompts)
    random.shuffle(again)
    assert sorted(split(again, [f"prompt {prompt}" for prompt in again], config)[1]) == sorted(apart)


def test_a_share_is_a_number_of_rows():
    rows = list(range(200))
    for fraction, count in ((0.05, 10), (0.001, 1), (0.5, 100)):
        assert len(split(rows, [str(row) for row in rows], HeldOutConfig(fraction=fraction))[1]) == count


def test_a_prompt_ends_where_the_first_trained_reply_begins():
    user, first, again = Message("user", "a"), Message("assistant", "b", trained=False), Message("user", "c")
    same = [prompt_key([user, first, again, Message("assistant", text)]) for text in ("d", "e")]
    assert same[0] == same[1] != prompt_key([user, Message("assistant", "b")])
    assert prompt_key([Message("assistant", "x")]) != prompt_key([Message("assistant", "y")])


@pytest.mark.parametrize(
    ("held_out", "problem"),
    [
        ({"keep_best": True}, "got none of them: exactly one of fraction, rows and path"),
        ({"rows": 2, "fraction": 0.5}, "got fraction and rows: exactly one of"),
        ({"fraction": 1.0}, "less than 1"),
        ({"rows": 2, "patience": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(held_out: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        HeldOutConfig.model_validate(held_out)


def test_the_best_model_is_not_kept_while_a_bias_of_routers_fades(policy: Path, data: Path):
    model = {"path": str(policy), "dtype": "float32", "router": {"bias_rate": 0.1}}
    with pytest.raises(ConfigError, match=r"held_out.keep_best: got true with model.router.bias_rate 0.1"):
        test_sft.make_config(policy, data, model=model, held_out={"rows": 4, "keep_best": True})


def test_validate_finds_a_share_that_leaves_nothing(policy: Path, data: Path, tmp_path: Path):
    def problems(**held_out: Any) -> list[str]:
        return input_problems(test_sft.make_config(policy, data, held_out=held_out), KINDS["sft"])

    assert problems(rows=47) == []
    assert problems(rows=48) == ["held_out.rows: got 48: of 48 rows none would be left to train on; lower it"]
    assert problems(fraction=0.99) == [
        "held_out.fraction: got 0.99: of 48 rows none would be left to train on; lower it"
    ]
    assert problems(path=str(tmp_path / "x")) == [f"held_out.path: got '{tmp_path}/x': no such file or folder"]


def test_rows_of_a_file_of_their_own_must_not_be_trained_on(policy: Path, data: Path, tmp_path: Path):
    rows = list(read_jsonl(data))
    write_jsonl(tmp_path / "own.jsonl", [{**row, "id": f"own {row['id']}"} for row in rows[5:8]])
    config = test_sft.make_config(policy, data, held_out={"path": str(tmp_path / "own.jsonl")})
    with pytest.raises(DataError, match=r"'own r5' has the same content as 'r5', which is trained on \(3 such rows\)"):
        sft.read_rows(config)
    write_jsonl(tmp_path / "rest.jsonl", rows[:5] + rows[8:])
    config = test_sft.make_config(policy, tmp_path / "rest.jsonl", held_out={"path": str(tmp_path / "own.jsonl")})
    assert [len(side) for side in sft.read_rows(config)] == [45, 3]


# --- what is made of the figures ---


def course(losses: Sequence[float], **config: Any) -> list[tuple[int | None, bool]]:
    """(step that is kept, whether the training ends) after each step."""
    evaluation, seen = HeldOutCallback(None, HeldOutConfig(rows=1, **config), None), []
    for step, loss in enumerate(losses, 1):
        if evaluation.is_due(step, len(losses)):
            evaluation.take(step, loss)
        seen.append((evaluation.kept_step, evaluation.has_ended))
    return seen


def test_the_best_is_kept_and_patience_counts_evaluations_without_a_better_one():
    losses = [2.0, 1.0, 1.5, 0.9, 0.9, 1.2, 0.8]
    assert [step for step, _ in course(losses, every=1, keep_best=True)] == [1, 2, 2, 4, 4, 4, 7]
    assert [step for step, _ in course(losses, every=2, keep_best=True)] == [None, 2, 2, 4, 4, 4, 7]
    assert [ends for _, ends in course(losses, every=1, patience=2)] == [False] * 5 + [True, False]
    assert [step for step, _ in course(losses, every=1)] == [None] * 7


def test_the_start_is_kept_where_no_step_is_better_and_counts_no_miss():
    evaluation = HeldOutCallback(None, HeldOutConfig(rows=1, every=2, keep_best=True, patience=2), None)
    for step, loss in ((0, 1.0), (2, 1.5), (4, 1.0)):
        assert not evaluation.has_ended
        evaluation.take(step, loss)
    assert evaluation.has_ended
    report = evaluation.report(4)
    assert (report["best_step"], report["result_step"], report["held_out_loss_first"]) == (0, 0, 1.0)


def test_the_evaluation_of_the_last_step_never_ends_the_training_early():
    assert not course([1.0, 2.0, 2.0, 2.0, 2.0], every=2, patience=2)[-1][1]
    assert course([1.0, 1.0, 2.0, 2.0, 2.0, 2.0], every=2, patience=2)[-1][1]


def test_an_early_end_is_part_of_the_checkpoint(tmp_path: Path):
    config = HeldOutConfig(rows=1, every=1, patience=1, keep_best=True)
    evaluation = HeldOutCallback(None, config, None)
    evaluation.take(1, 1.0)
    evaluation.take(2, 1.5)
    (tmp_path / "checkpoint-2").mkdir()
    state = SimpleNamespace(global_step=2, is_world_process_zero=True)
    evaluation.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    stage: Any = SimpleNamespace(model=SimpleNamespace(path="start"))
    here = StageHere(stage, StageContext("sft", tmp_path, tmp_path / "events.jsonl"))
    again = HeldOutCallback(None, config, here, resumed=tmp_path / "checkpoint-2")
    assert again.standing == evaluation.standing == Standing(1, 1.0, 1, 1.0, 1.5)
    control = SimpleNamespace(should_training_stop=False)
    again.on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, control)
    assert control.should_training_stop


def test_an_early_end_is_explained_with_what_to_change():
    evaluation = HeldOutCallback(None, HeldOutConfig(rows=1, every=1, patience=2), None)
    for step in range(3):
        evaluation.take(step, 1.0 + step)
    text = {name: notice_text("sft", {"event": name, "step": 2, **evaluation.end()}) for name in (
        "ended_early", "not_continued")}  # fmt: skip
    why = "2 evaluations in a row did not lower the held-out loss of the start (held_out.patience: 2)"
    assert text["ended_early"] == f"sft  the training ended early after step 2: {why}"
    assert text["not_continued"].startswith("sft  nothing more is trained: ")
    assert text["not_continued"].endswith(f"because {why}; to train on, raise held_out.patience or set it to null")


@pytest.mark.parametrize(("old", "new", "goes_on"), [(2, 3, True), (2, None, True), (3, 2, False), (None, 2, False)])
def test_more_patience_continues_a_training(policy: Path, data: Path, old: int | None, new: int | None, goes_on: bool):
    """That is, from its checkpoints, which must be of the same training then."""
    before, after = (
        test_sft.make_config(policy, data, held_out={"rows": 4, "patience": patience}) for patience in (old, new)
    )
    parts = {"kind": "sft", "seed": 0, "inputs": {}, "stages": {}, "code": {}}
    bases = [{**parts, "config": config.model_dump(mode="json")} for config in (before, after)]
    (change,) = find_changes(bases[0], bases[1], after, upstream={})
    assert change.text.startswith("held_out.patience: ")
    assert change.goes_on == goes_on
    assert training_recipe(before, frozenset({"data"})) == training_recipe(after, frozenset({"data"}))


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5))
def test_each_row_is_in_one_batch_of_one_rank_and_all_ranks_have_as_many(rows: int, size: int, ranks: int):
    found = [list(batches(rows, size, rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(own) for own in found}) == 1
    indices = [index for own in found for batch in own for index in batch]
    assert sorted(index for index in indices if index < rows) == list(range(rows))
    assert all(len(batch) <= size for own in found for batch in own)


# --- what is measured ---


class OneOf:
    """Stands for the other ranks in `evaluate`: records the sums of this rank instead of adding those of the others."""

    def __init__(self, rank: int, ranks: int):
        self.process_index, self.num_processes = rank, ranks
        self.sums = torch.zeros(())

    def reduce(self, sums: torch.Tensor, reduction: str) -> torch.Tensor:
        self.sums = sums
        return sums


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_of_sft_is_the_mean_over_trained_tokens_however_rows_are_divided(
    policy: Path, data: Path, tmp_path: Path, packed: bool
):
    changes = {} if packed else {"packing": False, "batch_tokens": None, "batch_size": 3}
    config = test_sft.make_config(policy, data, **changes)
    examples = test_sft.examples_of(policy, data)[:11]
    trainer = test_sft.make_trainer(config, tmp_path)
    blank = blank_record(examples[0], packed=packed)
    trainer.eval_dataset = rows_and_blank(to_records(examples, config.batch_tokens, 0), blank)
    expected = test_sft.mean_loss(load_model(policy, dtype="float32"), examples)
    trainer.model.train()
    assert evaluate(trainer) == {"held_out_loss": pytest.approx(expected, rel=1e-5)}
    assert trainer.model.training
    whole, parts = trainer.accelerator, [OneOf(rank, 2) for rank in range(2)]
    for trainer.accelerator in parts:
        evaluate(trainer)
    trainer.accelerator = whole
    nll, tokens = sum(part.sums for part in parts).tolist()
    assert tokens == sum(sum(example.mask) for example in examples)
    assert nll / tokens == pytest.approx(expected, rel=1e-5)


def test_the_figures_of_dpo_are_means_over_pairs(policy: Path, tmp_path: Path):
    """Against the formulas written out, with a policy that has moved from its reference."""
    tokenizer = test_dpo.load_tokenizer(policy)
    ids, _ = test_dpo.tokenize_pairs(tokenizer, test_dpo.make_pairs(7), 128, overlong="error")
    config = test_dpo.make_config(policy, pairs={"path": "x"}, batch_size=2, beta=0.3, nll_weight=0.2)
    trainer = test_dpo.make_trainer(config, ids, tmp_path)
    trainer.eval_dataset = trainer.train_dataset  # with the reference's log-probabilities
    start = load_model(policy, dtype="float32")
    with torch.no_grad():
        weight = trainer.model.lm_head.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        logps = [
            [
                [
                    test_dpo.reply_logprob(model, item.prompt_ids, reply)
                    for reply in (item.chosen_ids, item.rejected_ids)
                ]
                for model in (trainer.model.eval(), start)
            ]
            for item in ids
        ]
    margins = [0.3 * float(now[0].sum() - then[0].sum() - now[1].sum() + then[1].sum()) for now, then in logps]
    nll = -float(torch.cat([now[0] for now, _ in logps]).mean())
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / 7 + 0.2 * nll
    found = evaluate(trainer)
    assert found["held_out_loss"] == pytest.approx(loss, rel=1e-4)
    assert found["held_out_margin"] == pytest.approx(sum(margins) / 7, rel=1e-4)
    assert found["held_out_accuracy"] == sum(margin > 0 for margin in margins) / 7
