"""Finds rows that share text with an evaluation set, by runs of words (n-grams) that both contain.

    evaluation sets ─► n-grams of each text ─► index, in memory
    row ─► its n-grams ─► evaluation texts that share one ─► share of each text's words that the row contains ─► hits

An evaluation row has several texts: its `prompt`, and each other text column of at least `ngram` words, such as the
answer. Each text is compared with every turn of a row except system turns. A prompt of fewer than `ngram` words must be
contained as a whole, and one of fewer than 4 words must be a whole turn. Other columns of fewer than `ngram` words are
not compared, because many unrelated rows contain a text such as "The answer is 42.".

Source: shared runs of 13 words are the rule of GPT-3 (Brown et al., "Language Models are Few-Shot Learners", 2020), as
appendix A.6 of Llama 2 (Touvron et al., 2023) sums it up, which also says why one shared run is too coarse. A limit on
the share of a text's tokens that lie in n-grams of one training document is the rule of allenai/open-instruct,
decontamination/README.md ("Matching ngrams"), the scripts of Tülu 3.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import xxhash

from posttrain.config.data import DataConfig, EvaluationSetsConfig
from posttrain.data.files import Record, read_records
from posttrain.data.messages import RowError
from posttrain.data.ngrams import Item, item_texts, ngram_hashes, words
from posttrain.data.rows import parse_row
from posttrain.errors import DataError
from posttrain.records import Row

WHOLE_TURN = 4  # prompts of fewer words must be a whole turn
COMMON = 100  # an n-gram that more evaluation texts contain is boilerplate, such as an instruction, and is not compared
SHOWN_WORDS = 30


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that contains a text of an evaluation row. If it contains several, the hit is the one with most overlap.

    id: of the row. part: of the row, `prompt`, `reply`, `chosen` or `rejected`. evaluation: file and row number of the
    evaluation row. evaluation_id: its id. evaluation_part: `prompt`, or the name of its column. overlap: the share of
    the evaluation text's words, without boilerplate, that lie in a shared n-gram, in (0, 1]. shared: the longest shared
    passage, in the normalised words that are compared, cut after 30 words.
    """

    id: str
    part: str
    evaluation: str
    evaluation_id: str
    evaluation_part: str
    overlap: float
    shared: str


@dataclass(frozen=True, slots=True)
class _Text:
    where: str
    id: str
    part: str
    words: list[str]
    grams: np.ndarray
    n: int
    starts: list[int]  # where the compared n-grams begin; empty for a text that must be a whole turn

    def covered(self, starts: Iterable[int]) -> np.ndarray:
        """Which words lie in the n-grams that begin at `starts`, bool [words]."""
        covered = np.zeros(len(self.words), bool)
        for start in starts:
            covered[start : start + self.n] = True
        return covered


