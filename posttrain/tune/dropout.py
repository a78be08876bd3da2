"""Dropout of LoRA adapters that does not depend on how a step is split into forwards and ranks.

A hash decides whether an input of an adapter is dropped. It is computed from the seed, the step, the tokens of the row,
the token's position in the row, the adapter and the index of the input. No random generator is used. So a row has the
same dropout in any forward of the step, on any rank, after a resume, and when gradient checkpointing computes it again.
Two equal rows in one step have the same dropout, too.

Left out: adapters of all experts at once, which peft adds to the weight (the config refuses dropout with them).
"""

import hashlib
from typing import Any

import torch
from torch import nn

from posttrain.errors import ConfigError

# Odd constants of the splitmix64 generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
# 2014), as signed integers: torch's int64 wraps around in a product, as the generator's unsigned ones do.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
BITS = 53  # bits of a uniform random number, as many as the mantissa of a double has


def mixed(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on int64 of any shape: every bit of the result depends on every bit of `x`."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right as if `x` was unsigned. The shift of torch copies the sign bit instead."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def token_keys(ids_BS: torch.Tensor, positions_BS: torch.Tensor | None, mask_BS: torch.Tensor | None) -> torch.Tensor:
    """An int64 key for each token, [B, S], from the ids of its whole row and its position in it.

    positions_BS: start again at 0 for each row that is packed into a sequence. mask_BS: 0 for padding, which does not
    change the keys.
    """
    real_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS.to(ids_BS.dtype)
    if positions_BS is None:
        positions_BS = real_BS.cumsum(-1) - 1
    starts_BS = (positions_BS == 0) & (real_BS != 0)
    starts_BS[:, 0] = True  # also if the row begins with padding
    row_T = starts_BS.flatten().cumsum(0) - 1
    token_BS = mixed(mixed(ids_BS.long() + GOLDEN) + positions_BS.long() * GOLDEN) * real_BS.long()
    rows = torch.zeros(int(row_T[-1]) + 1, dtype=torch.int64, device=ids_BS.device)
    rows.index_add_(0, row_T, token_BS.flatten())  # a sum of integers does not depend on its order
    return mixed(rows[row_T].view_as(ids_BS) + positions_BS.long() * SECOND)


class TokenDropout(nn.Module):
    """Replaces `nn.Dropout` before an adapter. Like it, it scales the inputs that it keeps by 1 / (1 - share)."""

    def __init__(self, keys: "RowKeys", share: float, *, salt: int, name: str):
        """salt: a number that differs from that of other adapters. name: the adapted module, for messages."""
        super().__init__()
        self.share, self.salt, self.name = share, salt, name
        self._keys = keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., D]. It must have as many tokens as the input of the model; ConfigError is raised otherwise."""
        if not self.training:
            return x
        keys = self._keys.of_step()
        if keys.numel() * x.shape[-1] != x.numel():
            rule = f"{self.name} is not applied to every token, and dropout is drawn for a token of a row"
            raise ConfigError("lora.dropout", [f"got {self.share}: {rule}; set dropout: 0.0 or leave the module out"])
        inputs = torch.arange(x.shape[-1], device=x.device) * GOLDEN + self.salt
        hashed = mixed(keys.view(*x.shape[:-1], 1) + inputs)
        kept = _shifted(hashed, 64 - BITS) >= int(self.share * (1 << BITS))
        return x * kept / (1 - self.share)


class RowKeys:
    """The keys of the tokens in the current forward of a model. All its `TokenDropout` modules read them.

    step: the optimizer step. The training sets it before each forward.
    """

    def __init__(self, seed: int):
        self.step = 0
        self._seed = seed
        self._keys_BS: torch.Tensor | None = None

    def of_step(self) -> torch.Tensor:
        """The keys of the last forward, [B, S], hashed with seed and step."""
        assert self._keys_BS is not None
        seed = torch.tensor(self._seed, device=self._keys_BS.device)
        return mixed(self._keys_BS + mixed(seed * GOLDEN + self.step))

    def note(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Compute the keys of a forward. It is called as a hook before the forward of the model."""
        if module.training:
            ids_BS = named["input_ids"] if "input_ids" in named else arguments[0]
            self._keys_BS = token_keys(ids_BS, named.get("position_ids"), named.get("attention_mask"))


def use_row_dropout(model: Any, seed: int) -> RowKeys:
    """Replace the dropout of each adapter of a `PeftModel` by `TokenDropout`. Returns the keys that they read."""
    from peft.tuners.lora import LoraLayer

    keys = RowKeys(seed)
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, dropout in module.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
                module.lora_dropout[adapter] = TokenDropout(keys, dropout.p, salt=salt, name=name)
    model.get_base_model().base_model.register_forward_pre_hook(keys.note, with_kwargs=True)
    return keys
