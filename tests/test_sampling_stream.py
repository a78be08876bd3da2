"""Rollout engines as an asynchronous controller uses them: pieces, versions by token, seeds, death and standstill."""

import asyncio
import itertools
import os
import signal
import time
from collections import defaultdict

import pytest
import torch
from msgspec.structs import replace

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.records import VersionSpan
from posttrain.sampling.arguments import ENGINE_ENV
from posttrain.sampling.engine import EngineActor
from posttrain.sampling.manifests import FolderWeights
from posttrain.sampling.requests import EngineLostError, SampleRequest
from posttrain.sampling.stream import join_spans, spans_between

ENGINE = EngineConfig(max_model_len=512, kv_cache_gib=0.1, stream_interval=16, deadline_s=8)
PROMPTS = [tuple(range(5 + i, 25 + i)) for i in range(12)]


def test_spans_of_a_piece():
    starts = [("3", 0), ("4", 10), ("7", 12)]
    assert spans_between(starts, 0, 20) == (VersionSpan(3, 0, 10), VersionSpan(4, 10, 12), VersionSpan(7, 12, 20))
    assert spans_between(starts, 4, 10, shift=100) == (VersionSpan(3, 104, 110),)
    assert spans_between(starts, 11, 13) == (VersionSpan(4, 11, 12), VersionSpan(7, 12, 13))
    assert spans_between(starts, 5, 5) == ()
    pieces = [spans_between(starts, begin, begin + 3) for begin in range(0, 18, 3)]
    assert join_spans([span for piece in pieces for span in piece]) == spans_between(starts, 0, 18)


# ---------------------------------------------------------------- two real engines, ended by the last tests


def noisy(folder, source, seed):
    """The same architecture with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    changed = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) * tensor.std()
        for name, tensor in weights.items()
    }
    save_file({k: v.contiguous() for k, v in changed.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Folders of six policies."""
    folder = tmp_path_factory.mktemp("policies")
    return [str(tiny_model), *(noisy(folder / str(seed), tiny_model, seed) for seed in range(1, 6))]


def made_engine(name, path, **env):
    """An engine actor that has not started yet."""
    import ray

    options = {"num_cpus": 0, "max_concurrency": 100, "runtime_env": {"env_vars": {**ENGINE_ENV, **env}}}
    served = ServedModelConfig(path=path, dtype="float32").model_dump()
    return ray.remote(EngineActor).options(**options).remote(name, served, ENGINE.model_dump())


@pytest.fixture(scope="module")
def engines(ray_session, models):
    """The first starts with the first policy, the second with the last."""
    import ray

    actors = [made_engine(f"engine-{index}", path) for index, path in enumerate((models[0], models[5]))]
    try:
        ray.get([actor.start.remote() for actor in actors])
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


class Whole:
    """A reply put together from its pieces."""

    def __init__(self):
        self.token_ids, self.logprobs, self.spans, self.starts = [], [], [], []
        self.finish_reason = self.text = ""

    def add(self, piece, offset=0):
        assert not self.finish_reason
        assert piece.start == offset + len(self.token_ids)
        assert len(piece.token_ids) == len(piece.logprobs)
        covered = [place for span in piece.versions for place in range(span.start, span.end)]
        assert covered == list(range(piece.start, piece.start + len(piece.token_ids)))
        self.starts.append(piece.start)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.spans += piece.versions
        self.finish_reason, self.text = piece.finish_reason, piece.text


async def collect(actor, num_replies, offsets=None, on_pieces=None):
    """Collect until so many replies are finished."""
    replies = defaultdict(Whole)
    while sum(bool(reply.finish_reason) for reply in replies.values()) < num_replies:
        asked = time.time()
        pieces, told = await actor.collect.remote(5.0)
        assert asked <= told <= time.time()  # the engine tells the time of this machine's clock
        for piece in pieces:
            replies[piece.key, piece.index].add(piece, (offsets or {}).get((piece.key, piece.index), 0))
        if on_pieces is not None:
            await on_pieces(pieces)
    return dict(replies)


def logprobs_of(policy, prompt, token_ids):
    """Log-probabilities of a reply under a model. Shape [T], fp32."""
    ids = torch.tensor([[*prompt, *token_ids]])
    with torch.no_grad():
        logits = policy(input_ids=ids).logits[0].log_softmax(-1)
    return logits[torch.arange(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]]


