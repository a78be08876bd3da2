"""Dropout of adapters: what is dropped follows from row, position, step and adapter, and from nothing else."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.tune.dropout import RowKeys, TokenDropout, token_keys

ROWS = [[5, 9, 2, 7], [9, 5], [4, 4, 4]]
SHARE = 0.25


def padded(rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = 2 + max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + real if left else real + pad for real, pad in zip(ones, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def dropped(ids, positions=None, mask=None, *, step=3, seed=1, salt=7, width=4096):
    """What an adapter is given in place of ones, [B, S, width]."""
    keys = RowKeys(seed)
    keys.step = step
    keys.note(torch.nn.Identity(), (), {"input_ids": ids, "position_ids": positions, "attention_mask": mask})
    return TokenDropout(keys, SHARE, salt=salt, name="q_proj")(torch.ones(*ids.shape, width))


def test_a_row_has_the_same_keys_alone_padded_and_packed():
    alone = torch.cat([token_keys(torch.tensor([row]), None, None)[0] for row in ROWS])
    packed = torch.tensor([[token for row in ROWS for token in row]])
    positions = torch.tensor([[i for row in ROWS for i in range(len(row))]])
    assert token_keys(packed, positions, None)[0].tolist() == alone.tolist()
    for left in (False, True):
        ids, mask = padded(ROWS, left=left)
        assert token_keys(ids, None, mask)[mask.bool()].tolist() == alone.tolist()
    assert len(set(alone.tolist())) == len(alone)


def test_a_share_is_dropped_and_the_rest_scaled():
    ids = torch.arange(64)[None]
    kept = dropped(ids)
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / (1 - SHARE))]
    count = kept.numel()
    spread = (SHARE * (1 - SHARE) / count) ** 0.5  # of a fair draw; the hash is fixed, and so is this figure
    assert abs(float((kept == 0).double().mean()) - SHARE) < 4 * spread
    per_token = (kept == 0).double().mean(-1)
    assert float((per_token - SHARE).abs().max()) < 5 * (SHARE * (1 - SHARE) / kept.shape[-1]) ** 0.5


@pytest.mark.parametrize("other", [{"step": 4}, {"seed": 2}, {"salt": 8}])
def test_other_steps_seeds_and_adapters_drop_others(other):
    ids = torch.arange(64)[None]
    both = (dropped(ids) == 0) & (dropped(ids, **other) == 0)
    assert float(both.double().mean()) == pytest.approx(SHARE**2, rel=0.05)
    assert torch.equal(dropped(ids), dropped(ids))


def test_nothing_is_dropped_outside_training():
    dropout = TokenDropout(RowKeys(0), SHARE, salt=0, name="q_proj").eval()
    assert torch.equal(dropout(torch.ones(2, 3)), torch.ones(2, 3))


def test_a_module_that_does_not_see_every_token_is_refused():
    keys = RowKeys(0)
    keys.note(torch.nn.Identity(), (), {"input_ids": torch.tensor([[1, 2, 3]])})
    with pytest.raises(ConfigError, match=r"lora.dropout: got 0.25: expert_3 is not applied to every token"):
        TokenDropout(keys, SHARE, salt=0, name="expert_3")(torch.ones(2, 8))
