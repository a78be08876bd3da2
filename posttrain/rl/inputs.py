"""What the RL stage reads before anything starts: its rows, and the prompts that the tokenizer makes of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.context import StageContext
from posttrain.data.chat import Messages, check_special_tokens
from posttrain.data.images.render import Pictures, for_template
from posttrain.data.images.section import pictures_for
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.rows import store_rows
from posttrain.data.shown import Tools
from posttrain.data.stored import Derived, Stored, StoreWriter
from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.tools import row_renderer, row_tools
from posttrain.records import DrawnPrompt, Row
from posttrain.rl.config import RlConfig
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.verifiers import check_rewardable
from posttrain.rl.loop.evaluation import heldout_prompts
from posttrain.rl.prompts.beliefs import strata_of
from posttrain.rl.prompts.kept import KeptPrompts
from posttrain.rl.prompts.lengths import check_room, plain_prompts


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a stage trains on.

    render: renders the rows as prompts. prompts: one for each of `rows`. evaluated: those of `evaluation`. store: the
    pictures of the rows; None for a stage that takes none.
    """

    rows: Stored[Row]
    tokenizer: Tokenizer
    render: KeptPrompts
    prompts: Derived[Row, DrawnPrompt]
    evaluated: Derived[Row, DrawnPrompt]
    store: ImageStore | None


def read_rows(
    config: RlConfig, context: StageContext | None = None, *, images: ImageReader | None = None
) -> Stored[Row]:
    """The rows of the prompts. Raises DataError for one that the reward or the selection cannot take."""
    rows = store_rows(config.prompts, kind="prompt", stage="rl", context=context, images=images)
    check_rewardable(config, rows)
    if config.selection.predictor is not None:
        strata_of(rows, config.selection.predictor)  # a row without this field is found before anything starts
    return rows


def read_inputs(
    config: RlConfig, rows: Stored[Row], heldout: Sequence[Row], *, images: ImageReader | None = None
) -> Inputs:
    """Make the prompts of the rows. images: has taken their pictures; None for a stage that takes none."""
    from posttrain.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    _check_special_tokens(tokenizer, config, rows, heldout=heldout)
    store = images and images.store
    pictures = pictures_for(store, config.model.path, tokenizer)
    kept = keep_prompts(rows, tokenizer, config, pictures=pictures)
    render = row_renderer(tokenizer, config.environment, pictures)
    evaluated = heldout_prompts(config, heldout, render, store=store)
    return Inputs(rows, tokenizer, kept, plain_prompts(rows, kept, store), evaluated, store)


def draw_plain(
    rows: Sequence[Row], tokenizer: Tokenizer, config: GradingConfig, *, pictures: Pictures | None = None
) -> Derived[Row, DrawnPrompt]:
    """Each row as a prompt without a system instruction. Raises DataError if one leaves no room for a reply."""
    kept = keep_prompts(rows, tokenizer, config, pictures=pictures)
    return plain_prompts(rows, kept, pictures and pictures.store)


def keep_prompts(
    rows: Sequence[Row], tokenizer: Tokenizer, config: GradingConfig, *, pictures: Pictures | None = None
) -> KeptPrompts:
    """Render each row, and keep its token ids. Raises DataError if one leaves no room for a reply."""
    render, store = row_renderer(tokenizer, config.environment, pictures), pictures and pictures.store
    with StoreWriter[tuple[int, ...]](tuple[int, ...]) as ids:

        def keep() -> Iterator[DrawnPrompt]:
            for prompt in plain_prompts(rows, render, store):
                ids.append(prompt.prompt.token_ids)
                yield prompt

        check_room(
            keep(),
            render,
            config.systems.instructions,
            max_tokens=config.sampling.max_tokens,
            max_model_len=config.engine.length,
        )
        return KeptPrompts(rows, ids.close(), render)


def _check_special_tokens(
    tokenizer: Tokenizer, config: RlConfig, rows: Sequence[Row], *, heldout: Sequence[Row]
) -> None:
    evaluated = config.evaluation.data if config.evaluation is not None else config.prompts
    for data, those in ((config.prompts, rows), (evaluated, heldout)):
        check_special_tokens(tokenizer, data, _texts(config, those))


def _texts(config: RlConfig, rows: Sequence[Row]) -> Iterator[tuple[str, Messages, Tools]]:
    return ((f"row {row.id!r}", for_template(row.messages), row_tools(config.environment, row) or None) for row in rows)
