"""The native Llama 4 against transformers' Llama4ForCausalLM, with settings that make every detail visible.

The sequence is longer than a chunk and than floor_scale, rows are padded on the left, norms are not 1 and weights are
large. With weaker settings most of the mutations below would not be detected.
"""

import copy
import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_exact, error_and_bound, float64_inside
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm

from posttrain.model import NativeLlama4ForCausalLM, attention, norm, placement, rope
from posttrain.model.moe import MoE
from posttrain.model.recompute import checkpointing_arguments
from posttrain.model.visibility import CausalRows, packed_segments

LENGTH = 23


def hostile_config(**changes) -> Llama4TextConfig:
    rope_parameters = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 40,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 3,
        "attention_chunk_size": 5, "floor_scale": 4, "attn_scale": 0.7, "max_position_embeddings": 128,
        "rope_parameters": rope_parameters, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return Llama4TextConfig(**settings | changes)


def model_pair(scale: float = 0.3, **changes) -> tuple[Llama4ForCausalLM, NativeLlama4ForCausalLM]:
    """Both implementations with the same large random weights, loaded strictly each from the other."""
    config = hostile_config(**changes)
    generator = torch.Generator().manual_seed(7)
    native_model = NativeLlama4ForCausalLM(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for weight in native_model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.5 * noise if weight.dim() == 1 else scale * noise)
    theirs = Llama4ForCausalLM(copy.deepcopy(config)).eval()
    theirs.load_state_dict(native_model.state_dict(), strict=True)
    native_model.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, native_model


def batch(padding: tuple[int, ...] = (0, 0, 0)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, 61, (len(padding), LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}


PADDED = (7, 2, 0)


def logit_errors(theirs, ours, inputs) -> tuple[float, float]:
    """Largest error on real tokens against transformers in float64, relative to the largest logit; and its bound."""
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        peer, got = theirs(**inputs).logits[real], ours(**inputs).logits[real]
        with float64_inside():
            exact = copy.deepcopy(theirs).double()(**inputs).logits[real]
    return error_and_bound({"": got}, {"": peer}, {"": exact})


def assert_same_logits(theirs, ours, inputs) -> None:
    error, bound = logit_errors(theirs, ours, inputs)
    assert error <= bound


def gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), named_gradients(model)


