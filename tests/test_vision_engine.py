"""A real vLLM engine that is shown pictures: exact tokens, what the trainer computes, and new weights in flight."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from vision_models import draw, save_vision_policy

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.data.images.render import prompt_with_pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.tiles import tile_rule
from posttrain.model import load_model, load_tokenizer
from posttrain.model.vision.fusion import image_places
from posttrain.model.vision.tiling import PictureTiles
from posttrain.records import ImagePart, Media, Message, TextPart
from posttrain.sampling.manifests import FolderWeights
from posttrain.sampling.requests import SampleRequest

pytestmark = pytest.mark.slow
SIZES = {"text": [], "one": [(56, 56)], "tiles": [(112, 56)], "three": [(56, 56), (56, 112), (40, 40)]}
REPLY = 24
# Of log-probabilities in fp32, by two implementations. Features of other weights, or of another picture, give > 0.05.
CLOSE = 1e-4


class Shown:
    """Two sets of weights, an engine that has the first, and a request for each entry of SIZES."""

    def __init__(self, folder: Path):
        self.folders = [save_vision_policy(folder / name, seed) for seed, name in enumerate("ab")]
        self.models: list[Any] = [load_model(path, images=True) for path in self.folders]
        store = ImageStore(folder / "pictures")
        tokenizer = load_tokenizer(self.folders[0])
        rule = tile_rule(self.folders[0], tokenizer)
        self.tiles = PictureTiles(store, self.folders[0], rule)
        self.requests: dict[str, SampleRequest] = {}
        for name, sizes in SIZES.items():
            keys = [
                store.add((folder / draw(folder / f"{name}{n}.png", 3 * n + len(name), size)).read_bytes()).key
                for n, size in enumerate(sizes)
            ]
            content = (*map(ImagePart, keys), TextPart("Sum: 3 + 4"))
            message = Message("user", content if keys else "Sum: 3 + 4")
            prompt = prompt_with_pictures(tokenizer, [message], store, rule=rule)
            self.requests[name] = SampleRequest(
                tuple(prompt.ids), max_tokens=REPLY, pictures=tuple(map(store.reference, keys))
            )

    def gaps(self, name: str, token_ids: Any, logprobs: Any, *, which: int) -> torch.Tensor:
        """For each sampled token the difference of the engine's log-probability and the model's."""
        request, model = self.requests[name], self.models[which]
        start = len(request.prompt_ids)
        ids = torch.tensor([[*request.prompt_ids, *token_ids]])
        places = image_places(ids, model.config.image_token_id, torch.arange(ids.shape[1])[None] >= start)
        pictures = self.tiles.inputs(Media(reference).key for reference in request.pictures)
        with torch.no_grad():
            logits = model(ids, image_places=places if pictures else None, use_cache=False, **pictures).logits[0]
        log_probs = logits[start - 1 : -1].log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        return (log_probs - torch.tensor(logprobs)).abs()

    def gap(self, name: str, reply: Any, which: int) -> float:
        """The largest of `gaps`."""
        return float(self.gaps(name, reply.token_ids, reply.logprobs, which=which).max())


@pytest.fixture(scope="module")
def shown(ray_session, tmp_path_factory):
    from posttrain.sampling.client import Engines

    folder = tmp_path_factory.mktemp("shown")
    made = Shown(folder)
    context = StageContext("test", folder, folder / "events.jsonl", warm_engines=False)
    served = ServedModelConfig(path=str(made.folders[0]), dtype="float32")
    engine = EngineConfig(max_model_len=256, kv_cache_gib=0.1, max_num_seqs=16, stream_interval=2)
    with Engines(context, served, engine, resources=ActorResources(cpus=0.5)) as engines:
        made.actor = engines.actors[0]  # pyright: ignore[reportAttributeAccessIssue]
        yield made


def wave(shown: Any, seed: int = 0) -> dict[str, Any]:
    import ray

    sampled, *_ = ray.get(shown.actor.generate_wave.remote(list(shown.requests.values()), seed))
    return {name: replies[0] for name, replies in zip(shown.requests, sampled, strict=True)}


def load(shown: Any, which: int, version: int, kv: str) -> None:
    import ray

    ray.get(shown.actor.update_weights.remote(FolderWeights(str(shown.folders[which])), version, kv))


def test_an_engine_samples_from_what_the_trainer_computes(shown):
    """Twice, because a picture that an engine knows takes another way. And from exactly the tokens that it was sent."""
    for seed in range(2):
        for name, reply in wave(shown, seed).items():
            assert len(reply.token_ids) == REPLY
            assert shown.gap(name, reply, 0) < CLOSE
            assert shown.gap(name, reply, 1) > 0.05


def test_new_weights_make_new_features(shown):
    """With both ways to treat the cache; the pictures are known to the engine, and their features are not."""
    for version, which, kv in ((1, 1, "keep"), (2, 0, "keep"), (3, 1, "recompute"), (4, 0, "recompute")):
        load(shown, which, version, kv)
        for name, reply in wave(shown, version).items():
            assert len(reply.token_ids) == REPLY, f"an empty reply to {name}"
            assert shown.gap(name, reply, which) < CLOSE


def test_replies_go_on_under_new_weights(shown):
    """In flight: the tokens of each version have the log-probabilities of its weights, those of known pictures too."""
    asyncio.run(_in_flight(shown))


async def _in_flight(shown: Any) -> None:
    from msgspec.structs import replace

    load(shown, 0, 10, "recompute")
    names = ["one", "three"]
    asked = [(key, replace(shown.requests[name], n=4, max_tokens=120)) for key, name in enumerate(names)]
    await shown.actor.submit.remote(asked)
    pieces: dict[tuple[int, int], list[Any]] = {}
    open_replies, updated = 8, False
    while open_replies:
        found, _ = await shown.actor.collect.remote(5.0)
        for piece in found:
            pieces.setdefault((piece.key, piece.index), []).append(piece)
            open_replies -= bool(piece.finish_reason)
        if not updated and found:
            updated = True
            await shown.actor.update_weights.remote(FolderWeights(str(shown.folders[1])), 11, "recompute")
    sampled_by = set()
    for (key, _), own in pieces.items():
        ids = tuple(token for piece in own for token in piece.token_ids)
        logprobs = tuple(value for piece in own for value in piece.logprobs)
        for version, which in ((10, 0), (11, 1)):
            spans = [span for piece in own for span in piece.versions if span.policy_version == version]
            if not spans:
                continue
            sampled_by.add(version)
            first, last = min(span.start for span in spans), max(span.end for span in spans)
            assert shown.gaps(names[key], ids, logprobs, which=which)[first:last].max() < CLOSE
    assert sampled_by == {10, 11}


def test_a_reply_is_computed_again_whose_picture_was_read_for_another(shown):
    """Its prompt was in the prefix cache when it started, and the reply for which it was read has ended."""
    asyncio.run(_computed_again(shown))


async def _computed_again(shown: Any) -> None:
    from msgspec.structs import replace

    load(shown, 0, 20, "recompute")
    prompt = shown.requests["three"]
    await shown.actor.submit.remote([(0, replace(prompt, max_tokens=2))])
    while not any(piece.finish_reason for piece in (await shown.actor.collect.remote(5.0))[0]):
        pass
    await shown.actor.submit.remote([(1, replace(prompt, max_tokens=120))])
    pieces: list[Any] = []
    while not pieces:
        pieces, _ = await shown.actor.collect.remote(5.0)
    assert not pieces[-1].finish_reason
    await shown.actor.update_weights.remote(FolderWeights(str(shown.folders[1])), 21, "recompute")
    while not pieces[-1].finish_reason:
        pieces += (await shown.actor.collect.remote(5.0))[0]
    spans = [span for piece in pieces for span in piece.versions if span.policy_version == 21]
    ids = [token for piece in pieces for token in piece.token_ids]
    logprobs = [value for piece in pieces for value in piece.logprobs]
    first, last = spans[0].start, spans[-1].end
    assert shown.gaps("three", ids, logprobs, which=1)[first:last].max() < CLOSE


def test_a_picture_is_cut_and_encoded_once_for_the_replies_of_its_group(shown, tmp_path):
    """Though the first replies are one request and the others another one; it is encoded anew under new weights."""
    asyncio.run(_counted(shown, tmp_path / "encoded"))


async def _counted(shown: Any, log: Path) -> None:
    import ray
    from msgspec.structs import replace

    from posttrain.sampling.engine import EngineActor

    cut_log = log.with_suffix(".cut")

    def note(file: Path, count: int) -> None:
        with file.open("a") as lines:
            lines.write(f"{count}\n")

    class Counted(EngineActor):
        """An engine that notes how many pictures it cuts, and its core, which is forked, how many it encodes."""

        async def start(self) -> dict[str, Any]:
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner

            from posttrain.sampling import pictures

            runner: Any = GPUModelRunner
            encode, cut = runner._execute_mm_encoder, pictures._render

            def encoded(runner: Any, scheduled: Any) -> Any:
                note(log, sum(map(len, scheduled.scheduled_encoder_inputs.values())))
                return encode(runner, scheduled)

            def rendered(llm: Any, references: tuple[str, ...], image_id: int) -> Any:
                note(cut_log, len(references))
                return cut(llm, references, image_id)

            runner._execute_mm_encoder, pictures._render = encoded, rendered
            return await super().start()

    settings = EngineConfig(max_model_len=256, kv_cache_gib=0.1, max_num_seqs=16, stream_interval=2, deadline_s=60.0)
    model = ServedModelConfig(path=str(shown.folders[0]), dtype="float32")
    actor: Any = ray.remote(Counted).options(num_cpus=0).remote("counted", model.model_dump(), settings.model_dump())
    await actor.start.remote()

    async def counts(name: str, key: int) -> tuple[int, int]:
        """How many pictures the engine cuts, and encodes, for a group of two replies and then six more."""
        before = _total(cut_log), _total(log)
        for part, replies in enumerate((2, 6)):
            request = replace(shown.requests[name], n=replies, max_tokens=6)
            await actor.submit.remote([(2 * key + part, request)])
            while replies:
                pieces, _ = await actor.collect.remote(5.0)
                replies -= sum(bool(piece.finish_reason) for piece in pieces)
        return _total(cut_log) - before[0], _total(log) - before[1]

    try:
        assert await counts("three", 0) == (3, 3)
        assert await counts("three", 1) == (0, 0)  # drawn again
        assert await counts("one", 2) == (1, 1)
        assert await counts("text", 3) == (0, 0)
        await actor.update_weights.remote(FolderWeights(str(shown.folders[1])), 1, "recompute")
        assert await counts("three", 4) == (0, 3)
    finally:
        await actor.shutdown.remote()
        ray.kill(actor)


def _total(log: Path) -> int:
    return sum(map(int, log.read_text().split())) if log.exists() else 0
