"""Documents in a packed tree have the outputs and the gradients that they have alone, however they are attended."""

import copy
import json
import math
import re
from typing import Any

import pytest
import test_dpo
import torch
from closeness import assert_as_exact, float64_inside
from hypothesis import given
from hypothesis import strategies as st
from test_model import gradient_error, model_pair, named_gradients
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from posttrain.cli.outcome import notice_text
from posttrain.config.models import ModelConfig
from posttrain.dpo.examples import tokenize_pairs
from posttrain.files import read_jsonl
from posttrain.model import load_tokenizer, tree_attention
from posttrain.model.recompute import checkpointing_arguments
from posttrain.model.router_balance import RouterBalance
from posttrain.model.router_stats import RouterLossWeights
from posttrain.model.sharing import FAMILIES, accept_trees, note_unshared, tree_arguments, unshared_reason
from posttrain.model.tree import build_tree
from posttrain.model.tree_attention import TreeFlex, TreeKeys, tree_mask
from posttrain.model.tree_blocks import TreeBlocks
from posttrain.train.prefixes import MIN_SHARED, Document, Packed, pack

CPU = torch.device("cpu")


def random_documents(groups: list[tuple[int, list[int]]], system: int = 0, seed: int = 0) -> list[Document]:
    """Groups of (tokens of the prompt, tokens of each reply); all prompts begin with the same `system` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 61, (count,), generator=generator).tolist())

    shared = draw(system)
    return [
        Document(prompt + draw(reply), len(prompt))
        for size, replies in groups
        for prompt in [shared + draw(size)]
        for reply in replies
    ]


# Longer than chunks, ragged, several groups; a reply without a token that is fed; prompts of different lengths; and
# groups behind one instruction, so that documents are three nodes deep.
EVEN = random_documents([(7, [4, 4, 4]), (7, [4, 4, 4])])
RAGGED = random_documents([(12, [9, 5, 30, 1]), (25, [3, 2, 20]), (3, [0, 40, 16]), (5, [7])])
DEEP = random_documents([(4, [6, 11]), (9, [2, 8, 3])], system=MIN_SHARED + 2)
CASES = {"even": EVEN, "ragged": RAGGED, "deep": DEEP}


def test_a_tree_by_hand():
    tree = build_tree([(0, -1), (5, 2), (7, -1)], [2, 2, 2, 1, 1, 1, 1, 1, 1, 1])
    assert [(node.start, node.end, node.path) for node in tree.nodes] == [
        (0, 3, ()), (3, 5, (0,)), (5, 7, (0,)), (7, 10, ()),
    ]  # fmt: skip
    assert tree.positions_1T.tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1, 2]]
    # Chunks of 4: d is the last of its chunk, e begins one and sees nothing before it.
    assert [(node.start, node.end, node.path) for node in tree.chunks(4)] == [
        (0, 3, ()), (3, 4, (0,)), (4, 5, ()), (5, 6, (0,)), (6, 7, ()), (7, 10, ()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(1, -1)], "must start at 0"),
        ([(0, -1), (3, 1), (3, 1)], "must start at 0 and have tokens"),
        ([(0, -1), (2, 2)], "must be -1 or a token before"),
        ([(0, -1), (2, 0), (3, -1), (4, 0)], "of a document that ended before another"),
    ],
)
def test_a_tree_that_is_none_is_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        build_tree(runs, [1] * 5)


@st.composite
def many_documents(draw) -> list[Document]:
    """Documents over two tokens, of which many share something, with long pieces in common."""
    pieces = st.lists(st.sampled_from([(0,), (1,), (2,) * MIN_SHARED, (3,) * (MIN_SHARED + 3)]), min_size=1, max_size=4)
    ids = [sum(draw(pieces), ()) for _ in range(draw(st.integers(1, 8)))]
    return [Document(tokens, draw(st.integers(0, len(tokens)))) for tokens in ids]


@given(documents=many_documents())
def test_packing_for_prefixes_keeps_every_document(documents):
    packed = pack(documents)
    row, tree = packed.ids_1T[0], packed.tree
    counts = torch.zeros(len(row))
    for document, places in zip(documents, packed.places, strict=True):
        assert row[places].tolist() == list(document.ids)
        assert tree.positions_1T[0, places].tolist() == list(range(len(document.ids)))
        assert seen_by(packed, places[-1]) == places
        counts[places] += 1
    assert counts.tolist() == tree.weights_T.tolist()
    assert min(counts) >= 1


def seen_by(packed: Packed, place: int) -> list[int]:
    """The places that a token sees, from the nodes alone."""
    nodes = packed.tree.nodes
    own = next(node for node in nodes if node.start <= place < node.end)
    before = [place for index in own.path for place in range(nodes[index].start, nodes[index].end)]
    return [*before, *range(own.start, place + 1)]


def test_a_prompt_is_shared_however_short_and_other_beginnings_from_a_length_on():
    two = [Document((5, 6, 7), 1), Document((5, 6, 8), 1)]
    assert pack(two).ids_1T.tolist() == [[5, 6, 7, 6, 8]]  # of the replies' equal beginning nothing is shared
    assert pack([Document((5, 6, 7), 2), Document((5, 8, 7), 2)]).ids_1T.numel() == 6
    long = tuple(range(MIN_SHARED))
    assert pack([Document((*long, 6, 7), 17), Document((*long, 8, 7), 17)]).ids_1T.numel() == MIN_SHARED + 4
    assert pack([two[0], two[0]]).ids_1T.numel() == 5
    assert pack([Document((5, *long, 9), 1), Document((5, *long, 8), 1)]).ids_1T.numel() == MIN_SHARED + 3


# --- attention --------------------------------------------------------------------------------------------------


def attention_of_documents(q, k, v, packed: Packed, chunk: int | None) -> torch.Tensor:
    """Each document by itself, written out: softmax(q k^T / sqrt(d)) v over the keys that a query sees."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = torch.zeros_like(q)
    for places in packed.places:
        index = torch.tensor(places, device=q.device)
        where = torch.arange(len(places), device=q.device)
        hidden = where[None] > where[:, None]
        if chunk is not None:
            hidden = hidden | (where[None] // chunk != where[:, None] // chunk)
        scores = q[:, :, index] @ k[:, :, index].mT / math.sqrt(q.shape[-1])
        out = out.index_copy(2, index, scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, index])
    return out


