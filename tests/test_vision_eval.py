"""Evaluation on prompts with pictures, by a reward that looks at them."""

import pytest
from vision_folder import REWARD, write_picture_prompts
from vision_models import save_vision_policy

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.images.render import prompt_with_pictures
from posttrain.data.images.store import ImageStore
from posttrain.data.images.tiles import tile_rule
from posttrain.eval import stage
from posttrain.eval.config import EvalConfig
from posttrain.model import load_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EvalConfig:
    """Six prompts, with 0, 1 and 2 pictures."""
    folder = tmp_path_factory.mktemp("eval")
    model = save_vision_policy(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    settings = {
        "model": {"path": str(model), "dtype": "float32"}, "data": {"path": str(write_picture_prompts(folder, 6))},
        "images": {},
        "reward": {"name": f"{folder}/reward.py:even_share"}, "samples": 2, "k": 2, "sampling": {"max_tokens": 16},
        "resources": {"rollout": {"cpus": 0.5}},
        "engine": {"max_model_len": 256, "kv_cache_gib": 0.1, "max_num_seqs": 16, "stream_interval": 2},
    }  # fmt: skip
    return validate_config(EvalConfig, settings, "test")


def test_requests_have_the_tokens_and_references_of_their_pictures(config, tmp_path):
    context = StageContext("eval", tmp_path, tmp_path / "events.jsonl", 0)
    rows, asked = stage.prepare(config, context)
    store, tokenizer = ImageStore(tmp_path / "pictures"), load_tokenizer(config.model.path)
    rule = tile_rule(config.model.path, tokenizer)
    for _, row, request in asked:
        prompt = prompt_with_pictures(tokenizer, row.messages, store, rule=rule)
        assert request.prompt_ids == tuple(prompt.ids)
        assert request.pictures == tuple(map(store.reference, prompt.pictures))
    assert sorted(len(request.pictures) for _, _, request in asked) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(rows) == 6


@pytest.mark.slow
def test_every_prompt_is_evaluated(ray_session, config, tmp_path):
    """The reward reads the pictures; a reply whose pictures it cannot read would have no score."""
    found = stage.run(config, StageContext("eval", tmp_path, tmp_path / "events.jsonl", 0))
    assert found["stats"]["n"] == 6
    assert found["stats"]["unscored"] == 0
