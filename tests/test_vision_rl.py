"""Pictures in the trainer of RL: micro-batches that hold each picture once, and log-probabilities of single samples."""

import random
from pathlib import Path

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from transformers import Llama4ForConditionalGeneration
from vision_folder import REWARD, write_picture_prompts
from vision_models import draw, save_vision_policy

from posttrain.config.base import validate_config
from posttrain.config.images import TrainedImagesConfig
from posttrain.config.models import ModelConfig
from posttrain.config.training import PARTS
from posttrain.context import StageContext
from posttrain.data.images.render import prompt_of, prompt_with_pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.tiles import tile_rule
from posttrain.files import read_jsonl
from posttrain.model import load_model, load_tokenizer
from posttrain.model.vision.parts import part_of
from posttrain.records import (
    DrawnPrompt,
    FinishReason,
    ImagePart,
    Message,
    Rollout,
    Row,
    Segment,
    TextPart,
    VersionSpan,
)  # fmt: skip
from posttrain.rl import stage as rl
from posttrain.rl.config import RlConfig
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.audit import audit_stage
from posttrain.rl.history.recorded import read_rollouts
from posttrain.rl.history.replay import recorded_steps, replay
from posttrain.rl.records import Group, ScoredGroup
from posttrain.rl.training.batches import collate, micro_batches
from posttrain.rl.training.policy import PAD_ID, load_token_policy
from posttrain.rl.training.samples import TrainSample, train_samples

SIZES = {"a": (56, 56), "b": (56, 56), "wide": (112, 56)}
REPLIES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_vision_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def shown(folder, tmp_path_factory):
    """(the file of the pictures, samples of four groups). The first two prompts differ in their pictures alone."""
    place = tmp_path_factory.mktemp("pictures")
    store, tokenizer = ImageStore(place / "pictures"), load_tokenizer(folder)
    rule = tile_rule(folder, tokenizer)
    keys = {
        name: store.add((place / draw(place / f"{name}.png", seed, size)).read_bytes()).key
        for seed, (name, size) in enumerate(SIZES.items(), 1)
    }
    rng, samples = random.Random(0), []
    for names in (["a"], ["b"], ["a", "wide"], []):
        content = (*(ImagePart(keys[name]) for name in names), TextPart("Sum: 3 + 4"))
        prompt = prompt_with_pictures(
            tokenizer, [Message("user", content if names else "Sum: 3 + 4")], store, rule=rule
        )
        start = len(prompt.ids)
        for number in range(REPLIES):
            # A policy samples tokens of pictures as it samples others.
            reply = [rng.randrange(3, 200) for _ in range(5 + number)] + [rule.patch, rule.image, rule.start, 9]
            logprobs = tuple(-rng.random() for _ in reply)
            samples.append(
                TrainSample(
                    (*prompt.ids, *reply),
                    ((start, start + len(reply)),),
                    logprobs,
                    (0,) * len(reply),
                    0.5,
                    pictures=prompt.pictures,
                )
            )
    return store.path, samples


def policy_of(folder: Path, store: Path, *, shared: bool):
    model = ModelConfig(path=str(folder), dtype="float32")
    return load_token_policy(model, 1.0, shared_prefixes=shared, images=TrainedImagesConfig(), store=store)


def alone(theirs, sample: TrainSample, tiles) -> torch.Tensor:
    """By transformers' model, whose own forward would refuse the <|patch|> that was sampled."""
    (start, end), ids = sample.trained[0], torch.tensor([sample.token_ids])
    embeds = theirs.get_input_embeddings()(ids)
    if pictures := tiles.inputs(sample.pictures):
        features = theirs.vision_model(pictures["pixel_values"].to(theirs.dtype)).last_hidden_state.flatten(0, 1)
        stands = (ids == tiles.patch_id) & (torch.arange(len(sample)) < start)
        embeds = embeds.masked_scatter(stands[..., None], theirs.multi_modal_projector(features))
    logits = theirs.language_model(inputs_embeds=embeds, use_cache=False).logits[0]
    return logits[start - 1 : end - 1].log_softmax(-1).gather(1, ids[0, start:end, None])[:, 0]


@pytest.mark.parametrize("shared", [True, False])
def test_log_probabilities_are_those_of_each_sample_alone(folder, shown, shared):
    """In micro-batches of all groups, also where prompts have the same tokens and other pictures."""
    path, samples = shown
    policy = policy_of(folder, path, shared=shared).eval()
    layout = {"shared": policy.shares_prefixes, "tiles": policy.tiles}
    assert policy.shares_prefixes == shared
    (chunk,) = micro_batches(samples, 4096, **layout)
    batch = collate(chunk, PAD_ID, **layout)
    with torch.no_grad():
        found = policy(batch)[0]
        models = [
            Llama4ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
            for dtype in (torch.float32, torch.float64)
        ]
        peer = torch.cat([alone(models[0], sample, policy.tiles) for sample in chunk])
        with float64_inside():
            exact = torch.cat([alone(models[1], sample, policy.tiles) for sample in chunk])
    assert_as_exact(found, peer, exact)
    assert len(batch.pictures["pixel_values"]) == 1 + 1 + 3  # each picture once
    once = 1 + 1 + (1 + 3)  # tiles that the prompts show
    assert len(batch.pictures["shown_tiles"]) == (once if shared else REPLIES * once)