WAYS = {
    "keys": lambda tree, chunk: TreeKeys.of(tree.nodes if chunk is None else tree.chunks(chunk), CPU),
    "blocks": lambda tree, chunk: TreeBlocks.of(tree.nodes if chunk is None else tree.chunks(chunk), CPU),
    "flex": TreeFlex.of,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [None, 5, 16])
@pytest.mark.parametrize("case", CASES)
def test_all_ways_of_attention_are_that_of_the_documents(case, chunk, way):
    packed = pack(CASES[case])
    generator = torch.Generator().manual_seed(1)
    tokens = len(packed.tree)
    given = [torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2, 4)]
    grad = given.pop()

    def run(attend, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        q, k, v = (x.detach().to(dtype, copy=True).requires_grad_(way != "flex") for x in given)
        out = attend(q, k, v)
        if way == "flex":  # on a CPU it has no backward; tests/test_gpu.py has it
            return {"out": out.detach()}
        out.backward(grad.to(dtype))
        return {"out": out.detach(), "q": q.grad, "k": k.grad, "v": v.grad}

    def written_out(q, k, v):
        return attention_of_documents(q, k, v, packed, chunk)

    visibility = WAYS[way](packed.tree, chunk)
    ours = run(lambda q, k, v: visibility.attend(q, k, v, dropout=0.0), torch.float32)
    peer, exact = run(written_out, torch.float32), run(written_out, torch.float64)
    # The gradient of a prompt adds up that of all replies; the peer adds them in another order.
    assert_as_exact(ours, peer, exact)


@pytest.mark.parametrize("chunk", [None, 5])
def test_the_block_mask_of_a_gpu_is_the_mask_of_the_tree(chunk):
    """Token by token, and block by block: a block of which something is seen is in the mask, no other is."""
    packed = pack(random_documents([(90, [40, 77, 8]), (12, [150, 3])], system=MIN_SHARED))
    total = len(packed.tree)
    want = torch.zeros(total, total, dtype=torch.bool)
    for place in range(total):
        seen = seen_by(packed, place)
        position = len(seen) - 1
        want[place, seen if chunk is None else seen[position // chunk * chunk :]] = True
    sees = tree_mask(packed.tree, chunk)
    places = torch.arange(total)
    assert torch.equal(sees(0, 0, places[:, None], places[None]), want)
    blocks = TreeFlex.of(packed.tree, chunk).mask
    size = blocks.BLOCK_SIZE[0]
    padded = torch.nn.functional.pad(want, (0, -total % size, 0, -total % size))
    seen_blocks = padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), seen_blocks)


def test_short_paths_take_copied_keys_and_long_ones_merged_blocks():
    short, long = (pack(random_documents([(size, [8, 8])])).tree for size in (20, 600))
    assert isinstance(tree_attention.tree_visibility(short, None, dropout=False), TreeKeys)
    assert isinstance(tree_attention.tree_visibility(long, None, dropout=False), TreeBlocks)
    assert isinstance(tree_attention.tree_visibility(long, None, dropout=True), TreeKeys)
    assert isinstance(tree_attention.tree_visibility(long, 30, dropout=False), TreeKeys)  # what a chunk leaves is short


# --- the model --------------------------------------------------------------------------------------------------


SHORT_PATHS = {"keys": math.inf, "blocks": -1}  # which way every tree takes


@pytest.fixture(params=SHORT_PATHS)
def way(request, monkeypatch) -> str:
    monkeypatch.setattr(tree_attention, "_SHORT_PATH", SHORT_PATHS[request.param])
    return request.param


def shared_states(model, packed: Packed, **arguments) -> torch.Tensor:
    """The hidden states of all documents, one after another, from the packed tree."""
    hidden = model.model(input_ids=packed.ids_1T, tree=packed.tree, use_cache=False, **arguments).last_hidden_state[0]
    return torch.cat([hidden[places] for places in packed.places])


def separate_states(model, documents: list[Document]) -> torch.Tensor:
    return torch.cat(
        [
            model.model(input_ids=torch.tensor([d.ids], device=model.device), use_cache=False).last_hidden_state[0]
            for d in documents
        ]
    )


OUTPUTS = ("logits", "logprobs")


def outputs_and_gradients(model, states, documents: list[Document]) -> dict[str, torch.Tensor]:
    """Logits, log-probabilities of the next tokens, and gradients of their sum with weights of both signs."""
    logits = model.lm_head(states)
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(3, 61, (len(logits), 1), generator=generator)
    logprobs = logits.log_softmax(-1).gather(1, targets.to(logits.device))[:, 0]
    prompts = torch.cat([torch.arange(len(d.ids)) < d.prompt - 1 for d in documents])  # no reply token follows there
    weights = torch.randn(len(logits), generator=generator).masked_fill(prompts, 0.0)
    model.zero_grad()
    (logprobs * weights.to(logprobs)).sum().backward()
    found = {"logits": logits.detach(), "logprobs": logprobs.detach(), **named_gradients(model)}
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts_per_tok": 2, "no_rope_layers": [0] * 4}, {"interleave_moe_layer_step": 1}], ids=str
)
def test_a_model_on_shared_prefixes_is_as_exact_as_on_separate_documents(changes, case, monkeypatch):
    documents = CASES[case]
    theirs, ours = model_pair(scale=0.15, **changes)
    with float64_inside():
        double = theirs.double()
        exact = outputs_and_gradients(double, separate_states(double, documents), documents)
    peer = outputs_and_gradients(ours, separate_states(ours, documents), documents)
    for limit in SHORT_PATHS.values():
        monkeypatch.setattr(tree_attention, "_SHORT_PATH", limit)
        got = outputs_and_gradients(ours, shared_states(ours, pack(documents)), documents)
        for name in OUTPUTS:
            assert_as_exact(got[name], peer[name], exact[name])
            torch.testing.assert_close(got[name], peer[name], rtol=1e-5, atol=1e-5)
        assert_as_exact(
            *({name: x for name, x in found.items() if name not in OUTPUTS} for found in (got, peer, exact))
        )
        assert gradient_error(got, {name: x for name, x in peer.items() if name not in OUTPUTS}) < 1e-5