slow = pytest.mark.slow


@slow
def test_pieces_make_whole_replies(engines):
    requests = [(100 + i, SampleRequest(prompt, n=3, max_tokens=50)) for i, prompt in enumerate(PROMPTS)]

    async def run():
        await engines[0].submit.remote(requests)
        return await collect(engines[0], 3 * len(requests))

    replies = asyncio.run(run())
    assert set(replies) == {(key, index) for key, _ in requests for index in range(3)}
    lengths = [len(reply.token_ids) for reply in replies.values()]
    assert max(lengths) == 50
    for reply in replies.values():
        assert reply.finish_reason in ("stop", "length")
        assert reply.finish_reason == "stop" or len(reply.token_ids) == 50
        # A piece has as many tokens as there are by then, but no fewer than asked for.
        gaps = [after - before for before, after in itertools.pairwise(reply.starts)]
        assert all(gap >= ENGINE.stream_interval - 1 for gap in gaps), reply.starts
        assert join_spans(reply.spans) == (VersionSpan(0, 0, len(reply.token_ids)),)
    assert any(reply.text for reply in replies.values())


@slow
def test_replies_share_a_prompt_that_fills_no_block(engines, models):
    """Only the first of eight replies computes the prompt, and a next turn reads prompt and reply: 20 tokens, 32 to a
    block. What is read is what would have been computed."""
    from posttrain.compat.vllm_prefixes import UNIT
    from posttrain.model.load import load_model

    prompts = [tuple(reversed(prompt)) for prompt in PROMPTS]
    requests = [(i, SampleRequest(prompt, n=8, max_tokens=7)) for i, prompt in enumerate(prompts)]
    cached = defaultdict(list)

    async def count(pieces):
        for piece in pieces:
            if piece.finish_reason:
                cached[piece.key].append(piece.num_cached)

    async def run():
        await engines[1].submit.remote(requests)
        replies = await collect(engines[1], 8 * len(requests), on_pieces=count)
        turns = [
            (100 + i, SampleRequest((*prompt, *replies[i, 3].token_ids, 5, 6), max_tokens=2))
            for i, prompt in enumerate(prompts)
        ]
        await engines[1].submit.remote(turns)
        await collect(engines[1], len(turns), on_pieces=count)
        return replies

    replies = asyncio.run(run())
    whole = (len(prompts[0]) - 1) // UNIT * UNIT
    policy = load_model(models[5])
    for key, prompt in enumerate(prompts):
        assert sorted(cached[key]) == [0, *[whole] * 7]
        assert cached[100 + key] == [(len(prompt) + 6) // UNIT * UNIT]  # the last token of a reply is never read
        for index in range(8):
            expected = logprobs_of(policy, prompt, replies[key, index].token_ids)
            assert torch.allclose(torch.tensor(replies[key, index].logprobs), expected, atol=1e-4)


@slow
def test_an_update_in_flight_is_labelled_in_the_pieces(engines, models):
    """Tokens before and after are of the policy that the pieces name: recomputed with another implementation."""
    from posttrain.model.load import load_model

    requests = [(index, SampleRequest(prompt, n=4, max_tokens=300)) for index, prompt in enumerate(PROMPTS)]
    update = None

    async def run():
        nonlocal update
        await engines[0].submit.remote(requests)

        async def update_once(pieces):
            nonlocal update
            if update is None and pieces:
                update = engines[0].update_weights.remote(FolderWeights(models[1]), 1)

        replies = await collect(engines[0], 4 * len(requests), on_pieces=update_once)
        updated = await update
        assert updated.began <= updated.ended
        steps, sequences, prompt_tokens = updated.step_sums[:3]
        assert 0 < steps <= sequences <= 4 * len(requests) * steps  # of the steps before the update
        assert prompt_tokens >= 0
        assert updated.step_sums[6] > 0
        return replies

    replies = asyncio.run(run())
    straddling = [(key, reply) for key, reply in replies.items() if len(join_spans(reply.spans)) == 2]
    assert len(straddling) >= 10
    policies = [load_model(model) for model in models[:2]]
    for (key, _), reply in straddling[:8]:
        before, after = join_spans(reply.spans)
        assert (before.policy_version, before.start, after.policy_version) == (0, 0, 1)
        for span in (before, after):
            expected = logprobs_of(policies[span.policy_version], PROMPTS[key], reply.token_ids)
            found = torch.tensor(reply.logprobs)
            assert torch.allclose(found[span.start : span.end], expected[span.start : span.end], atol=1e-3)


@slow
def test_replies_begun_elsewhere_are_continued(engines, models):
    """A greedy reply that is cut anywhere and submitted again ends as it would have ended."""
    import ray

    prompt = PROMPTS[0]
    whole, _, _ = ray.get(engines[1].generate_wave.remote([SampleRequest(prompt, temperature=0.0, max_tokens=60)], 0))
    whole = whole[0][0]
    begun = (whole.token_ids[:7], (), whole.token_ids[:15], whole.token_ids)
    # Sampling stops at the tokens that the request names, and at no others.
    end = whole.token_ids[20]
    stopped = whole.token_ids[: whole.token_ids.index(end) + 1]

    async def run():
        request = SampleRequest(prompt, temperature=0.0, max_tokens=60, begun=begun)
        ending = SampleRequest(prompt, temperature=0.0, max_tokens=60, begun=((), stopped), stop_token_ids=(end,))
        await engines[1].submit.remote([(7, request), (8, ending)])
        offsets = {(7, index): len(ids) for index, ids in enumerate(begun)}
        return await collect(engines[1], 6, {**offsets, (8, 1): len(stopped)})

    replies = asyncio.run(run())
    assert len(whole.token_ids) == 60
    assert tuple(replies[8, 0].token_ids) == stopped
    assert replies[8, 1].token_ids == []
    assert replies[8, 0].finish_reason == replies[8, 1].finish_reason == "stop"
    for index, ids in enumerate(begun):
        reply = replies[7, index]
        assert (*ids, *reply.token_ids) == whole.token_ids
        assert reply.text == whole.text
        assert reply.finish_reason == whole.finish_reason
        assert torch.allclose(torch.tensor(reply.logprobs), torch.tensor(whole.logprobs[len(ids) :]), atol=1e-4)
    assert replies[7, 3].starts == [len(whole.token_ids)]


@slow
def test_cancelled_and_refused_requests(engines):
    import ray

    from posttrain.errors import StageError

    async def run():
        long = SampleRequest(PROMPTS[0], n=2, max_tokens=400)
        await engines[1].submit.remote([(1, long), (2, long)])
        with pytest.raises(StageError, match="twice"):
            await engines[1].submit.remote([(3, long), (2, long)])
        with pytest.raises(StageError, match="request 4 cannot be sampled"):
            await engines[1].submit.remote([(3, long), (4, SampleRequest(tuple(range(5, 605))))])
        await engines[1].cancel.remote([1, 99])
        return await collect(engines[1], 2)

    replies = asyncio.run(run())
    assert {key for key, _ in replies} == {2}
    ray.get(engines[1].submit.remote([(1, SampleRequest(PROMPTS[0], max_tokens=5))]))  # the key is free again
    assert set(asyncio.run(collect(engines[1], 1))) == {(1, 0)}


def replies_one_by_one(actor, requests):
    """One request at a time: sums then have one order, and equal weights give equal bits."""
    import ray

    answers = [ray.get(actor.generate_wave.remote([request], 0))[0][0][0] for request in requests]
    return [(reply.token_ids, reply.logprobs) for reply in answers]


@slow
def test_five_updates_in_flight_leave_the_engine_as_freshly_loaded(engines, models, tmp_path):
    from safetensors.torch import load_file

    from posttrain.sampling.weights import SharedWeights, TensorSpec

    shared = SharedWeights(tmp_path)
    requests = [(index, SampleRequest(prompt, n=4, max_tokens=400)) for index, prompt in enumerate(PROMPTS)]

    async def run():
        version = 0
        await engines[0].submit.remote(requests)

        async def update(pieces):
            nonlocal version
            if pieces and version < 5:
                version += 1
                named = load_file(f"{models[version]}/model.safetensors")
                specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()]
                manifest = shared.publish(specs, named.values(), version)
                await engines[0].update_weights.remote(manifest, version)

        return await collect(engines[0], 4 * len(requests), on_pieces=update)

    replies = asyncio.run(run())
    shared.close()
    last = {join_spans(reply.spans)[-1].policy_version for reply in replies.values()}
    assert 5 in last
    assert max(len(join_spans(reply.spans)) for reply in replies.values()) >= 4
    greedy = [SampleRequest(prompt, temperature=0.0, max_tokens=24) for prompt in PROMPTS]
    assert replies_one_by_one(engines[0], greedy) == replies_one_by_one(engines[1], greedy)