class EvaluationTexts:
    """The texts of all evaluation sets that a config names, indexed by n-gram and kept in memory.

    Raises `DataError` for a set that cannot be read, for sets without any row, and for a row without a prompt.
    """

    def __init__(self, config: EvaluationSetsConfig):
        self.num_rows = 0
        self._ngram, self._overlap = config.ngram, config.overlap
        self._texts: list[_Text] = []
        self._whole: dict[int, list[int]] = defaultdict(list)  # hash of a short prompt -> indices into the texts
        self._index: dict[int, dict[int, list[int]]] = {}  # n, then hash of an n-gram -> indices into the texts
        for record in islice(read_records(config.paths), config.limit):
            self._add(_evaluation_row(record, config.columns), record.where)
        if not self.num_rows:
            raise DataError(f"{', '.join(config.paths)}: holds no rows; an evaluation set needs at least one")
        self._fill_index()
        self._sorted = {n: np.array(sorted(index), np.uint64) for n, index in self._index.items()}

    def _add(self, row: Row, where: str) -> None:
        self.num_rows += 1
        prompt = " ".join(text for part, text in item_texts(row) if part == "prompt")
        texts = {"prompt": prompt, **{name: text for name, text in _columns(row) if len(words(text)) >= self._ngram}}
        for part, text in texts.items():
            found = words(text)
            if len(found) < WHOLE_TURN:
                self._whole[_whole_hash(found)].append(len(self._texts))
            n = min(self._ngram, len(found))
            self._texts.append(_Text(where, row.id, part, found, ngram_hashes(found, n), n, []))

    def _fill_index(self) -> None:
        """Index each text by its n-grams. Boilerplate is left out, unless the text has no other n-grams."""
        counts: Counter[int] = Counter()
        for text in self._texts:
            counts.update(set(text.grams.tolist()))
        for number, text in enumerate(self._texts):
            grams = text.grams.tolist()
            if len(text.words) < WHOLE_TURN:
                continue
            rare = np.array([counts[gram] <= COMMON for gram in grams])
            if not rare.any():
                rare[:] = True
            text.starts.extend(np.flatnonzero(rare).tolist())
            index = self._index.setdefault(text.n, {})
            for gram in {grams[start] for start in text.starts}:
                index.setdefault(gram, []).append(number)

    def hits(self, item: Item) -> list[Hit]:
        """The evaluation rows whose text `item` contains, the largest overlap first."""
        best: dict[str, Hit] = {}
        for part, text in item_texts(item):
            for hit in self._hits_of(item.id, part, words(text)):
                if hit.evaluation not in best or best[hit.evaluation].overlap < hit.overlap:
                    best[hit.evaluation] = hit
        return sorted(best.values(), key=lambda hit: -hit.overlap)

    def _hits_of(self, identity: str, part: str, found: list[str]) -> Iterator[Hit]:
        numbers = set(self._whole.get(_whole_hash(found), ())) if len(found) < WHOLE_TURN else set()
        for number in sorted(numbers):
            text = self._texts[number]
            yield self._hit((identity, part), text, text.covered([0]))
        for n, known in self._sorted.items():
            if n > len(found):
                continue
            grams = np.unique(ngram_hashes(found, n))
            shared = grams[known[np.minimum(np.searchsorted(known, grams), len(known) - 1)] == grams]
            candidates = {number for gram in shared.tolist() for number in self._index[n][gram]}
            for number in sorted(candidates):
                text = self._texts[number]
                starts = np.array(text.starts)
                covered = text.covered(starts[np.isin(text.grams[starts], grams)])
                if covered.sum() >= self._overlap * text.covered(starts).sum():
                    yield self._hit((identity, part), text, covered)

    def _hit(self, place: tuple[str, str], text: _Text, covered: np.ndarray) -> Hit:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], covered.astype(int), [0]))))
        start, end = max(zip(edges[::2], edges[1::2], strict=True), key=lambda run: run[1] - run[0])
        shared = " ".join(text.words[start : min(end, start + SHOWN_WORDS)])
        overlap = round(float(covered.sum() / text.covered(text.starts or [0]).sum()), 4)
        return Hit(*place, text.where, text.id, text.part, overlap, shared)


def _evaluation_row(record: Record, columns: Mapping[str, str]) -> Row:
    """The evaluation row, with the prompt as its messages. The replies of a whole conversation are in `fields`."""
    if record.problem:
        raise DataError(f"{record.where}: {record.problem}")
    config = DataConfig(path=record.file, columns={a: b for a, b in columns.items() if b in record.value})
    try:
        return parse_row(record, "prompt", config)
    except RowError as error:
        try:
            return parse_row(record, "supervised", config)
        except RowError:
            raise DataError(f"{record.where}: {error}") from None


def _columns(row: Row) -> Iterator[tuple[str, str]]:
    """(name, text) of the text columns other than the prompt, and of the replies of a conversation."""
    replies = " ".join(text for part, text in item_texts(row) if part == "reply")
    for name, value in {"reply": replies, "answer": row.answer, **row.fields}.items():
        if isinstance(value, str) and name != "id":
            yield name, value


def _whole_hash(found: Sequence[str]) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(found).encode())
