"""Verifiers of system instructions in the reward, and what a reward says that it needs of a row."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace
from rollout_records import one_turn

from posttrain.config.base import validate_config
from posttrain.errors import ConfigError, DataError, PluginError
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS
from posttrain.records import Message, Rollout, Row, VersionSpan
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.verifiers import check_rewardable, reward_spec
from posttrain.rl.prompts.quotas import mixture_shares
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward
from posttrain.scoring.plugins.requirements import check_fields, missing_fields, reward_sources
from posttrain.scoring.pool.pool import RewardPool

PLUGIN = '''
from posttrain.records import RewardResult

REQUIRES = {"short": ["limit"], "either": ["answer|other"]}
WARM = []

def warm_up():
    WARM.append(1)

def short(rollout, row, words=3):
    """1 for a reply of few words."""
    count = len(rollout.text.split())
    return RewardResult(float(count <= words), {"words": count}, f"{count} words")

def either(rollout, row):
    return 1.0

def warmed(rollout, row):
    return float(len(WARM))

async def later(rollout, row):
    return 1.0
'''
BRIEF, LOUD = "Be brief.", "Use capitals."


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return path


def row_of(name: str = "r", answer: object = "4", system: bool = False, **fields: object) -> Row:
    turns = (Message("user", "2 + 2?"),)
    return Row(name, "math", (Message("system", "Mine."), *turns) if system else turns, answer, fields)


def reply(text: str, system: str | None = None) -> Rollout:
    return one_turn("r", "g", 0, (1,), (2,), text, (0.0,), (VersionSpan(0, 0, 1),), "stop", system)


def config_of(*instructions: dict, **changes: object) -> RlConfig:
    data = {
        "model": {"path": "model"},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"name": "final_answer", "workers": 2},
        "systems": {"instructions": list(instructions)},
        **changes,
    }
    return validate_config(RlConfig, data, "test")


def pool_of(config: RlConfig) -> RewardPool:
    return RewardPool(reward_spec(config.reward, config.systems), config.reward.workers, config.reward.timeout_s)


# --- verifiers ---


@pytest.mark.slow
def test_the_reward_is_the_tasks_and_the_verifiers_of_what_was_drawn(plugin: Path):
    """(1 - w) R + w V, in real reward processes; without a verifier it is the task's alone."""
    config = config_of(
        {"text": BRIEF, "verifier": {"name": f"{plugin}:short", "args": {"words": 2}, "weight": 0.25}},
        {"text": LOUD},
        {"text": ""},
    )
    texts = [("Answer: 4", BRIEF), ("so it is Answer: 4", BRIEF), ("Answer: 5", BRIEF), ("ever so long a reply", BRIEF),
             ("so it is Answer: 4", LOUD), ("so it is Answer: 4", None)]  # fmt: skip
    pool = pool_of(config)
    assert pool.num_processes == 2
    results = [scored.result for scored in pool.score_all((reply(*item), row_of()) for item in texts)]
    assert all(results)
    assert [result.value for result in results if result] == [1.0, 0.75, 0.25, 0.0, 1.0, 1.0]
    assert results[1] is not None
    assert results[1].parts == {"task": 1.0, "system": 0.0, "system.words": 5.0}
    assert results[1].reason == "task 1; system 0 (5 words)"
    assert results[2] is not None
    assert results[2].reason == "task 0 (wrong); system 1 (2 words)"
    assert results[4] is not None
    assert results[4].parts == {}


def test_without_verifiers_the_reward_is_what_was_configured():
    config = config_of({"text": BRIEF}, reward={"name": "final_answer", "args": {"marker": "="}})
    assert reward_spec(config.reward, config.systems) == RewardSpec("final_answer", {"marker": "="})


@pytest.mark.slow
def test_an_unscored_part_leaves_the_rollout_unscored(plugin: Path):
    config = config_of({"text": BRIEF, "verifier": {"name": f"{plugin}:short", "args": {"words": "two"}}})
    scored = pool_of(config).score_all([(reply("Answer: 4", BRIEF), row_of())])[0]
    assert scored.result is None
    assert "TypeError" in scored.reason


@pytest.mark.slow
def test_what_cannot_be_part_of_another_reward_is_told_when_the_pool_starts(plugin: Path):
    config = config_of({"text": BRIEF, "verifier": {"name": f"{plugin}:later"}})
    with pytest.raises(PluginError, match="later' is async; it cannot be part of another reward"):
        pool_of(config).score_all([])


@pytest.mark.slow
def test_rewards_inside_another_are_warmed_up_before_the_first_score(plugin: Path):
    by_capability = {"name": "by_capability", "args": {"rewards": {"default": f"{plugin}:warmed"}}}
    config = config_of({"text": BRIEF, "verifier": {"name": "final_answer", "weight": 0.5}}, reward=by_capability)
    pools = [pool_of(config), RewardPool(RewardSpec("by_capability", by_capability["args"]))]
    for pool in pools:
        scored = pool.score_all([(reply("x"), row_of())])[0]
        assert scored.result is not None, scored.reason
        assert scored.result.value == 1.0