def router_figures(model, run) -> dict[str, torch.Tensor]:
    """What routers report, and the gradients of their losses alone."""
    model.train()
    balance = RouterBalance(model, rate=0.0)
    model.zero_grad()
    run().backward()
    stats = balance.update(0.5)
    balance.close()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("router" in name for name in grads)
    return {"load": stats.load_LE, "entropy": stats.entropy_L, **grads}


@pytest.mark.parametrize("top_k", [1, 2])
def test_routers_count_a_shared_prefix_as_often_as_documents_have_it(way, top_k):
    _, ours = model_pair(scale=0.15, num_experts_per_tok=top_k)
    longest = max(len(d.ids) for d in RAGGED)
    ids, mask = (torch.zeros(len(RAGGED), longest, dtype=torch.long) for _ in range(2))
    for row, document in enumerate(RAGGED):
        ids[row, : len(document.ids)], mask[row, : len(document.ids)] = torch.tensor(document.ids), 1
    packed = pack(RAGGED)

    ours.model.router_loss_weights = RouterLossWeights(balance=0.2, z=0.1)

    def separate() -> torch.Tensor:
        return ours.model(input_ids=ids, attention_mask=mask, use_cache=False).router_loss

    def shared() -> torch.Tensor:
        return ours.model(input_ids=packed.ids_1T, tree=packed.tree, use_cache=False).router_loss

    torch.testing.assert_close(shared().detach(), separate().detach(), rtol=1e-5, atol=0)
    got, want = router_figures(ours, shared), router_figures(ours, separate)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_experts_are_replayed_on_shared_prefixes(way):
    _, ours = model_pair(num_experts_per_tok=2)
    packed = pack(DEEP)
    places = torch.tensor([place for document in packed.places for place in document])
    layers = sum(layer.is_moe for layer in ours.model.layers)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(len(packed.tree) * layers)]).view(1, -1, layers, 2)
    with torch.no_grad():
        got = shared_states(ours, packed, routed_experts=chosen)
        want, start = [], 0
        for document in DEEP:
            index = places[start : start + len(document.ids)]
            start += len(index)
            replay = chosen[:, index]
            ids = torch.tensor([document.ids])
            want.append(ours.model(input_ids=ids, routed_experts=replay, use_cache=False).last_hidden_state[0])
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradient_checkpointing_with_shared_prefixes_changes_nothing(way, mode):
    _, ours = model_pair()
    packed = pack(RAGGED)
    ours.train()
    want = outputs_and_gradients(ours, shared_states(ours, packed), RAGGED)
    ours.gradient_checkpointing_enable(checkpointing_arguments(mode))
    got = outputs_and_gradients(ours, shared_states(ours, packed), RAGGED)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_what_contradicts_a_tree_is_refused():
    _, ours = model_pair()
    packed = pack(EVEN)
    ids, tree = packed.ids_1T, packed.tree
    with pytest.raises(ValueError, match=r"a tree of 38 tokens needs \[1, 38\]"):
        ours(input_ids=ids[:, 1:], tree=tree)
    with pytest.raises(ValueError, match="position_ids cannot be given with a tree"):
        ours(input_ids=ids, position_ids=tree.positions_1T, tree=tree)
    with pytest.raises(ValueError, match="labels cannot be given with a tree"):
        ours(input_ids=ids, labels=ids, tree=tree)


