"""Finds the model that each evaluation measured, and the model from which that model was trained.

A stage starts from the model that its `model.path` names. Two evaluations are a before and an after only if the model
of the later one was trained from the model of the earlier one, and if both used the same problems. The order of the
stages is no evidence, because two of them may be branches. Evaluations that are stages of their own follow the same
rule as the evaluations that `evaluate` adds to a stage.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.report.read import Run, Stage, mapping

# Keys of an evaluation's config that decide which problems are measured, and what counts as right.
PROBLEMS = ("data", "reward.name", "reward.args", "reward.correct_threshold", "sampling.max_tokens")


def measured(run: Run, name: str) -> str:
    """The model that the evaluation of this name measured: the name of its stage, or the path of another model."""
    stage = _stage(run, name)
    return stage.model if stage is not None and stage.kind == "eval" else name


def before(run: Run, name: str) -> str | None:
    """The evaluation, on the same problems, of the model from which the measured model was trained; else None."""
    start = _start(run, measured(run, name))
    return _evaluation(run, start, like=name) if start else None


def ancestor(run: Run, name: str) -> str | None:
    """The evaluation, on the same problems, of the nearest ancestor of the measured model that has one; else None.

    The ancestors of a model are the model from which it was trained, the model before that, and so on.
    """
    found = (_evaluation(run, model, like=name) for model in _line(run, measured(run, name)))
    return next((evaluation for evaluation in found if evaluation is not None), None)


def chain(run: Run, name: str) -> list[str]:
    """A list of evaluations that ends with this one. Each measured a model trained from the model before it."""
    found = [name]
    while (earlier := before(run, found[0])) is not None:
        found.insert(0, earlier)
    return found


def _line(run: Run, model: str) -> Iterator[str]:
    """The ancestors of a model, the nearest first."""
    seen = {model}
    while (model := _start(run, model)) and model not in seen:
        seen.add(model)
        yield model


def _start(run: Run, model: str) -> str:
    """The model from which a stage of the run started; "" for a model that no stage of the run made."""
    stage = _stage(run, model)
    return stage.model if stage is not None and stage.kind != "eval" else ""


def _stage(run: Run, name: str) -> Stage | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _evaluation(run: Run, model: str, *, like: str) -> str | None:
    """The evaluation of a model on the same problems as the evaluation `like`. One by `evaluate` is preferred."""
    names = sorted((n for n in run.evals if measured(run, n) == model), key=lambda n: n != model)
    return next((name for name in names if name != like and _problems(run, name) == _problems(run, like)), None)


def _problems(run: Run, name: str) -> Any:
    """The settings that decide the problems and how they were measured. All evaluations by `evaluate` share them."""
    own = _stage(run, name)
    by_pipeline = next((stage for stage in run.evaluations if stage.of == name), None)
    stage = own if own is not None and own.kind == "eval" else by_pipeline
    if stage is None or not stage.config:
        return "evaluate" if stage is None or stage.of else name
    return [_at(stage.config, key) for key in PROBLEMS]


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = mapping(value).get(part)
    return value
