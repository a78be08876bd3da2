"""What several test files share: a tiny Llama 4 folder with random weights, its tokenizer, and one Ray session."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The quick start's tokenizer."""
    from posttrain.base.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A Hugging Face folder: the quick start's architecture, smaller, with random weights that tell replies apart."""
    import torch

    from posttrain.base.config import ModelSizes
    from posttrain.base.model import build_model
    from posttrain.base.tokenizer import save_tokenizer

    sizes = ModelSizes(hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=128, expert_ffn=96)
    model = build_model(sizes, tiny_tokenizer, 0.0, seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # else every token is about as likely as any other
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray for all tests that need one in this process; it ends, with its children, when the tests do."""
    from posttrain.pipeline.ray_session import ray_session as session

    with session():
        yield
