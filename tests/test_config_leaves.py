"""Every config field is used: each leaf of every stage's config, set to another value, changes what the stage builds.

The leaves are found in the schemas and their other values made from the types, so a new field is tested the day it is
added: if no builder of its stage tells two values of it apart, or no second value exists, its test fails. The tables
below hold what a type cannot say: paths that exist, and the settings under which a field matters at all.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from config_leaves import Leaf, NoValueError, find_leaves, other_values, set_at
from stage_builders import (
    BUILDERS,
    Builder,
    eval_results,
    judge_endpoint,
    outcome,
    rl_judge,
    rl_loss,
    rl_side,
    sft_packing,
    write_inputs,
)

from posttrain.config.base import Config
from posttrain.pipeline.config import PipelineConfig
from posttrain.pipeline.kinds import KINDS, load_schema


@dataclass(frozen=True)
class Stage:
    """One schema and how its leaves are moved. Key patterns are those of fnmatch; the first that fits counts.

    base: a small valid config. values: other values, where the type alone gives none that fits. given: settings under
    which leaves matter. together: what must change along with a leaf to stay valid, and the builder that shows the leaf
    apart from that.
    """

    schema: type[Config]
    builders: tuple[Builder, ...]
    base: Mapping[str, Any]
    values: Mapping[str, list[Any]] = field(default_factory=dict)
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    together: Mapping[str, tuple[Mapping[str, Any], Builder]] = field(default_factory=dict)


MODEL = {"path": "model_a", "dtype": "float32"}
ENGINE = {"max_model_len": 256}
REWARD = {"name": "final_answer"}
LENGTHS = {"max_length": 512, "batch_tokens": 512}
REFERENCE = {"loss.reference": {"weight": 0.1}, "resources.reference": {}}
JUDGE = {
    "judge": {"model": MODEL, "template": "Rate: {prompt} {response} {answer} {labels}", "engine": ENGINE},
    "resources.judge": {},
}
ENDPOINT = {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}
RL_ENDPOINT = {
    "judge": {"endpoint": ENDPOINT, "template": "Rate: {prompt} {response} {answer} {labels}"},
    "resources.judge": None,
}
FILTER_ENDPOINT = {"judge": {"endpoint": ENDPOINT}, "engine": None, "resources.judge": None}
HELDOUT = {"data": {"path": "prompts_a.jsonl"}}
STRICT = {"evaluation.correct_threshold": 0.9, "reward.correct_threshold": 0.9}  # the two must be equal
INSTRUCTIONS = [{"text": "Be brief."}, {"text": "Take care."}]
VERIFIED = [{"text": "Be brief.", "verifier": {"name": "instructions"}}]
TALK = {"environment": {"name": "worlds.py:talk"}}
ENVIRONMENT_VALUES = {
    "environment": [TALK["environment"]],
    "environment.name": ["worlds.py:game"],
    "environment.command": [["python", "worlds.py"]],
    "environment.args": [{"turns": 2}],
    "environment.tools": [[{"type": "function", "function": {"name": "look"}}]],
    "environment.by_capability": [{"coding": {"name": "worlds.py:talk"}}],
}
WORLDS = {"environment": {"by_capability": {"math": {"name": "worlds.py:talk"}}}}
ENVIRONMENT_GIVEN = {
    "environment.by_capability": WORLDS,
    "environment.command": {"environment": {"command": ["python"]}},
    "environment.*": TALK,
}
COURSE = {"held_out": {"rows": 2, "every": 1}}
EVALUATION = {"model": MODEL, "data": {"path": "prompts_a.jsonl"}, "reward": REWARD}


OTHER_TEMPLATE = {"path": "template.jinja"}
TEMPLATES: dict[str, list[Any]] = {
    "*chat_template": [OTHER_TEMPLATE],
    "*chat_template.path": ["template.jinja"],
    "*chat_template.builtin": ["chatml"],
    "*chat_template.arguments": [{"tone": "kind"}],
}


def templates_of(key: str) -> dict[str, Any]:
    """A template that reads an argument, for the leaf of the arguments at this key path."""
    return {f"{key}.chat_template.arguments": {f"{key}.chat_template": OTHER_TEMPLATE}}


def files(name: str) -> list[Any]:
    """One other file, and several: the two forms of a dataset's path."""
    return [f"{name}_b.jsonl", [f"{name}_a.jsonl", f"{name}_b.jsonl"]]


