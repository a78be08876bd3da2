"""Profile, training and both evaluations call a reply right by the same rule and the same threshold."""

from typing import Any

import pytest

from posttrain.config.base import validate_config
from posttrain.errors import ConfigError
from posttrain.eval.config import EvalConfig
from posttrain.eval.replies import PromptReplies, Reply
from posttrain.eval.stage import measure
from posttrain.metrics.correctness import is_right, passes_and_failures
from posttrain.records import (
    DrawnPrompt,
    FinishReason,
    Message,
    Prompt,
    RewardResult,
    Rollout,
    Row,
    Scored,
    Segment,
    VersionSpan,
)
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.groups import scored_group
from posttrain.rl.loop.evaluation import accuracies, evaluated_prompt
from posttrain.rl.loop.tally import StepTally
from posttrain.rl.prompts.profile import difficulties
from posttrain.rl.records import Drop, DropReason, Group

REWARDS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROW = Row("p", "math", (Message("user", "?"),))
PROMPT = Prompt(ROW.messages, (1,))
REPLY = Segment((2,), True, (0.0,), (VersionSpan(0, 0, 1),))


def rl_config(**changes: Any) -> RlConfig:
    data = {
        "model": {"path": "model", "dtype": "float32"},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"name": "final_answer"},
        "sampling": {"max_tokens": 16},
        **changes,
    }
    return validate_config(RlConfig, data, "test")


def eval_config(**changes: Any) -> EvalConfig:
    data = {
        "model": {"path": "model"},
        "data": {"path": "heldout.jsonl"},
        "reward": {"name": "final_answer"},
        "samples": 0,
        **changes,
    }
    return validate_config(EvalConfig, data, "test")


def shares(threshold: float) -> dict[str, float]:
    """The share of right replies among REWARDS, as each part of a run counts it."""
    config = rl_config(reward={"name": "final_answer", "correct_threshold": threshold}, profile={})
    rollouts = [Rollout("p", "g0", index, PROMPT, (REPLY,), "x", FinishReason.STOP) for index in range(5)]
    scores = [Scored(RewardResult(reward)) for reward in REWARDS]
    scored = scored_group(Group(0, DrawnPrompt(ROW, None, PROMPT), tuple(rollouts)), scores, config)
    tally = StepTally({}, {}, config.reward.correct_threshold)
    tally.decided(scored, None)
    beside = accuracies([evaluated_prompt(scored)], samples=5, threshold=config.reward.correct_threshold)
    replies = [PromptReplies(ROW, Reply("x", 1, False, reward), ()) for reward in REWARDS]
    return {
        "profile": difficulties(config, [(rollout, ROW) for rollout in rollouts], scores)[0].pass_rate,
        "selection": passes_and_failures(scored.rewards, config.reward.correct_threshold)[0] / 5,
        "steps": tally.values(0, [scored], ages_s=[0.0], waited_s=0.0, trained={})["pass_rate"],
        "evaluation": beside["all"]["accuracy"],
        "eval": measure(replies, eval_config(correct_threshold=threshold), 0)["all"]["greedy"],
    }


@pytest.mark.parametrize(("threshold", "share"), [(0.25, 0.8), (0.5, 0.6), (0.51, 0.4), (1.0, 0.2)])
def test_every_part_of_a_run_counts_the_same_replies_as_right(threshold: float, share: float):
    assert shares(threshold) == dict.fromkeys(("profile", "selection", "steps", "evaluation", "eval"), share)


def test_a_reward_that_equals_the_threshold_is_right():
    assert is_right(0.5, 0.5)
    assert not is_right(0.4999, 0.5)


@pytest.mark.parametrize(("threshold", "name"), [(0.5, "groups_too_easy"), (0.6, "groups_too_hard")])
def test_a_group_of_equal_rewards_is_too_easy_if_they_are_right(threshold: float, name: str):
    rollouts = tuple(Rollout("p", "g0", index, PROMPT, (REPLY,), "x", FinishReason.STOP) for index in range(2))
    group = Group(0, DrawnPrompt(ROW, None, PROMPT), rollouts)
    scored = scored_group(group, [Scored(RewardResult(0.5))] * 2, rl_config())
    tally = StepTally({}, {}, threshold)
    tally.decided(scored, Drop(DropReason.ZERO_ADVANTAGE))
    assert tally.values(0, [scored], ages_s=[0.0], waited_s=0.0, trained={})[name] == 1


def test_the_evaluation_beside_the_training_has_no_other_threshold():
    evaluation = {"data": {"path": "heldout.jsonl"}, "correct_threshold": 0.8}
    with pytest.raises(ConfigError, match=r"is 0\.8 and reward\.correct_threshold is 0\.5.*set reward.correct_thresh"):
        rl_config(evaluation=evaluation)
    rl_config(evaluation=evaluation, reward={"name": "final_answer", "correct_threshold": 0.8})


def test_both_places_of_eval_mean_one_threshold():
    reward = {"name": "final_answer", "correct_threshold": 0.8}
    assert eval_config().reward.correct_threshold == 0.5
    assert eval_config(correct_threshold=0.8).reward.correct_threshold == 0.8
    assert eval_config(reward=reward).reward.correct_threshold == 0.8
    config = eval_config(reward=reward, correct_threshold=0.8)
    assert validate_config(EvalConfig, config.model_dump(mode="json"), "test") == config
    with pytest.raises(ConfigError, match=r"correct_threshold is 0\.7 and reward\.correct_threshold is 0\.8"):
        eval_config(reward=reward, correct_threshold=0.7)
