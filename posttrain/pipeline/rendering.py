"""Checks that the chat templates of a pipeline's models can render its rows, on the first rows of each dataset.

No weights are loaded, but tokenizers are. That takes seconds, and longer if the tokenizer's class imports torch
(model/tokenizer.py). So `validate` and `--dry-run` do this after all other checks. A run does it for the stages that
wait for others, which would otherwise find the fault only after hours. Each stage renders all its rows when it starts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from posttrain.config.data import DataConfig
from posttrain.config.images import ImagesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.data.images.render import Pictures
from posttrain.data.images.section import passing_reader, pictures_for
from posttrain.data.images.take import ImageReader
from posttrain.errors import ConfigError, UserError
from posttrain.judging.config import JudgeQuestion
from posttrain.model.adapter import base_folder
from posttrain.pipeline.graph import Node, Pipeline
from posttrain.pipeline.inputs import CHECKED_ROWS, data_kind, find_inputs, images_of, paths_of, walk
from posttrain.pipeline.references import has_reference
from posttrain.records import Message


def check_rendering(pipeline: Pipeline, nodes: Sequence[Node] | None = None) -> None:
    """Raise ConfigError with every problem of these nodes, or of all.

    Models and data that an earlier stage makes do not exist yet and are left out.
    """
    chosen = list(pipeline.nodes.values()) if nodes is None else nodes
    problems = [f"{node.prefix}{problem}" for node in chosen for problem in rendering_problems(node)]
    if problems:
        raise ConfigError(pipeline.source, problems)


def rendering_problems(node: Node) -> list[str]:
    """One line for each model and for each dataset of a node that cannot be rendered, which begins with the key."""
    config: Any = node.config
    problems = []
    for key, section in walk(config):
        if isinstance(section, JudgeQuestion) and _is_here(section.source):
            images = None if key else images_of(config)  # the judge of the filter is shown them, RL's is not
            problems += _problem(f"{key}.model" if key else "judge", partial(_ask_judge, section, images))
    model = getattr(config, "model", None)
    if not _is_here(model):
        return problems
    assert isinstance(model, ServedModelConfig)
    loaded: list[Any] = []
    problems += _problem("model", lambda: loaded.append(_tokenizer(model)))
    if not loaded:
        return problems
    with passing_reader(images_of(config)) as reader:
        shown: list[Pictures | None] = []
        store, folder = reader and reader.store, base_folder(model.path)
        problems += _problem("images", lambda: shown.append(pictures_for(store, folder, loaded[0])))
        if not shown:
            return problems
        (pictures,) = shown
        for found in find_inputs(config):
            data = found.value
            if isinstance(data, DataConfig) and not any(map(has_reference, paths_of(data))):
                kind = data_kind(found.key, node.stage_kind)
                with suppress(UserError):  # problems of the rows themselves are reported by inputs.py and by the stage
                    rows = list(_renderings(data, kind, node, tokenizer=loaded[0], reader=reader, pictures=pictures))
                    problems += _first_of(rows, found.key)
    return problems


def _is_here(model: Any) -> bool:
    return isinstance(model, ServedModelConfig) and not has_reference(model.path)


def _tokenizer(model: ServedModelConfig) -> Any:
    from posttrain.data.templates import chat_template
    from posttrain.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model.path, model.chat_template)
    chat_template(tokenizer)
    return tokenizer


def _ask_judge(question: JudgeQuestion, images: ImagesConfig | None) -> None:
    from posttrain.judging.prompts import judge_prompts

    with passing_reader(images) as reader:
        judge_prompts(question, reader and reader.store)


def _problem(key: str, attempt: Callable[[], Any]) -> list[str]:
    try:
        attempt()
    except UserError as error:
        return [f"{key}: {line}" for line in str(error).splitlines()]
    return []


def _first_of(rows: list[tuple[str, Callable[[], Any]]], key: str) -> list[str]:
    """A line about the first row that cannot be rendered, with the number of such rows.

    A wrong template fails on most rows, so a line for each row would say the same.
    """
    failed = [line for name, attempt in rows for line in _problem(name, attempt)[:1]]
    more = f" ({len(failed)} of the first {len(rows)} rows)" if len(failed) > 1 else ""
    return [f"{key}: {failed[0]}{more}"] if failed else []


def _renderings(
    data: DataConfig, kind: str, node: Node, *, tokenizer: Any, reader: ImageReader | None, pictures: Pictures | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name of the row, a function that renders it as the stage will) for the first rows of a dataset.

    reader, pictures: of a stage that takes pictures, else None.
    """
    from posttrain.data.images.render import for_template, row_samples
    from posttrain.data.pairs import load_pairs
    from posttrain.data.rows import load_rows
    from posttrain.data.samples import render_reply
    from posttrain.data.turns import tools_of
    from posttrain.episodes.tools import row_renderer

    if kind == "pairs":
        for pair in load_pairs(data, limit=CHECKED_ROWS, stage=node.kind, images=reader):
            prompt = pair.prompt if pictures is None else for_template(pair.prompt)
            for reply in pair.replies:
                yield (
                    f"pair {pair.id!r}",
                    partial(render_reply, tokenizer, prompt, reply, tools=tools_of(pair.fields)),
                )
    elif kind == "supervised":
        for row in load_rows(data, kind="supervised", limit=CHECKED_ROWS, stage=node.kind, images=reader):
            yield f"row {row.id!r}", partial(row_samples, tokenizer, row, pictures)
    elif kind == "prompt":
        rows = load_rows(data, kind="prompt", limit=CHECKED_ROWS, stage=node.kind, images=reader)
        render = row_renderer(tokenizer, getattr(node.config, "environment", None), pictures)
        for row in rows:
            yield f"row {row.id!r}", partial(render, row, row.messages)
        systems: Any = getattr(node.config, "systems", None)
        bare = next((row for row in rows if row.messages[0].role != "system"), None)
        for item in systems.instructions if systems is not None and bare is not None else ():
            if item.text and bare is not None:
                turns = (Message("system", item.text), *bare.messages)
                yield f"row {bare.id!r} with a system instruction", partial(render, bare, turns)
