"""Saves the verdicts of a judge in a file, so that the judge is never asked the same question twice.

    question ─► key ─► in the file ──► its verdict
                   └─► not in it ────► judge ─► verdict ─► into the file

A key is a hash of the judge, its labels and the question as the judge reads it. So a row keeps its verdict if its id,
its place in the dataset or the selection changes. If its text, the template or the judge's model changes, it is a new
question.

The file is an SQLite database, so that verdicts take no memory, and a process that is killed loses those of the last
second at most. Left out: `Undecided` answers, which say nothing about the row; the question is asked again.
"""

import hashlib
import json
import sqlite3
import time
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from posttrain.errors import StageError
from posttrain.judging.backend import PreparedJudge
from posttrain.judging.config import EndpointConfig, JudgeQuestion
from posttrain.judging.prompts import Question
from posttrain.judging.verdicts import Verdict
from posttrain.model.fingerprint import model_fingerprint
from posttrain.records import Media

COMMIT_S = 1.0  # a kill may lose the verdicts of so many seconds
_SCHEMA = "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict BLOB NOT NULL) WITHOUT ROWID"


def judge_identity(config: JudgeQuestion) -> dict[str, Any]:
    """The identity of a judge: the content of its model folder and the data type of the weights.

    The weights behind an endpoint cannot be read, so its address and the model's name stand for them.
    """
    source = config.source
    if isinstance(source, EndpointConfig):
        return source.model_dump(include={"base_url", "model", "top_logprobs"})
    return {"model": model_fingerprint(source.path), "dtype": source.dtype}


class VerdictCache:
    """The verdicts of one judge, as a context manager. It creates the file and its folder if they are missing.

    Raises StageError for a file that cannot be read.
    """

    def __init__(self, path: Path, judge: PreparedJudge):
        form = judge.form.name if judge.form is not None else None
        parts = [judge_identity(judge.config), judge.config.labels, form]
        self._judge = json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")
        self._uncommitted_since: float | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=30)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StageError(
                f"{path}: the verdicts in it cannot be read ({error}); delete it, and the judge rates all rows again"
            ) from None

    def __enter__(self) -> "VerdictCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._commit()
        self._connection.close()

    def get(self, question: Question) -> Verdict | None:
        """The saved verdict on this question, or None."""
        rows = self._connection.execute("SELECT verdict FROM verdicts WHERE key = ?", (self._key(question),))
        return next((msgspec.json.decode(verdict, type=Verdict) for (verdict,) in rows), None)

    def add(self, question: Question, verdict: Verdict) -> None:
        """Save a verdict. It is written to the file within about `COMMIT_S` seconds, or when the cache is closed."""
        now = time.monotonic()
        if self._uncommitted_since is None:
            self._connection.execute("BEGIN IMMEDIATE")
            self._uncommitted_since = now
        self._connection.execute(
            "INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (self._key(question), msgspec.json.encode(verdict))
        )
        if now - self._uncommitted_since >= COMMIT_S:
            self._commit()

    def _commit(self) -> None:
        if self._uncommitted_since is not None:
            self._connection.execute("COMMIT")
            self._uncommitted_since = None

    def _key(self, question: Question) -> bytes:
        """The key of a question: of its pictures, and of its tokens, or for an endpoint of its text."""
        digest = hashlib.blake2b(self._judge, digest_size=16)
        digest.update(b"\0")
        digest.update(array("q", question.token_ids).tobytes() or question.text.encode("utf-8", "surrogatepass"))
        for reference in question.pictures:  # other pictures of the same size have the same tokens
            digest.update(b"\0" + Media(reference).key.encode())
        return digest.digest()