def named_gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def gradient_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest gradient."""
    largest = max(grad.abs().max() for grad in want.values())
    return max(((got[name] - want[name]).abs().max() / largest).item() for name in want)


# --- parity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0, 0), PADDED])
def test_logits_equal_transformers(top_k, padding):
    theirs, ours = model_pair(num_experts_per_tok=top_k)
    assert_same_logits(theirs, ours, batch(padding))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_qk_norm": False},
        {"attn_temperature_tuning": False},
        {"attention_bias": True},
        {"moe_layers": [0, 3]},
        {"no_rope_layers": [0, 1, 0, 1]},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}},
        {"attention_chunk_size": 23},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_variants_of_the_config_equal_transformers(changes):
    theirs, ours = model_pair(**changes)
    assert_same_logits(theirs, ours, batch())
    assert_same_logits(theirs, ours, batch(PADDED))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0, 0), PADDED])
def test_gradients_equal_transformers(top_k, padding):
    theirs, ours = model_pair(scale=0.15, num_experts_per_tok=top_k)
    inputs = batch(padding)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    peer_loss, peer = gradients(theirs, **inputs, labels=labels)
    got_loss, got = gradients(ours, **inputs, labels=labels)
    with float64_inside():
        exact_loss, exact = gradients(copy.deepcopy(theirs).double(), **inputs, labels=labels)
    assert_as_exact(got_loss, peer_loss, exact_loss)
    assert_as_exact(got, peer, exact)


def test_right_padding_equals_transformers_on_real_tokens():
    theirs, ours = model_pair()
    inputs = batch()
    inputs["attention_mask"][0, 15:] = 0
    inputs["attention_mask"][1, 20:] = 0
    assert_same_logits(theirs, ours, inputs)


def test_logits_to_keep_and_hidden_states_are_parts_of_the_whole_output():
    _, ours = model_pair()
    inputs = batch(PADDED)
    full = ours(**inputs, output_hidden_states=True)
    torch.testing.assert_close(ours(**inputs, logits_to_keep=3).logits, full.logits[:, -3:])
    hidden = ours.model(**inputs).last_hidden_state
    torch.testing.assert_close(ours.lm_head(hidden), full.logits)
    assert len(full.hidden_states) == 5
    torch.testing.assert_close(full.hidden_states[-1], hidden)


@pytest.mark.parametrize("padding", [(0, 0, 0), PADDED])
def test_cached_generation_equals_transformers_token_for_token(padding):
    theirs, ours = model_pair(num_experts_per_tok=2)
    inputs = batch(padding)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "output_scores": True}
    want = theirs.generate(**inputs, **settings, return_dict_in_generate=True)
    got = ours.generate(**inputs, **settings, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences)
    uncached = ours.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(uncached, want.sequences)


def test_bf16_norm_rounds_before_the_weight():
    torch.manual_seed(0)
    theirs, ours = Llama4TextRMSNorm(64, 1e-5).bfloat16(), norm.RMSNorm(64, 1e-5).bfloat16()
    weight = torch.randn(64).bfloat16()
    theirs.weight.data, ours.weight.data = weight, weight
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(ours(x), theirs(x))
    assert not torch.equal(F.rms_norm(x.float(), (64,), weight.float(), 1e-5).bfloat16(), theirs(x))


def test_each_implementation_reads_the_folders_of_the_other(tmp_path):
    theirs, ours = model_pair()
    inputs = batch()
    ours.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForCausalLM"]
    assert config["model_type"] == "llama4_text"
    reread = Llama4ForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(reread(**inputs).logits, theirs(**inputs).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    back = NativeLlama4ForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(back(**inputs).logits, ours(**inputs).logits)


# --- mutations: each detail, broken on purpose, must be seen ---------------------------------------------------


def _rotate_half(x, rotations):
    cos, sin = rotations.real.repeat(1, 1, 1, 2), rotations.imag.repeat(1, 1, 1, 2)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _set_on_attention(name, value):
    def mutate(patch, model):
        for layer in model.model.layers:
            patch.setattr(layer.self_attn, name, value(layer.self_attn))

    return mutate


def _set_in_config(name, value):
    return lambda patch, model: patch.setattr(model.config, name, value)


def _patch_temperature(change):
    def mutate(patch, model):
        patch.setattr(attention, "attention_temperature", change(rope.attention_temperature))

    return mutate


def _patch_moe(routed):
    return lambda patch, model: patch.setattr(MoE, "_routed", routed(MoE._routed))


def _score_on_output(original):
    def routed(self, x, chosen, ids):
        ones = torch.full_like(chosen, 40.0)  # sigmoid(40) is 1
        parts = [original(_AsTopOne(self), x, ones[:, k : k + 1], ids[:, k : k + 1]) for k in range(ids.shape[1])]
        return sum(part * torch.sigmoid(chosen[:, k : k + 1]) for k, part in enumerate(parts))

    return routed


class _AsTopOne:
    def __init__(self, moe):
        self.top_k, self.num_experts, self.experts = 1, moe.num_experts, moe.experts


def _normalised_scores(original):
    def routed(self, x, chosen, ids):
        scores = torch.sigmoid(chosen)
        return original(self, x, torch.logit(scores / (scores.sum(-1, keepdim=True) + 1e-3)), ids)

    return routed


def _swap_gate_and_up(patch, model):
    for layer in model.model.layers:
        if layer.is_moe:
            weight = layer.feed_forward.experts.gate_up_proj
            patch.setattr(weight, "data", torch.cat(weight.detach().chunk(2, -1)[::-1], -1))


def _chunks_from_row_start(patch, model):
    original = placement.row_mask

    def row_mask(mask, queries, keys, *, chunk_size, device):
        everything = original(mask, queries, keys, chunk_size=None, device=device)
        return everything & original(None, queries, keys, chunk_size=chunk_size, device=device)

    patch.setattr(placement, "row_mask", row_mask)


def _causal_everywhere(patch, model):
    patch.setattr(placement, "_plain", lambda config, kind, length: CausalRows())
    patch.setattr(placement, "_chunk_size", lambda config, kind: None)


def _plain_frequencies(patch, model):
    exponents = torch.arange(0, model.config.head_dim, 2).float() / model.config.head_dim
    patch.setattr(model.model, "_frequencies", (1e4**-exponents, 1.0))


MUTATIONS = {
    "rotary on halves": lambda patch, model: patch.setattr(attention, "rotate", _rotate_half),
    "rotary scaling ignored": _plain_frequencies,
    "no_rope_layers read the other way": _set_on_attention("use_rope", lambda layer: not layer.use_rope),
    "no qk norm": _set_on_attention("use_qk_norm", lambda layer: False),
    "qk norm on layers without rotary": _set_on_attention("use_qk_norm", lambda layer: True),
    "no temperature": _set_in_config("attn_temperature_tuning", False),
    "temperature one position late": _patch_temperature(lambda f: lambda pos, *a: f(pos - 1, *a)),
    "temperature without floor": _patch_temperature(
        lambda f: lambda pos, floor, scale: (torch.log1p((pos + 1) / floor) * scale + 1)[..., None, None]
    ),
    "temperature with log for log1p": _patch_temperature(
        lambda f: (
            lambda pos, floor, scale: (torch.log(torch.floor((pos + 1) / floor).clamp(min=1)) * scale + 1)[
                ..., None, None
            ]
        )
    ),
    "no rotary at all": _set_on_attention("use_rope", lambda layer: False),
    "no chunks": _causal_everywhere,
    "chunks counted from the row's start": _chunks_from_row_start,
    "chunks on full-attention layers": _set_on_attention("kind", lambda layer: "chunked_attention"),
    "score on the expert's output": _patch_moe(_score_on_output),
    "scores normalised over the chosen experts": _patch_moe(_normalised_scores),
    "softmax for sigmoid": _patch_moe(
        lambda f: lambda self, x, chosen, ids: f(self, x, torch.logit(chosen.softmax(-1), eps=1e-6), ids)
    ),
    "next expert": _patch_moe(lambda f: lambda self, x, chosen, ids: f(self, x, chosen, (ids + 1) % 4)),
    "gate in the second half": _swap_gate_and_up,
    "no shared expert": lambda patch, model: [
        patch.setattr(layer.feed_forward.shared_expert, "forward", torch.zeros_like)
        for layer in model.model.layers
        if layer.is_moe
    ],
    "norm without weight": lambda patch, model: patch.setattr(
        norm.RMSNorm, "forward", lambda self, x: F.rms_norm(x, self.weight.shape, None, self.eps)
    ),
}


@pytest.fixture(scope="module")
def top_two_pair():
    return model_pair(num_experts_per_tok=2)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_detail_fails_parity(name, top_two_pair, monkeypatch):
    theirs, ours = top_two_pair
    for padding in ((0, 0, 0), PADDED):
        assert_same_logits(theirs, ours, batch(padding))
    MUTATIONS[name](monkeypatch, ours)
    found = [logit_errors(theirs, ours, batch(padding)) for padding in ((0, 0, 0), PADDED)]
    assert max(error / bound for error, bound in found) > 50


# --- packed documents -----------------------------------------------------------------------------------------


def documents(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(13)
    return [torch.randint(3, 61, (1, length), generator=generator) for length in lengths]


def pack(docs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(doc.shape[1]) for doc in docs])[None]
    return {"input_ids": torch.cat(docs, 1), "position_ids": positions}


# The last has one long document beside many short ones, which are then attended in batches by length.
LENGTHS = [[7, 1, 19, 4, 12], [5, 5, 10], [60, *[3] * 9]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_packed_equals_separate(lengths, top_k):
    """The peer is transformers' model on each document by itself."""
    theirs, ours = model_pair(scale=0.15, num_experts_per_tok=top_k)
    docs = documents(lengths)
    count = sum(length - 1 for length in lengths)

    def one_by_one(model):
        model.zero_grad()
        losses = [model(doc, labels=doc).loss * (doc.shape[1] - 1) / count for doc in docs if doc.shape[1] > 1]
        torch.stack(losses).sum().backward()
        logits = torch.cat([model(doc).logits for doc in docs], 1).detach()
        return torch.stack(losses).sum().detach(), named_gradients(model), logits

    peer = one_by_one(theirs)
    with float64_inside():
        exact = one_by_one(copy.deepcopy(theirs).double())
    packed = pack(docs)
    loss, got = gradients(ours, **packed, labels=packed["input_ids"])
    for found in zip((loss, got, ours(**packed).logits), peer, exact, strict=True):
        assert_as_exact(*found)


