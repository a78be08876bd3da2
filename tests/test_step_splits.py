"""What one optimizer step learns does not depend on how its rows are split into forwards, nor on their order.

Nor on whether rows that begin alike share their beginning. With the trainers of the stages on a tiny model in one
process, and blank rows among the forwards, as a rank gets them that finds no more rows; tests/test_parallel_stages.py
and tests/test_rl_trainer.py have the same property over ranks.
Losses on routers and dropout of adapters are included.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_dpo
import test_rl_trainer
import test_sft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.pairs import Pair
from posttrain.dpo.examples import tokenize_pairs
from posttrain.dpo.losses import LOSSES as PAIR_LOSSES
from posttrain.model import load_tokenizer
from posttrain.model.router_balance import RouterBalance
from posttrain.records import Message
from posttrain.rl.losses import LOSSES as RL_LOSSES
from posttrain.rl.training.forward import forward_share
from posttrain.rl.training.policy import load_token_policy
from posttrain.sft.packing import blank_record, to_records

ROWS = 12
BLANK = ROWS  # the row behind the others
LORA = {"rank": 4, "dropout": 0.3, "target_modules": ["q_proj", "o_proj", "up_proj"]}
ROUTER = {"z_loss": 0.1, "balance_loss": 0.2}
Split = list[list[int]]  # which rows each forward has
Step = tuple[float, torch.Tensor]


@st.composite
def splits(draw: Any, rows: int = ROWS) -> Split:
    """All rows once, in any order, in any number of forwards of any sizes."""
    order = draw(st.permutations(range(rows)))
    cuts = [0, *sorted(draw(st.sets(st.integers(1, rows - 1)))), rows]
    return [list(order[start:end]) for start, end in itertools.pairwise(cuts)]


def have_loads(model: Any) -> None:
    """Give the routers of a model uneven loads of a step before, as a training does after its first step."""
    balance = RouterBalance(model, rate=0.0)
    load_E = torch.arange(1.0, balance.load_LE.shape[1] + 1)
    balance.load_state({**balance.state(), "load": (load_E / load_E.sum()).expand(balance.load_LE.shape).tolist()})


def move(model: Any) -> None:
    """Change what is trained: the head, and adapters, whose product is 0 at first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or (name.endswith("lm_head.weight") and parameter.requires_grad):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def step_of(trainer: Any, batches: Sequence[Any]) -> Step:
    """Loss and gradient of one optimizer step of a TRL trainer whose forwards are given."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = len(batches)
    given_batches, counts = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    loss = sum(float(trainer.training_step(trainer.model, dict(batch), counts)) for batch in given_batches)
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def check_same(step: Step, whole: Step) -> None:
    """But for fp32 rounding: of terms of size 1, which may cancel, and of gradients, about 1e-6 of the largest."""
    assert step[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(step[1], whole[1], rtol=1e-4, atol=1e-5 * float(whole[1].abs().max()))


@pytest.fixture(scope="module", params=[*sorted(PAIR_LOSSES), "sigmoid with adapters"])
def pair_step(request, policy: Path, tmp_path_factory) -> tuple[Callable[[Split], Step], Step]:
    """A step of DPO with a supervised term, on pairs of many lengths; the policy has moved from the reference.

    The two replies of a pair share its prompt. Also the whole step, in one forward and without sharing.
    """
    pairs = [
        Pair(
            f"p{i}",
            "sums",
            (Message("user", f"Sum: {i} + 2"),),
            "1 + 2 = 3, " * (i % 5) + "Answer: 3",
            "No. " * (i + 1),
        )
        for i in range(ROWS)
    ]
    ids, _ = tokenize_pairs(load_tokenizer(policy), pairs, 128, overlong="error")
    model = {"path": str(policy), "dtype": "float32", "router": ROUTER}
    loss, *adapters = request.param.split(" with ")
    lora = LORA if adapters else None
    config = test_dpo.make_config(policy, pairs={"path": "x"}, loss_type=loss, nll_weight=0.5, model=model, lora=lora)
    trainer = test_dpo.make_trainer(config, ids, tmp_path_factory.mktemp("dpo"))
    have_loads(trainer.model)
    rows = list(trainer.train_dataset)
    move(trainer.model)

    def step(split: Split) -> Step:
        return step_of(trainer, [trainer.data_collator([rows[i] for i in part]) for part in split])

    trainer.shares_prompts = False
    whole = step([list(range(ROWS))])
    trainer.shares_prompts = True
    return step, whole


@settings(max_examples=8)
@given(split=splits(), blanks=st.integers(0, 2))
def test_a_step_of_dpo_is_the_same_however_it_is_split(pair_step, split, blanks):
    step, whole = pair_step
    check_same(step(split + [[BLANK]] * blanks), whole)


@settings(max_examples=8)
@given(split=splits(), blanks=st.integers(0, 2))
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_sft_is_the_same_however_it_is_split(sft_trainers, packed, adapted, split, blanks):
    """Packed, a forward is one row of several conversations; else a padded batch of them."""
    trainer, examples, whole = sft_trainers[packed, adapted]
    check_same(sft_step(trainer, examples, split, packed=packed, blanks=blanks), whole)


def sft_step(trainer: Any, examples: list[Any], split: Split, *, packed: bool, blanks: int = 0) -> Step:
    capacity = 1 << 20 if packed else None
    forwards = [to_records([examples[i] for i in part], capacity, seed=0) for part in split]
    forwards += [[blank_record(examples[0], packed=packed)]] * blanks
    return step_of(trainer, [trainer.data_collator(rows) for rows in forwards])


@pytest.fixture(scope="module")
def sft_trainers(policy: Path, data: Path, tmp_path_factory) -> dict[tuple[bool, bool], tuple[Any, list[Any], Step]]:
    """By (packed, adapted): a trainer, its rows, and the whole step in one forward."""
    model = {"path": str(policy), "dtype": "float32", "router": ROUTER}
    alone = {"packing": False, "batch_tokens": None, "batch_size": 4}
    made = {
        (packed, adapted): (
            test_sft.make_trainer(
                test_sft.make_config(
                    policy, data, model=model, lora=LORA if adapted else None, **({} if packed else alone)
                ),
                tmp_path_factory.mktemp("sft"),
            ),
            test_sft.examples_of(policy, data)[:ROWS],
        )
        for packed in (False, True)
        for adapted in (False, True)
    }
    found = {}
    for (packed, adapted), (trainer, examples) in made.items():
        have_loads(trainer.model)
        move(trainer.model)
        whole = sft_step(trainer, examples, [list(range(ROWS))], packed=packed)
        found[packed, adapted] = trainer, examples, whole
    return found


@pytest.fixture(scope="module")
def token_policy(policy: Path) -> Any:
    config = test_rl_trainer.make_config(str(policy), ROUTER)
    loaded = load_token_policy(config.model, config.sampling.temperature)
    have_loads(loaded)
    return loaded


@settings(max_examples=6)
@given(split=splits(7))
@pytest.mark.parametrize("name", sorted(RL_LOSSES))
def test_a_step_of_rl_is_the_same_however_it_is_split(policy, token_policy, name, split):
    """With the entropy bonus and the reference term, which go with any of the losses.

    Rollouts to one prompt share it where they are in one forward; the whole step is also taken without sharing.
    """
    loss = {"name": name, "entropy_bonus": 0.01, "reference": {"weight": 0.2, "estimator": "k3", "ratio_cap": 3.0}}
    config = test_rl_trainer.make_config(str(policy), ROUTER, loss=loss, resources={"reference": {}})
    samples = test_rl_trainer.batch(0)

    def step(parts: Split, *, shared: bool = True) -> Step:
        token_policy.shares_prefixes = shared
        token_policy.zero_grad()
        total = 0.0
        for part in parts:
            chunk = [samples[i] for i in part]
            share = forward_share(
                token_policy, chunk, samples, config=config.loss, max_tokens=config.sampling.max_tokens, device="cpu"
            )
            share.loss.backward()
            total += float(share.loss.detach())
        return total, torch.cat([p.grad.flatten() for p in token_policy.parameters() if p.grad is not None])

    whole = step([list(range(7))], shared=False)
    check_same(step([list(range(7))]), whole)
    check_same(step(split), whole)