# --- models of transformers ---------------------------------------------------------------------------------------


DENSE: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def dense_model(family: str, **changes: Any) -> Any:
    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "mistral":
        settings["sliding_window"] = None
    config_class, model_class = DENSE[family]
    torch.manual_seed(3)
    return model_class(config_class(**settings | changes))


def test_every_family_that_shares_prefixes_is_tested():
    assert set(DENSE) == set(FAMILIES)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("family", DENSE)
def test_dense_models_of_transformers_share_prefixes(way, family, checkpointing):
    model = dense_model(family).train()
    documents = RAGGED
    double = copy.deepcopy(model).double()
    with float64_inside():
        exact = outputs_and_gradients(double, separate_states(double, documents), documents)
    peer = outputs_and_gradients(model, separate_states(model, documents), documents)
    assert accept_trees(model) is None
    after = outputs_and_gradients(model, separate_states(model, documents), documents)
    assert all(torch.equal(after[name], peer[name]) for name in peer)  # without a tree it attends as before
    if checkpointing != "none":
        model.gradient_checkpointing_enable(checkpointing_arguments(checkpointing))
    packed = pack(documents)
    hidden = model.model(input_ids=packed.ids_1T, **tree_arguments(model, packed.tree)).last_hidden_state[0]
    states = torch.cat([hidden[places] for places in packed.places])
    got = outputs_and_gradients(model, states, documents)
    for name in OUTPUTS:
        assert_as_exact(got[name], peer[name], exact[name])
    assert_as_exact(*({name: x for name, x in found.items() if name not in OUTPUTS} for found in (got, peer, exact)))
    assert "posttrain" not in json.dumps(model.config.to_dict())  # a saved folder loads elsewhere


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama4_text"}, "counts the borders of chunks along the row"),
        ({"model_type": "mistral", "sliding_window": 4096}, r"sliding windows \(sliding_window 4096\)"),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "sliding windows"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "kind linear_attention,"),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention"]}, "kind sliding_attention,"),
        ({"model_type": "bloom"}, "attention of bloom was not compared"),
    ],
)
def test_a_model_that_cannot_share_prefixes_says_why(config, reason):
    assert re.search(reason, unshared_reason(config, native=False))