def test_a_verifier_is_checked_like_a_reward(plugin: Path):
    config = config_of(
        {"text": BRIEF, "verifier": {"name": f"{plugin}:shrot"}}, {"text": LOUD, "verifier": {"name": "instructoins"}}
    )
    told = "\n".join(input_problems(config, KINDS["rl"]))
    assert "systems.instructions.0.verifier.name: reward" in told
    assert "did you mean 'short'?" in told
    assert (
        "systems.instructions.1.verifier.name: reward 'instructoins' is not known; did you mean 'instructions'" in told
    )


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ({"text": "", "verifier": {"name": "math"}}, "an empty text is no system turn"),
        ({"text": "x", "verifier": {"name": "math", "weight": 0.0}}, "verifier.weight: got 0.0"),
        ({"text": "x", "verifier": {"name": "math", "weight": 1.1}}, "verifier.weight: got 1.1"),
        ({"text": "x", "verifier": {"name": "math", "workers": 2}}, "verifier.workers: unknown key"),
    ],
)
def test_a_verifier_that_makes_no_sense_is_refused(instruction: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        config_of(instruction)


def test_a_combination_says_what_is_wrong_with_it():
    name = "posttrain.rewards.combine:by_system"
    with pytest.raises(PluginError, match="verifiers is 3; give a mapping"):
        check_reward(name, {"reward": "math", "verifiers": 3})
    with pytest.raises(PluginError, match="reward 'mth' is not known"):
        check_reward(name, {"reward": "mth", "verifiers": {}})
    with pytest.raises(PluginError, match="unexpected keyword argument 'bonus'"):
        check_reward(name, {"reward": "math", "verifiers": {"x": {"name": "math", "weight": 1, "args": {"bonus": 1}}}})


# --- what a reward needs of a row ---


@pytest.mark.parametrize(
    ("name", "args", "field"),
    [
        ("final_answer", {}, "'answer'"),
        ("exact_match", {}, "'answer'"),
        ("math", {}, "'answer'"),
        ("multiple_choice", {}, "'answer'"),
        ("puzzles", {}, "'answer' or 'numbers'"),
        ("code", {}, "'tests'"),
        ("instructions", {}, "'constraints'"),
        ("weighted_sum", {"rewards": {"math": 1.0, "overlong": {"weight": 1, "args": {"max_tokens": 9}}}}, "'answer'"),
        ("by_capability", {"rewards": {"coding": "code", "default": "math"}}, "'answer'"),
    ],
)
def test_a_row_without_what_a_built_in_reward_needs_is_named(name: str, args: dict, field: str):
    bare = Row("bare", "math", (Message("user", "?"),))
    assert list(missing_fields(RewardSpec(name, args), [bare])) == [
        f"row 'bare': no {field}, which reward {name!r} needs"
    ]


def test_rewards_that_need_nothing_take_any_row():
    bare = Row("bare", "math", (Message("user", "?"),))
    for name, args in (("valid_json", {}), ("overlong", {"max_tokens": 9})):
        assert list(missing_fields(RewardSpec(name, args), [bare])) == []


def test_a_reward_of_ones_own_declares_what_it_needs(plugin: Path):
    check_fields(RewardSpec(f"{plugin}:short"), [row_of(limit=3)])
    check_fields(RewardSpec(f"{plugin}:either"), [row_of(), row_of(answer=None, other=0)])
    check_fields(RewardSpec(f"{plugin}:later"), [row_of(answer=None)])
    rows = [row_of(f"r{index}") for index in range(7)]
    with pytest.raises(
        DataError, match=r"row 'r0': no 'limit', which reward .*short' needs\n(.*\n){4}and 2 more such rows"
    ):
        check_fields(RewardSpec(f"{plugin}:short"), rows)
    for wrong in ('{"short": list("ab")}', '{"short": "limit"}', '["limit"]'):
        plugin.write_text(f"REQUIRES = {wrong}\n\ndef short(rollout, row):\n    return 1.0\n")
        with pytest.raises(PluginError, match=r"plugin.py:1: REQUIRES must be written out"):
            check_fields(RewardSpec(f"{plugin}:short"), rows)


def test_a_capability_without_a_reward_is_told_before_the_run():
    spec = RewardSpec("by_capability", {"rewards": {"coding": "code"}})
    with pytest.raises(PluginError, match="no reward for capability 'math'; there are: coding"):
        check_fields(spec, [row_of()])


def test_a_verifier_needs_its_fields_only_of_rows_that_it_may_meet(plugin: Path):
    config = config_of({"text": BRIEF, "verifier": {"name": f"{plugin}:short"}})
    check_rewardable(config, [row_of(system=True), row_of(limit=3)])
    with pytest.raises(DataError, match="row 'bad': no 'limit'"):
        check_rewardable(config, [row_of("bad")])
    with pytest.raises(DataError, match="row 'bad': no 'answer', which reward 'final_answer' needs"):
        check_rewardable(config, [row_of("bad", answer=None, system=True)])


@pytest.mark.parametrize("kind", ["rl", "eval"])
def test_validation_looks_at_the_first_rows(kind: str, tiny_model: Path, tmp_path: Path):
    from posttrain.pipeline.kinds import load_schema

    path = tmp_path / "rows.jsonl"
    rows = [{"id": "good", "prompt": "2 + 2?", "answer": "4"}, {"id": "bad", "prompt": "3 + 3?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = {"rl": "prompts", "eval": "data"}[kind]
    data = {"model": {"path": str(tiny_model)}, key: {"path": str(path)}, "reward": {"name": "math"}}
    config = validate_config(load_schema(KINDS[kind]), data, "test")
    assert input_problems(config, KINDS[kind]) == [f"{key}: row 'bad': no 'answer', which reward 'math' needs"]


def test_the_sources_of_a_combined_reward_are_those_of_all(plugin: Path):
    args = {"rewards": {f"{plugin}:short": 1.0, "math": 0.5}}
    assert {path.name for path in reward_sources("weighted_sum", args)} == {"combine.py", "plugin.py", "mathematics.py"}


# --- other input that cannot work ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size: got 1: must be at least 2: an advantage compares the rewards of one prompt's"),
        (
            {"mixture": {"math": 0.0, "coding": 0.0}},
            "mixture: every share is 0, so there would be no prompt to train on",
        ),
        ({"mixture": {"math": -1.0}}, r"mixture\.math: got -1\.0"),
        ({"refilter": {"every": 10}}, "refilter is no key any more: .* set a shorter selection.half_life"),
        ({"curriculum": {"half_life": 9.0}}, "curriculum is no key any more: .* set selection.half_life"),
        ({"selection": {"draw": "in_turn", "predictor": "level"}}, "predictor 'level' would have no effect"),
        ({"selection": {"draw": "in_turn", "first_replies": 2}}, "first_replies .2. needs the beliefs"),
        ({"selection": {"first_replies": 8}}, "first_replies is 8; it must be at least min_group .2. and less than"),
        ({"selection": {"first_replies": 2}, "drop_zero_advantage": False}, "drop_zero_advantage: false keeps"),
        ({"selection": {"first_replies": 2}, "deterministic": True, "max_staleness": 0}, "does not go with selection"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_a_predictor_that_rows_lack_is_told_before_the_run(tiny_model: Path, tmp_path: Path):
    from posttrain.pipeline.inputs import input_problems
    from posttrain.pipeline.kinds import KINDS

    rows = [{"id": f"r{level}", "messages": [{"role": "user", "content": "?"}], "level": level} for level in (1, None)]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in rows))
    config = config_of(
        model={"path": str(tiny_model)},
        prompts={"path": str(tmp_path / "prompts.jsonl")},
        reward={"name": "final_answer"},
        selection={"predictor": "level"},
    )
    (problem,) = input_problems(config, KINDS["rl"])
    assert problem.startswith("selection.predictor: got 'level': row 'rNone' has no field 'level'; every row needs")


def test_a_share_of_0_leaves_a_capability_out():
    rows = [row_of("a"), replace(row_of("b"), capability="coding")]
    assert mixture_shares(rows, {"math": 2.0, "coding": 0.0}) == {"math": 1.0}


def test_the_source_of_an_inner_reward_decides_whether_a_stage_is_done(plugin: Path, tiny_model: Path, tmp_path: Path):
    from posttrain.pipeline.graph import Node, Pipeline
    from posttrain.pipeline.hashing import input_hash

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("{}\n")
    config = config_of(
        {"text": BRIEF, "verifier": {"name": f"{plugin}:short"}},
        model={"path": str(tiny_model)},
        prompts={"path": str(prompts)},
        reward={"name": "by_capability", "args": {"rewards": {"default": f"{plugin}:either"}}},
    )
    plain = config_of(**{**config.model_dump(), "systems": {}})

    def hashes() -> list[str]:
        nodes = [Node("rl", "rl", item, (), "rl", "rl.yaml", "") for item in (config, plain)]
        return [input_hash(node, Pipeline("test", "test", 0, False, {"rl": node}), {}) for node in nodes]

    seen = [hashes()]
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    seen.append(hashes())
    assert all(len({pair[index] for pair in seen}) == 2 for index in (0, 1))