TABLE: dict[str, dict[str, Any]] = {
    "base": {
        "base": {
            "steps": 60,
            "processes": 1,
            "model": {"hidden": 32, "layers": 2, "heads": 2, "head_dim": 16, "ffn": 48, "expert_ffn": 40},
            "sets": {"sft": 5, "prompts": 5, "heldout": 5, "tune": 5},
        },
        "values": {"batch_tokens": [1024], "model.kv_heads": [2], "text.switch_at": [0.0], "puzzles": ["tools"]},
        "given": {"puzzles": {"text.plain_share": 0.0, "text.rate_share": 0.0}},
    },
    "filter": {
        "base": {
            "judge": MODEL,
            "data": {"path": "sft_a.jsonl"},
            "template": "Rate: {prompt} {response}",
            "engine": ENGINE,
        },
        "values": {
            **TEMPLATES,
            "judge.path": ["model_b"],
            "judge.endpoint.max_prompt_chars": [70],
            "data.path": files("sft"),
            "data.roles": [{"user": "assistant"}],
            "data.weights": [[1.0, 3.0]],
            "max_prompt_tokens": [100],
            "dedup.near": [0.7],
            "decontaminate": [{"path": "heldout_a.jsonl"}],
            "decontaminate.path": ["heldout_b.jsonl", ["heldout_a.jsonl", "heldout_b.jsonl"]],
            "decontaminate.columns": [{"prompt": "question"}],
            "decontaminate.ngram": [14],
            "decontaminate.overlap": [0.9],
            "images": [{}],
            "images.root": ["pictures"],
            "images.max_images": [1],
        },
        "given": {
            **templates_of("judge"),
            "images*": {"judge.path": "model_vision", "data.path": "sft_pictures.jsonl"},
            "data.special_*": {"data": {"path": "sft_special.jsonl"}},
            "data.weights": {"data.path": ["sft_a.jsonl", "sft_b.jsonl"]},
            "data.mix_seed": {"data": {"path": ["sft_a.jsonl", "sft_b.jsonl"], "weights": [1.0, 1.0]}},
            "data.on_bad_row": {"data": {"path": "sft_bad.jsonl"}},
            "data.format": {"data": {"path": "sft_shapes.jsonl"}},
            "dedup": {"data": {"path": "sft_twins.jsonl"}},
            "dedup.*": {"data": {"path": "sft_twins.jsonl"}, "dedup": {}},
            "decontaminate": {"data": {"path": "sft_twins.jsonl"}},
            "decontaminate.*": {
                "data": {"path": "sft_twins.jsonl"},
                "decontaminate": {"path": "heldout_a.jsonl"},
            },
            "long_rows": {"max_prompt_tokens": 100},
            "judge.endpoint.*": FILTER_ENDPOINT,
        },
    },
    "sft": {
        "base": {"model": MODEL, "data": {"path": "sft_a.jsonl"}, **LENGTHS},
        "values": {
            **TEMPLATES,
            "model.path": ["model_b"],
            "data.path": files("sft"),
            "data.roles": [{"user": "assistant"}],
            "data.weights": [[1.0, 3.0]],
            "max_length": [100],
            "held_out": [{"rows": 2}],
            "held_out.fraction": [0.5],
            "held_out.rows": [3],
            "held_out.path": ["sft_special.jsonl"],
            "held_out.every": [2],
            "held_out.patience": [1],
            "parallel.expert": [2],
            "lora.target_modules": [["q_proj"]],
            "lora.target_parameters": [["experts.down_proj"]],
            "images": [{}],
            "images.root": ["pictures"],
            "images.max_images": [1],
            "images.freeze": [["vision"]],
            "images.learning_rates": [{"projector": 1e-4}],
        },
        "given": {
            **templates_of("model"),
            "images*": {"model": {"path": "model_vision"}, "data": {"path": "sft_pictures.jsonl"}},
            "data.special_*": {"data": {"path": "sft_special.jsonl"}},
            "data.weights": {"data.path": ["sft_a.jsonl", "sft_b.jsonl"]},
            "data.mix_seed": {"data": {"path": ["sft_a.jsonl", "sft_b.jsonl"], "weights": [1.0, 1.0]}},
            "data.on_bad_row": {"data": {"path": "sft_bad.jsonl"}},
            "data.format": {"data": {"path": "sft_shapes.jsonl"}},
            "model.adapters": {"model": {"path": "adapter_a", "dtype": "float32"}},
            "batch_size": {"packing": False, "batch_tokens": None, "batch_size": 4},
            "overlong": {"max_length": 100},
            "held_out.fraction": {"held_out": {"fraction": 0.25}},
            "held_out.path": {"held_out": {"path": "sft_b.jsonl"}},
            "held_out.*": COURSE,
            "parallel.*": {"parallel": {"processes": 2}},
        },
        "together": {"packing": ({"batch_tokens": None, "batch_size": 1, "packing": False}, sft_packing)},
    },
    "rl": {
        "base": {
            "model": MODEL,
            "prompts": {"path": "prompts_a.jsonl"},
            "reward": REWARD,
            "sampling": {"max_tokens": 16},
            "engine": ENGINE,
        },
        "values": {
            **TEMPLATES,
            "images": [{}],
            "images.root": ["pictures"],
            "images.max_images": [1],
            "images.freeze": [["vision"]],
            "images.learning_rates": [{"projector": 1e-4}],
            "model.path": ["model_b"],
            "lora.target_modules": [["q_proj"]],
            "lora.target_parameters": [["experts.down_proj"]],
            "prompts.path": files("prompts"),
            "prompts.roles": [{"user": "assistant"}],
            "prompts.weights": [[1.0, 3.0]],
            "mixture": [{"math": 3.0, "coding": 1.0}],
            "modalities": [{"text": 1.0}],
            "micro_batch_tokens": [400],
            "parallel.expert": [2],
            "profile.band": [[0.4, 0.7], [0.1, 0.4]],
            "selection.half_life": [2.0],
            "selection.predictor": ["level"],
            "selection.first_replies": [None],
            "loss.reference.path": ["model_b"],
            "judge.model.path": ["model_b"],
            "judge.max_prompt_tokens": [100],
            "judge.endpoint.max_prompt_chars": [80],
            "evaluation": [HELDOUT],
            "evaluation.data.path": files("prompts"),
            "evaluation.data.roles": [{"user": "assistant"}],
            "evaluation.data.weights": [[1.0, 3.0]],
            "evaluation.prompts": [1],
            **ENVIRONMENT_VALUES,
        },
        "given": {
            **templates_of("model"),
            "images*": {"model.path": "model_vision", "prompts.path": "prompts_pictures.jsonl"},
            **ENVIRONMENT_GIVEN,
            "model.adapters": {"model": {"path": "adapter_a", "dtype": "float32"}},
            "prompts.special_*": {"prompts": {"path": "prompts_special.jsonl"}},
            "prompts.weights": {"prompts.path": ["prompts_a.jsonl", "prompts_b.jsonl"]},
            "prompts.mix_seed": {"prompts": {"path": ["prompts_a.jsonl", "prompts_b.jsonl"], "weights": [1.0, 1.0]}},
            "prompts.on_bad_row": {"prompts": {"path": "prompts_bad.jsonl"}},
            "prompts.format": {"prompts": {"path": "prompts_shapes.jsonl"}},
            "evaluation.data.weights": {"evaluation": {"data": {"path": ["prompts_a.jsonl", "prompts_b.jsonl"]}}},
            "evaluation.data.mix_seed": {
                "evaluation": {"data": {"path": ["prompts_a.jsonl", "prompts_b.jsonl"], "weights": [1.0, 1.0]}}
            },
            "evaluation.data.on_bad_row": {"evaluation": {"data": {"path": "prompts_bad.jsonl"}}},
            "evaluation.data.format": {"evaluation": {"data": {"path": "prompts_shapes.jsonl"}}},
            "evaluation.data.special_*": {"evaluation": {"data": {"path": "prompts_special.jsonl"}}},
            "modality_curriculum*": {"modalities": {"text": 1.0, "image": 1.0}},
            "optimizer.warmup_steps": {"optimizer.schedule": "linear"},
            "systems.instructions.0.verifier.*": {"systems.instructions": VERIFIED},
            "systems.instructions.*": {"systems.instructions": INSTRUCTIONS},
            "weights.backend": {"resources.rollout.gpus": 0.5, "resources.trainer.gpus": 0.5},
            "weights.order": {"resources.rollout.workers": 2},
            "resources.rollout.workers.*": {"resources.rollout.workers": {"min": 2, "max": 4}},
            "deterministic": {"max_staleness": 0},
            "over_provision": {"max_staleness": 0, "over_provision": 0.0},
            "loss.clip_*": {"loss.name": "grpo"},
            "loss.dual_clip": {"loss.name": "grpo"},
            "loss.cispo_*": {"loss.name": "cispo"},
            "loss.sequence_*": {"loss.name": "gspo"},
            "loss.tis_*": {"loss.name": "tis"},
            "loss.icepop_*": {"loss.name": "icepop"},
            "loss.decoupled_*": {"loss.name": "decoupled"},
            "evaluation.samples": {"evaluation": {**HELDOUT, "temperature": 1.0}},
            "evaluation.top_p": {"evaluation": {**HELDOUT, "temperature": 1.0}},
            "evaluation.*": {"evaluation": HELDOUT},
            "judge.long_rows": {**JUDGE, "judge.max_prompt_tokens": 100},
            "judge.endpoint.*": RL_ENDPOINT,
            "judge.model.chat_template.arguments": {**JUDGE, "judge.model.chat_template": OTHER_TEMPLATE},
            "judge.model.chat_template.*": {**JUDGE, "judge.model.chat_template": {}},
            "judge.model": RL_ENDPOINT,
            "judge.*": JUDGE,
            "resources.judge.*": JUDGE,
            "loss.reference.*": REFERENCE,
            "resources.reference.*": REFERENCE,
            "parallel.*": {"parallel": {"processes": 2}},
        },
        "together": {
            "judge": (JUDGE, rl_judge),
            "judge.model": (
                {"judge.model": MODEL, "judge.endpoint": None, "judge.engine": ENGINE, "resources.judge": {}},
                rl_judge,
            ),
            "judge.endpoint": (
                {"judge.endpoint": ENDPOINT, "judge.model": None, "judge.engine": None, "resources.judge": None},
                judge_endpoint,
            ),
            "resources.judge": (JUDGE, BUILDERS["rl"][0]),
            "evaluation.correct_threshold": (STRICT, rl_side),
            "loss.reference": (REFERENCE, rl_loss),
            "resources.reference": (REFERENCE, BUILDERS["rl"][0]),
        },
    },
    "dpo": {
        "base": {"model": MODEL, "pairs": {"path": "pairs_a.jsonl"}, "max_length": 512},
        "values": {
            **TEMPLATES,
            "model.path": ["model_b"],
            "images": [{}],
            "images.root": ["pictures"],
            "images.max_images": [1],
            "images.freeze": [["vision"]],
            "images.learning_rates": [{"projector": 1e-4}],
            "pairs.path": files("pairs"),
            "pairs.roles": [{"user": "assistant"}],
            "pairs.weights": [[1.0, 3.0]],
            "rollouts": ["rollouts_b"],
            "parallel.expert": [2],
            "lora.target_modules": [["q_proj"]],
            "lora.target_parameters": [["experts.down_proj"]],
            "max_length": [100],
            "held_out": [{"rows": 2}],
            "held_out.fraction": [0.5],
            "held_out.rows": [3],
            "held_out.path": ["pairs_special.jsonl"],
            "held_out.every": [2],
            "held_out.patience": [1],
            "nll_weight": [0.2, 0.0],
        },
        "given": {
            **templates_of("model"),
            "images*": {"model.path": "model_vision", "pairs.path": "pairs_pictures.jsonl"},
            "pairs.special_*": {"pairs": {"path": "pairs_special.jsonl"}},
            "pairs.weights": {"pairs.path": ["pairs_a.jsonl", "pairs_b.jsonl"]},
            "pairs.mix_seed": {"pairs": {"path": ["pairs_a.jsonl", "pairs_b.jsonl"], "weights": [1.0, 1.0]}},
            "pairs.on_bad_row": {"pairs": {"path": "pairs_bad.jsonl"}},
            "pairs.format": {"pairs": {"path": "pairs_shapes.jsonl"}},
            "model.adapters": {"model": {"path": "adapter_a", "dtype": "float32"}},
            "nll_weight": {"nll_weight": 0.1},
            "rollouts": {"pairs": None, "rollouts": "rollouts_a"},
            "mining.*": {"pairs": None, "rollouts": "rollouts_a"},
            "overlong": {"max_length": 100},
            "held_out.fraction": {"held_out": {"fraction": 0.25}},
            "held_out.path": {"held_out": {"path": "pairs_b.jsonl"}},
            "held_out.*": COURSE,
            "parallel.*": {"parallel": {"processes": 2}},
        },
    },
    "eval": {
        "base": {**EVALUATION, "samples": 4, "k": 2, "sampling": {"max_tokens": 16}, "engine": ENGINE},
        "values": {
            **TEMPLATES,
            "images": [{}],
            "images.root": ["pictures"],
            "images.max_images": [1],
            "model.path": ["model_b"],
            "data.path": files("prompts"),
            "data.roles": [{"user": "assistant"}],
            "data.weights": [[1.0, 3.0]],
            "observe": [{"answered": "Answer: 0"}],
            "exclude": [[{"path": "train_a.jsonl"}, {"path": "train_b.jsonl"}]],
            "exclude.0.path": ["train_b.jsonl", ["train_a.jsonl", "train_b.jsonl"]],
            "exclude.0.limit": [1],
            "key_field": ["other"],
            **ENVIRONMENT_VALUES,
        },
        "given": {
            **templates_of("model"),
            "images*": {"model.path": "model_vision", "data.path": "prompts_pictures.jsonl"},
            **ENVIRONMENT_GIVEN,
            "data.special_*": {"data": {"path": "prompts_special.jsonl"}},
            "data.weights": {"data.path": ["prompts_a.jsonl", "prompts_b.jsonl"]},
            "data.mix_seed": {"data": {"path": ["prompts_a.jsonl", "prompts_b.jsonl"], "weights": [1.0, 1.0]}},
            "data.on_bad_row": {"data": {"path": "prompts_bad.jsonl"}},
            "data.format": {"data": {"path": "prompts_shapes.jsonl"}},
            "exclude.0.limit": {"exclude": [{"path": "train_b.jsonl"}], "key_field": "key"},
            "exclude*": {"exclude": [{"path": "train_a.jsonl"}], "key_field": "key"},
            "key_field": {"exclude": [{"path": "train_a.jsonl"}], "key_field": "key"},
        },
        "together": {"correct_threshold": ({"correct_threshold": 0.9}, eval_results)},
    },
    "pipeline": {
        "base": {"name": "p", "stages": [{"name": "first", "kind": "base", "config": {"steps": 5}}]},
        "values": {
            "stages.0.config": [{"steps": 6}, "first.yaml"],
            "evaluate": [{"config": EVALUATION, "stages": ["first"]}],
            "evaluate.config": [{**EVALUATION, "samples": 9}],
            "evaluate.stages": [[]],
        },
        "given": {"evaluate.*": {"evaluate": {"config": EVALUATION, "stages": ["first"]}}},
    },
}


