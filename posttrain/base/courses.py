"""What a base model is trained for: its puzzles, its tokenizer, and its text, by the name that the config gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.base.config import TextConfig
from posttrain.base.corpus import Corpus, Document
from posttrain.base.pictures.puzzles import PICTURES
from posttrain.base.pictures.text import PictureCorpus
from posttrain.base.pictures.tokenizer import build_picture_tokenizer
from posttrain.base.tasks import ANSWERS, Puzzles
from posttrain.base.tokenizer import build_tokenizer, save_tokenizer
from posttrain.base.tools.puzzles import TOOLS
from posttrain.base.tools.text import ToolCorpus
from posttrain.base.tools.tokenizer import build_tool_tokenizer
from posttrain.data.tokenizer import Tokenizer


class TrainingText(Protocol):
    """An endless stream of documents."""

    def batches(self, batch_tokens: int, late: bool) -> Iterator[list[Document]]:
        """See `Corpus.batches`."""
        ...


class MakeText(Protocol):
    """Makes the training text of a course."""

    def __call__(
        self, tokenizer: Tokenizer, text: TextConfig, taken: frozenset[str], *, seed: str
    ) -> TrainingText:  # for the arguments see `Corpus`
        ...


# A model is built in the processes of the training alone, because torch takes long to import.
def _text_model(*arguments: Any, seed: int) -> Any:
    from posttrain.base.model import build_model

    return build_model(*arguments, seed=seed)


def _vision_model(*arguments: Any, seed: int) -> Any:
    from posttrain.base.pictures.model import build_vision_model

    return build_vision_model(*arguments, seed=seed)


@dataclass(frozen=True, slots=True)
class Course:
    """A course. with_systems: whether half of its conversations begin with a system instruction. save: writes all of
    the model's folder but the model.
    """

    puzzles: Puzzles
    build_tokenizer: Callable[[], Any]
    text: MakeText
    with_systems: bool
    build_model: Callable[..., Any] = _text_model
    save: Callable[[Any, Path], None] = save_tokenizer


def _save_with_processor(tokenizer: Any, folder: Path) -> None:
    from posttrain.base.pictures.model import save_processor

    save_processor(tokenizer, folder)
    save_tokenizer(tokenizer, folder)


COURSES: dict[str, Course] = {
    "answers": Course(ANSWERS, build_tokenizer, Corpus, with_systems=True),
    "tools": Course(TOOLS, build_tool_tokenizer, ToolCorpus, with_systems=False),
    "pictures": Course(
        PICTURES,
        build_picture_tokenizer,
        PictureCorpus,
        with_systems=False,
        build_model=_vision_model,
        save=_save_with_processor,
    ),
}
