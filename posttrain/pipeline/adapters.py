"""Merges adapters into whole models: before a stage runs, each model path that names adapters is replaced.

So engines work only with whole models. Adapters that a stage goes on training are left to it. The merged model lies in
the stage's folder. It is deleted when the stage is finished, unless the stage wrote new adapters, because these need it
as their base.
"""

import shutil
from typing import Any

from posttrain.config.base import validate_config
from posttrain.config.models import ServedModelConfig
from posttrain.context import StageContext
from posttrain.model.adapter import MERGED, is_adapter
from posttrain.model.adapter_start import continues
from posttrain.pipeline.inputs import other_paths, walk
from posttrain.pipeline.kinds import StageKind


def with_whole_models(config: Any, kind: StageKind, context: StageContext) -> Any:
    """The config of a stage, in which every path of adapters is replaced by the folder of the merged model.

    The path of adapters that the stage goes on training stays.

    A folder that was merged before the stage was interrupted is used again. Raises `CheckpointError` for adapters that
    do not fit their base.
    """
    sections = {key: section for key, section in walk(config) if isinstance(section, ServedModelConfig)}
    paths = {f"{key}.path": (section.path, section.dtype) for key, section in sections.items()}
    dtype = next((section.dtype for section in sections.values()), "bfloat16")
    paths |= {key: (path, dtype) for key, path in other_paths(config, kind)}
    left = {f"{key}.path" for key, section in sections.items() if continues(section)}
    adapters = {key: item for key, item in paths.items() if key not in left and is_adapter(item[0])}
    if not adapters:
        return config
    from posttrain.parallel.adapters import merge_adapter

    data = config.model_dump()
    for key, (path, form) in adapters.items():
        target = context.dir / MERGED / key.removesuffix(".path")
        if not target.is_dir():
            context.phase(f"merging adapters into their base: {path}")
            merge_adapter(path, form, target=target)
        *way, last = key.split(".")
        section = data
        for part in way:
            section = section[int(part)] if isinstance(section, list) else section[part]
        section[last] = str(target)
    return validate_config(type(config), data, context.name)


def forget_whole_models(config: Any, context: StageContext) -> None:
    """Delete the merged models of a finished stage, except the base of new adapters that the stage wrote."""
    lora, model = getattr(config, "lora", None), getattr(config, "model", None)
    if lora is None or lora.save == "merged" or (model is not None and continues(model)):
        shutil.rmtree(context.dir / MERGED, ignore_errors=True)