@slow
def test_weights_built_beside_generation_are_those_of_a_fresh_engine(engines, models, tmp_path):
    """Of all tensors, and of one block alone: the other layers then keep what they have."""
    import ray
    from safetensors.torch import load_file, save_file

    greedy = [SampleRequest(prompt, temperature=0.0, max_tokens=24) for prompt in PROMPTS]

    def taken(engine, folder):
        ray.get(engine.update_weights.remote(FolderWeights(str(folder)), 1))
        return list(ray.get(engine.update_phases.remote()))

    old, new = (load_file(f"{models[place]}/model.safetensors") for place in (2, 3))
    block = {name: value for name, value in new.items() if ".layers.1." in name}
    for name, tensors in (("block", block), ("mixed", {**old, **block})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for folder in (models[3], models[2], tmp_path / "block"):
        ray.get(engines[0].submit.remote([(0, SampleRequest(PROMPTS[0], n=4, max_tokens=400))]))
        assert "exchange" in taken(engines[0], folder)
        ray.get(engines[0].cancel.remote([0]))
    other = made_engine("without a twin", models[4], POSTTRAIN_WITHOUT_TWIN="1")
    try:
        ray.get(other.start.remote())
        assert "load" in taken(other, tmp_path / "mixed")
        assert replies_one_by_one(engines[0], greedy) == replies_one_by_one(other, greedy)
    finally:
        ray.kill(other)


@slow
def test_a_model_with_biases_takes_them_with_its_weights(ray_session, tiny_model, tmp_path):
    """vLLM loads biases in place, and not as it loads weights."""
    import ray
    import transformers

    for seed in (1, 2):
        torch.manual_seed(seed)
        config = transformers.Qwen2Config(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.Qwen2ForCausalLM(config)
        for name, value in model.named_parameters():
            torch.nn.init.normal_(value, std=0.3 if name.endswith("bias") else 0.1)
        model.save_pretrained(tmp_path / str(seed))
        for path in tiny_model.glob("*token*"):
            (tmp_path / str(seed) / path.name).write_bytes(path.read_bytes())
    first, second = (str(tmp_path / name) for name in ("1", "2"))
    changed, fresh = made_engine("changed", first), made_engine("fresh", second)
    try:
        ray.get([changed.start.remote(), fresh.start.remote()])
        greedy = [SampleRequest(prompt, temperature=0.0, max_tokens=8) for prompt in PROMPTS[:4]]
        before = replies_one_by_one(changed, greedy)
        ray.get(changed.update_weights.remote(FolderWeights(second), 1))
        assert "exchange" in ray.get(changed.update_phases.remote())
        assert before != replies_one_by_one(fresh, greedy) == replies_one_by_one(changed, greedy)
    finally:
        ray.kill(changed)
        ray.kill(fresh)


@slow
def test_a_wave_is_decided_by_its_seed(engines, models):
    """Two engines that did different work before, and one engine twice, with other work between."""
    import ray

    ray.get([engine.update_weights.remote(FolderWeights(models[5]), 5) for engine in engines])
    requests = [SampleRequest(prompt, n=4, max_tokens=60) for prompt in PROMPTS]

    def wave(engine, seed):
        completions, began, ended = ray.get(engines[engine].generate_wave.remote(requests, seed))
        assert began < ended
        return [[(reply.token_ids, reply.logprobs, reply.text) for reply in group] for group in completions]

    first = wave(0, 5)
    ray.get(engines[0].submit.remote(list(enumerate(requests[3:8]))))
    asyncio.run(collect(engines[0], 4 * 5))
    assert wave(1, 5) == first
    assert wave(0, 5) == first
    assert wave(0, 6) != first
    replies = [reply for group in first for reply in group]
    assert len(set(replies)) > len(replies) // 2


@slow
def test_a_request_beside_a_wave_is_refused(engines):
    """On a CPU vLLM draws all tokens of a batch from one generator, so that one more reply would change the others."""
    import ray

    requests = [SampleRequest(prompt, n=4, max_tokens=60) for prompt in PROMPTS]
    engine, other = engines[0], SampleRequest(PROMPTS[0], max_tokens=4)

    def replies(completions):
        return [[(reply.token_ids, reply.logprobs) for reply in group] for group in completions]

    alone, _, _ = ray.get(engine.generate_wave.remote(requests, 9))
    wave = engine.generate_wave.remote(requests, 9)
    with pytest.raises(ray.exceptions.RayTaskError, match="a wave is being sampled"):
        ray.get(engine.submit.remote([(1, other)]))
    again, _, _ = ray.get(wave)
    assert replies(again) == replies(alone)
    ray.get(engine.submit.remote([(1, other)]))  # after it, as before
    assert asyncio.run(collect(engine, 1))[1, 0].token_ids


@slow
def test_a_seed_decides_a_reply_whatever_else_is_sampled(engines, models):
    """Alone, beside others without and with a seed, after a part that another engine sampled, and where prompts are
    computed in parts because many come at once."""
    import ray

    ray.get([engine.update_weights.remote(FolderWeights(models[5]), 5) for engine in engines])
    long = [tuple(10 + (7 * at + place) % 200 for at in range(400)) for place in range(12)]
    seeded = [
        SampleRequest(prompt, max_tokens=40, seed=seed) for seed, prompt in enumerate([*PROMPTS[:2], *PROMPTS[:2]])
    ]
    seeded += [SampleRequest(prompt, max_tokens=40, seed=2**63 - 1) for prompt in long]

    async def replies(engine, requests):
        await engine.submit.remote(list(enumerate(requests)))
        offsets = {(key, 0): len(request.begun[0]) for key, request in enumerate(requests) if request.begun}
        found = await collect(engine, len(requests), offsets)
        return [tuple(found[key, 0].token_ids) for key in range(len(requests))]

    alone = [asyncio.run(replies(engines[0], [request]))[0] for request in seeded]
    assert len(set(alone)) == len(alone)  # also of two seeds for one prompt
    others = [SampleRequest(prompt, max_tokens=60) for prompt in PROMPTS]
    beside = asyncio.run(replies(engines[1], [*others, *seeded]))
    assert beside[len(others) :] == alone
    rests = [replace(request, begun=(reply[:9],)) for request, reply in zip(seeded, alone, strict=True)]
    assert asyncio.run(replies(engines[1], rests)) == [reply[9:] for reply in alone]
    waves = [ray.get(engines[0].generate_wave.remote([*others, *seeded], wave))[0] for wave in (1, 2)]
    assert [[reply.token_ids for (reply,) in wave[len(others) :]] for wave in waves] == [alone, alone]
    assert waves[0][: len(others)] != waves[1][: len(others)]


@slow
def test_kept_caches_do_not_leak_into_new_requests(engines, models):
    """kv: keep. Running replies go on with old keys and values; a request that comes later sees none of them.

    Some replies of the old policy complete a cache block only under the new one: those must not be found either.
    """
    import ray

    from posttrain.model.load import load_model

    lengths = (60, 60, 200, 300)
    prompts = [tuple(5 + (7 * i + 3 * j * (i + 1)) % 400 for j in range(length)) for i, length in enumerate(lengths)]
    requests = [(index, SampleRequest(prompt, n=3, max_tokens=150)) for index, prompt in enumerate(prompts)]

    async def run():
        update = None
        await engines[0].update_weights.remote(FolderWeights(models[4]), 6)
        await engines[0].submit.remote(requests)

        async def update_once(pieces):
            nonlocal update
            if update is None and pieces:
                update = engines[0].update_weights.remote(FolderWeights(models[5]), 7, kv="keep")

        replies = await collect(engines[0], 3 * len(requests), on_pieces=update_once)
        await update
        return replies

    replies = asyncio.run(run())
    straddling = [(key, reply) for (key, _), reply in replies.items() if len(join_spans(reply.spans)) == 2]
    assert straddling
    policy, gaps = load_model(models[5]), []
    for key, reply in straddling:
        after = join_spans(reply.spans)[1]
        assert after.policy_version == 7
        expected = logprobs_of(policy, prompts[key], reply.token_ids)
        gaps.append((torch.tensor(reply.logprobs) - expected)[after.start : after.end].abs().max())
    assert max(gaps) > 0.01  # the cache was kept
    known = [(*prompts[key], *reply.token_ids[:120]) for key, reply in straddling]
    greedy = [SampleRequest(prompt, temperature=0.0, max_tokens=24) for prompt in (*prompts, *known)]
    assert replies_one_by_one(engines[0], greedy) == replies_one_by_one(engines[1], greedy)

    # From now on each request has a salt. One that goes on with a rollout of version 8 reads what it has left; others
    # read nothing that is older than they are.
    turns = [SampleRequest((*prompt, 5, 6), temperature=0.0, max_tokens=8) for prompt in prompts]

    async def cached(since):
        found = {}

        async def note(pieces):
            found.update({piece.key: piece.num_cached for piece in pieces if piece.finish_reason})

        await engines[0].submit.remote([(key, replace(turn, since=since)) for key, turn in enumerate(turns)])
        replies = await collect(engines[0], len(turns), on_pieces=note)
        return [found[key] for key in range(len(turns))], [replies[key, 0] for key in range(len(turns))]

    async def after(kv, version):
        await engines[0].update_weights.remote(FolderWeights(models[4]), version, kv=kv)
        await engines[0].submit.remote([(key, replace(request, n=1)) for key, request in requests])
        await collect(engines[0], len(requests))
        await engines[0].update_weights.remote(FolderWeights(models[5]), version + 1, kv=kv)
        (known, _), (fresh, replies) = await cached(version), await cached(None)
        return known, fresh, replies

    known, fresh, replies = asyncio.run(after("keep", 8))
    assert all(number >= length - 4 for number, length in zip(known, lengths, strict=True))
    assert fresh == [0] * len(turns)
    for turn, reply in zip(turns, replies, strict=True):
        expected = logprobs_of(policy, turn.prompt_ids, reply.token_ids)
        assert torch.allclose(torch.tensor(reply.logprobs), expected, atol=1e-3)
    ray.get(engines[0].update_weights.remote(FolderWeights(models[4]), 2, kv="keep"))  # of another stage
    assert asyncio.run(cached(8))[0] == [0] * len(turns)
    assert asyncio.run(after("recompute", 10))[0] == [0] * len(turns)
    assert ray.get(engines[0].pids.remote())  # still there


# ---------------------------------------------------------------- the end of both engines


async def lost(actor, key):
    """What the engine says when it is lost, and the pieces that it still hands on."""
    pieces = []

    async def drain():
        while True:
            new, _ = await actor.collect.remote(1.0)
            pieces.extend(new)

    with pytest.raises(EngineLostError) as error:
        await drain()
    with pytest.raises(EngineLostError):
        await actor.submit.remote([(key, SampleRequest(PROMPTS[0]))])
    with pytest.raises(EngineLostError):
        await actor.generate_wave.remote([SampleRequest(PROMPTS[0])], 0)
    with pytest.raises(EngineLostError):
        await actor.update_weights.remote(FolderWeights("nowhere"), 9)
    return pieces, str(error.value)


async def signal_in_flight(actor, number):
    pids = await actor.pids.remote()
    assert len(set(pids.values())) == 2
    requests = [(index, SampleRequest(prompt, n=8, max_tokens=450)) for index, prompt in enumerate(PROMPTS)]
    await actor.submit.remote(requests)
    pieces = []
    while not pieces:
        pieces, _ = await actor.collect.remote(1.0)
    os.kill(pids["core"], number)
    rest, message = await lost(actor, 99)
    return pieces, rest, message


@slow
def test_a_killed_core_is_an_error_and_no_token_is_lost(engines):
    pieces, rest, message = asyncio.run(signal_in_flight(engines[0], signal.SIGKILL))
    assert "engine engine-0, policy version" in message
    assert "has died" in message
    replies = defaultdict(Whole)
    for piece in (*pieces, *rest):
        replies[piece.key, piece.index].add(piece)
    begun = [reply for reply in replies.values() if not reply.finish_reason]
    assert begun
    assert all(reply.token_ids for reply in begun)


@slow
def test_a_frozen_core_is_an_error(engines):
    import ray

    core = ray.get(engines[1].pids.remote())["core"]
    try:
        _, _, message = asyncio.run(signal_in_flight(engines[1], signal.SIGSTOP))
    finally:
        os.kill(core, signal.SIGCONT)
    assert "engine engine-1, policy version" in message
    assert "no answer" in message