def test_a_window_that_is_switched_off_shares_prefixes():
    assert (
        unshared_reason({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, native=False)
        is None
    )


# --- preference pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0.0}, {"rank": 4, "dropout": 0.3}], ids=str)
def test_the_replies_of_a_pair_share_their_prefix(policy, tmp_path, lora):
    """In training without dropout of adapters, and in the reference's pass; with the figures of separate rows."""
    ids, _ = tokenize_pairs(load_tokenizer(policy), test_dpo.make_pairs(5), 128, overlong="error")
    config = test_dpo.make_config(policy, pairs={"path": "x"}, lora=lora)
    trainer = test_dpo.make_trainer(config, ids, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    shapes = []
    embedding = trainer.model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    once = sum(len(item.prompt_ids) + len(item.chosen_ids) + len(item.rejected_ids) for item in ids)
    found = {}
    for shared in (True, False):
        trainer.shares_prompts = shared
        trainer.model.eval()
        references = trainer.compute_ref_log_probs(trainer.model, batch)
        trainer.model.train()
        outputs, entropy = trainer._pairs(trainer.model, batch)
        found[shared] = [*references, outputs.chosen_logprobs_P, outputs.rejected_logprobs_P, entropy]
    dropped = bool(lora and lora["dropout"])
    # Instructions that pairs have in common may be shared, too: fewer tokens than each prompt once.
    assert shapes[0][0] == 1
    assert shapes[0][1] <= once
    assert (shapes[1] == shapes[0]) != dropped
    assert shapes[2] == shapes[3] == tuple(batch["input_ids"].shape)
    for got, want in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_stage_tells_once_why_prefixes_are_not_shared(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "sliding_window": 4096}))
    context = test_dpo.make_context(tmp_path / "stage")
    note_unshared(ModelConfig(path=str(tmp_path)), context)
    (event,) = read_jsonl(context.events)
    assert event["event"] == "prefixes_unshared"
    assert "every reply is trained on with a copy of its prompt of its own: mistral has sliding" in notice_text(
        "rl", event
    )
