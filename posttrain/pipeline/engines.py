"""The engines that the config of a stage asks for, and what an engine on a CPU cannot compute of its model.

Left out: models that do not exist yet, because another stage makes them. A stage looks at them when it starts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.files import read_object
from posttrain.judging.config import JudgeQuestion
from posttrain.model.adapter import base_folder
from posttrain.pipeline.inputs import walk
from posttrain.pipeline.references import has_reference
from posttrain.sampling.cpu_attention import attention_faults


@dataclass(frozen=True, slots=True)
class AskedEngine:
    """An engine that a config asks for.

    key: key path of its section. path: of its model as it is given. on_cpu: whether it has no GPU.
    """

    key: str
    engine: EngineConfig
    path: str
    on_cpu: bool


def engines_of(config: BaseModel) -> Iterator[AskedEngine]:
    """The engines whose model has a path, in the order of their keys."""
    for key, section in walk(config):
        engine = getattr(section, "engine", None)
        if not isinstance(engine, EngineConfig):
            continue
        is_judge = isinstance(section, JudgeQuestion)
        model = section.source if isinstance(section, JudgeQuestion) else getattr(section, "model", None)
        if isinstance(model, ServedModelConfig) and not has_reference(model.path):
            resources = getattr(getattr(config, "resources", None), "judge" if is_judge else "rollout", None)
            on_cpu = getattr(resources, "gpus", None) == 0
            yield AskedEngine(f"{key}.engine" if key else "engine", engine, model.path, on_cpu)


def attention_problems(config: BaseModel) -> list[str]:
    """One line, beginning with the key path, for each thing that an engine on a CPU cannot compute."""
    return [
        f"{asked.key}: got the model in {asked.path!r} for an engine on a CPU: {fault}"
        for asked in engines_of(config)
        if asked.on_cpu
        for fault in attention_faults(_text_config(asked.path), asked.engine)
    ]


def _text_config(path: str) -> dict:
    whole = read_object(base_folder(path) / "config.json") or {}
    text = whole.get("text_config")
    return text if isinstance(text, dict) else whole