def test_prompts_with_other_pictures_share_no_token_behind_them(folder, shown):
    path, samples = shown
    policy = policy_of(folder, path, shared=True)
    two = [samples[0], samples[REPLIES]]  # the same tokens, pictures a and b
    batch = collate(two, PAD_ID, shared=True, tiles=policy.tiles)
    first = two[0].token_ids.index(policy.tiles.patch_id)
    one_prompt = two[0].trained[0][0]
    rows = [sample.token_ids[:-1] for sample in two]
    assert batch.input_ids_BS.shape[1] >= sum(map(len, rows)) - first
    same = collate(samples[:2], PAD_ID, shared=True, tiles=policy.tiles)
    assert same.input_ids_BS.shape[1] <= sum(len(sample) - 1 for sample in samples[:2]) - one_prompt
    assert (batch.input_ids_BS >= 0).all()


def test_every_part_has_a_gradient_and_a_batch_of_text_one_of_zero(folder, shown):
    path, samples = shown
    policy = policy_of(folder, path, shared=True).train()
    layout = {"shared": True, "tiles": policy.tiles}
    policy(collate(samples[:REPLIES], PAD_ID, **layout))[0].sum().backward()
    vision = list(policy.policy.vision_model.parameters())
    assert all(weight.grad is not None and weight.grad.any() for weight in vision)
    policy.zero_grad()
    policy(collate(samples[-REPLIES:], PAD_ID, **layout))[0].sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in vision)


def test_a_prompt_names_its_pictures_and_a_replay_gets_them_from_the_archive(folder, tmp_path):
    store = ImageStore(tmp_path / "pictures")
    key = store.add((tmp_path / draw(tmp_path / "a.png", 1)).read_bytes()).key
    prompt = prompt_of([Message("user", (ImagePart(key), TextPart("x")))], [1, 2], store)
    assert prompt.pictures == (f"{store.path}#{key}",)
    row = Row("p", "image", prompt.messages)
    rollouts = tuple(
        Rollout("p", "g0", index, prompt, (Segment((5, index), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),)),), "no",
                FinishReason.STOP)
        for index in range(2)
    )  # fmt: skip
    scored = ScoredGroup(Group(0, DrawnPrompt(row, None, prompt), rollouts), (1.0, 0.0), ("", ""), (0.5, -0.5))
    archive = RolloutArchive(tmp_path / "rollouts", load_tokenizer(folder))
    archive.add(scored, step=0, trainer_version=0, status="trained")
    archive.write(0)
    archive.wait()
    (step,) = recorded_steps(tmp_path)
    assert step.samples == tuple(train_samples([scored], 0))
    assert [sample.pictures for sample in step.samples] == [(key,)] * 2


@pytest.mark.slow
def test_rl_trains_on_pictures_goes_on_and_is_replayed(ray_session, folder, tmp_path):
    """Asynchronous; the stage's own check compares engines and trainer. More steps continue from the checkpoint, and a
    replay without engines gives the same weights."""
    (tmp_path / "reward.py").write_text(REWARD)
    engine = {"max_model_len": 256, "kv_cache_gib": 0.1, "max_num_seqs": 24, "stream_interval": 4, "deadline_s": 20.0}
    shared = {"reward": {"name": f"{tmp_path}/reward.py:even_share"}, "engine": engine,
              "sampling": {"max_tokens": 24}, "images": {}}  # fmt: skip
    settings = {
        **shared, "model": {"path": str(folder), "dtype": "float32"},
        "prompts": {"path": str(write_picture_prompts(tmp_path, 12))}, "profile": {"samples": 2, "band": [0.0, 1.0]},
        "groups_per_step": 3, "group_size": 4, "max_staleness": 2, "checkpoint_every": 2,
        "modalities": {"text": 0.4, "image": 0.4, "multi-image": 0.2}, "modality_curriculum": {},
        "optimizer": {"learning_rate": 1e-3}, "images": {"learning_rates": {"vision": 2e-3}},
        "resources": {"rollout": {"cpus": 0.5}},
    }  # fmt: skip
    context = StageContext("rl", tmp_path / "rl", tmp_path / "rl/events.jsonl", seed=3, warm_engines=True)
    context.dir.mkdir()
    rl.run(validate_config(RlConfig, {**settings, "steps": 2}, "test"), context)
    config = validate_config(RlConfig, {**settings, "steps": 4}, "test")
    outputs = rl.run(config, context)
    assert outputs["parity_mean_gap"] < 1e-4
    audit = audit_stage(context.dir)
    assert audit.is_clean, audit.problems
    trained = [item for item in read_rollouts(context.dir) if item.status == "trained"]
    assert any(item.rollout.prompt.media for item in trained)
    logged = {name for line in read_jsonl(context.dir / "metrics.jsonl") for name in line}
    assert {"reward_modality/image", "reward_modality/multi-image"} & logged
    shares = [
        {name: value for name, value in line.items() if name.startswith("modality_share/")}
        for line in read_jsonl(context.dir / "metrics.jsonl")
    ]
    assert all(len(line) == 3 and sum(line.values()) == pytest.approx(1) for line in shares)
    assert shares[-1]["modality_share/text"] != pytest.approx(0.4)
    again = StageContext("rl", tmp_path / "again", tmp_path / "again/events.jsonl", seed=3)
    again.dir.mkdir()
    replayed = replay(config, again, context.dir)
    assert replayed["batches_equal"]
    assert replayed["weights_equal"], replayed
    start, end = (load_model(path, images=True).state_dict() for path in (folder, outputs["model"]))
    moved = {part: max(float((end[n] - start[n]).abs().max()) for n in start if part_of(n) == part) for part in PARTS}
    assert moved["vision"] > 1.5 * moved["text"] > 0  # by its own rate