def make_stage(name: str) -> Stage:
    schema = PipelineConfig if name == "pipeline" else load_schema(KINDS[name])
    return Stage(schema, BUILDERS[name], **TABLE[name])


STAGES = {name: make_stage(name) for name in TABLE}


def leaves_of(stage: Stage) -> list[Leaf]:
    return list(find_leaves(stage.schema, stage.schema.model_validate(stage.base).model_dump()))


def _entry(table: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((entry for pattern, entry in table.items() if fnmatchcase(key, pattern)), default)


def _with(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(data)
    for key, value in changes.items():
        changed = set_at(changed, key, value)
    return changed


def pairs_of(stage: Stage, leaf: Leaf) -> list[tuple[Any, Config, Config]]:
    """(the other value, the config that the leaf matters in, the same with the other value)."""
    read = stage.schema.model_validate
    before = _with(_with(stage.base, leaf.given), _entry(stage.given, leaf.key, {}))
    if leaf.key in stage.together:
        changes, _ = stage.together[leaf.key]
        return [(changes[leaf.key], read(before), read(_with(before, changes)))]
    pairs = []
    for value in _entry(stage.values, leaf.key, None) or other_values(leaf, stage.schema, before):
        after = read(set_at(before, leaf.key, value))
        # A section given in part must not lose the defaults that it has when it is not given at all.
        assert after == read(set_at(read(before).model_dump(), leaf.key, value)), f"{leaf.key} changes other fields"
        pairs.append((value, read(before), after))
    return pairs


_built: dict[tuple[Builder, str], Any] = {}


def build(builder: Builder, config: Config) -> Any:
    """What a builder makes of a config; made once for the configs that many leaves are compared with."""
    key = (builder, config.model_dump_json())
    if key not in _built:
        _built[key] = outcome(builder, config)
    return _built[key]


def unread_values(stage: Stage, leaf: Leaf) -> list[Any]:
    """The other values of a leaf that no builder tells from the one it had."""
    builders = (stage.together[leaf.key][1],) if leaf.key in stage.together else stage.builders
    return [
        value
        for value, before, after in pairs_of(stage, leaf)
        if all(build(builder, before) == build(builder, after) for builder in builders)
    ]


@pytest.fixture(scope="module", autouse=True)
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[None]:
    """The configs name their inputs relative to a folder that holds them."""
    folder, start = tmp_path_factory.mktemp("leaves"), Path.cwd()
    write_inputs(folder, tiny_model)
    os.chdir(folder)
    yield
    os.chdir(start)


def test_every_kind_of_stage_is_here():
    shipped = {name for name, kind in KINDS.items() if kind.schema.startswith("posttrain.")}
    assert set(STAGES) == shipped | {"pipeline"}


@pytest.mark.parametrize(
    ("name", "leaf"),
    [pytest.param(name, leaf, id=f"{name}-{leaf.key}") for name, stage in STAGES.items() for leaf in leaves_of(stage)],
)
def test_a_leaf_changes_what_is_built(name: str, leaf: Leaf):
    assert unread_values(STAGES[name], leaf) == [], f"nothing that {name} builds depends on {leaf.key}"


@pytest.mark.parametrize("name", STAGES)
def test_equal_configs_build_the_same(name: str):
    """Else a leaf could seem to be read when a builder merely differs from call to call."""
    stage = STAGES[name]
    for builder in stage.builders:
        first, second = (outcome(builder, stage.schema.model_validate(stage.base)) for _ in range(2))
        assert first == second, builder.__name__
        assert not (isinstance(first, list) and first[:1] == ["refused"]), f"{builder.__name__}: {first}"


def _extended(name: str, annotation: Any, default: Any) -> tuple[Stage, Leaf]:
    stage = STAGES[name]
    body = {"__annotations__": {"ornament": annotation}, "ornament": default, "__module__": __name__}
    stage = replace(stage, schema=type("Ornate", (stage.schema,), body))
    return stage, next(leaf for leaf in leaves_of(stage) if leaf.key == "ornament")


@pytest.mark.parametrize("name", STAGES)
def test_a_field_that_nothing_reads_is_found(name: str):
    stage, leaf = _extended(name, int | None, None)
    assert unread_values(stage, leaf) == [1]


@pytest.mark.parametrize("annotation", [tuple[int, ...], bytes])
def test_a_field_without_another_value_is_found(annotation: Any):
    stage, leaf = _extended("filter", annotation, None)
    with pytest.raises(NoValueError, match="ornament"):
        unread_values(stage, leaf)