def test_packed_rows_of_a_batch_and_padding_at_their_end():
    theirs, ours = model_pair()
    docs = documents([9, 14, 17, 3])
    rows = [pack(docs[:2]), pack(docs[2:])]
    ids, positions = (
        torch.cat([F.pad(row[key], (0, 23 - row[key].shape[1])) for row in rows])
        for key in ("input_ids", "position_ids")
    )
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    out = ours(ids, attention_mask=mask, position_ids=positions).logits
    peer = torch.cat([theirs(doc).logits for doc in docs], 1)[0]
    with float64_inside():
        double = copy.deepcopy(theirs).double()
        exact = torch.cat([double(doc).logits for doc in docs], 1)[0]
    assert_as_exact(torch.cat([out[0], out[1, :20]]), peer, exact)


def test_a_document_does_not_see_its_neighbour():
    _, ours = model_pair()
    docs = documents([11, 9])
    before = ours(**pack(docs)).logits[:, 11:]
    after = ours(**pack([docs[0].flip(1), docs[1]])).logits[:, 11:]
    assert torch.equal(before, after)


def test_packed_rows_refuse_a_cache():
    _, ours = model_pair()
    with pytest.raises(ValueError, match="use_cache must be False"):
        ours(**pack(documents([4, 5])), use_cache=True)


