"""What a base model is trained for: its puzzles, its tokenizer, and its text, by the name that the config gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.base.config import TextConfig
from posttrain.base.corpus import Corpus, Document
from posttrain.base.tasks import ANSWERS, Puzzles
from posttrain.base.tokenizer import build_tokenizer
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


@dataclass(frozen=True, slots=True)
class Course:
    """A course. with_systems: whether half of its conversations begin with a system instruction."""

    puzzles: Puzzles
    build_tokenizer: Callable[[], Any]
    text: MakeText
    with_systems: bool


COURSES: dict[str, Course] = {
    "answers": Course(ANSWERS, build_tokenizer, Corpus, with_systems=True),
    "tools": Course(TOOLS, build_tool_tokenizer, ToolCorpus, with_systems=False),
}
