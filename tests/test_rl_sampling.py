"""RL draws replies from the whole vocabulary: the trainer's log-probabilities are of all of it."""

from typing import Any

import pytest

from posttrain.config.base import validate_config
from posttrain.errors import ConfigError
from posttrain.records import DrawnPrompt, Message, Prompt, Row
from posttrain.rl.config import RlConfig
from posttrain.rl.loop.evaluation import evaluation_request
from posttrain.rl.rollouts.config import RENORMALISING
from posttrain.rl.rollouts.requests import sample_request

ROW = Row("p", "math", (Message("user", "?"),))
PROMPT = DrawnPrompt(ROW, None, Prompt(ROW.messages, (1,)))


def config_of(**changes: Any) -> RlConfig:
    data = {
        "model": {"path": "model", "dtype": "float32"},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"name": "final_answer"},
        **changes,
    }
    return validate_config(RlConfig, data, "test")


@pytest.mark.parametrize(
    ("key", "value"), [("top_p", 0.9), ("top_k", 50), ("min_p", 0.1), ("repetition_penalty", 1.2),
                       ("presence_penalty", 0.5), ("frequency_penalty", -0.5)]
)  # fmt: skip
def test_what_changes_the_distribution_is_refused_with_the_reason(key: str, value: float):
    with pytest.raises(ConfigError, match=rf"sampling: got {key} {value}: .*every importance ratio.*remove the key"):
        config_of(sampling={"max_tokens": 16, key: value})


def test_values_that_change_nothing_are_taken():
    config = config_of(sampling={"temperature": 0.7, "max_tokens": 16, **RENORMALISING})
    assert config.sampling.model_dump() == {"temperature": 0.7, "max_tokens": 16}
    request = sample_request(config.sampling, PROMPT, 4, stop_ids=(2,))
    assert (request.temperature, request.top_p, request.max_tokens, request.stop_token_ids) == (0.7, 1.0, 16, (2,))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.8), (0.0, 1.0)])
def test_the_evaluation_has_a_nucleus_of_its_own(temperature: float, top_p: float):
    """Of the likeliest reply there is one nucleus, whatever its size."""
    config = config_of(evaluation={"data": {"path": "heldout.jsonl"}, "temperature": temperature, "top_p": 0.8})
    assert config.evaluation is not None
    assert evaluation_request(config.evaluation, PROMPT, max_tokens=8, stop_ids=()).top_p == top_p