def test_segments_cover_every_token_once():
    starts = torch.zeros(2, 50, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, [1, 2, 9]] = True
    tokens = torch.cat([b.tokens_N for b in packed_segments(starts).batches])
    assert sorted(tokens.tolist()) == list(range(100))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradient_checkpointing_changes_nothing(mode):
    _, ours = model_pair(scale=0.15, router_aux_loss_coef=0.3)
    packed = pack(documents(LENGTHS[0]))
    ours.train()
    want_loss, want = gradients(ours, **packed, labels=packed["input_ids"])
    want_stats = ours.model.last_router_stats
    ours.gradient_checkpointing_enable(checkpointing_arguments(mode))
    got_loss, got = gradients(ours, **packed, labels=packed["input_ids"])
    assert torch.equal(got_loss, want_loss)
    assert gradient_error(got, want) < 1e-6
    stats = ours.model.last_router_stats  # one routing a layer: what is computed again is not recorded again
    assert torch.equal(stats.load_LE, want_stats.load_LE)
    assert torch.equal(stats.entropy_L, want_stats.entropy_L)
    copy.deepcopy(ours)  # nothing of a graph is left behind


def _bytes_held_after_forward(model, inputs) -> int:
    """Allocated and not freed again by a forward whose loss is still there: what its backward will read."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss.requires_grad
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_selective_checkpointing_holds_less_than_none_and_more_than_full():
    _, ours = model_pair(scale=0.15)
    packed = pack(documents([60, 40, 80, 20] * 5))
    ours.train()
    ours(**packed)  # what is made once and kept
    held = {}
    for mode in ("none", "selective", "full"):
        ours.gradient_checkpointing_disable()
        if mode != "none":
            ours.gradient_checkpointing_enable(checkpointing_arguments(mode))
        held[mode] = _bytes_held_after_forward(ours, packed)
    assert held["full"] < 0.5 * held["selective"]
    assert held["selective"] < 0.8 * held["none"]


class _Calls(TorchDispatchMode):
    """Counts what is really computed: a result that is taken out of store is not dispatched."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_computes_no_product_or_attention_again():
    _, ours = model_pair(scale=0.15)
    packed = pack(documents(LENGTHS[0]))
    ours.train()

    def products(mode: str) -> dict[str, int]:
        ours.gradient_checkpointing_disable()
        if mode != "none":
            ours.gradient_checkpointing_enable(checkpointing_arguments(mode))
        with _Calls() as calls:
            ours(**packed, labels=packed["input_ids"]).loss.backward()
        return {name: calls.counts[f"aten.{name}.default"] for name in names}

    names = ("mm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")
    none, full, selective = products("none"), products("full"), products("selective")
    assert selective == none
    assert all(full[name] > none[name] for name in none)


def test_mask_of_another_shape_is_refused():
    _, ours = model_pair()
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 22\]"):
        ours(batch()["input_ids"], attention_mask=torch.ones(3, 22))
