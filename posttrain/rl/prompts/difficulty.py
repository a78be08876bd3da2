"""How often a policy passes each prompt: the estimate, its uncertainty, and the Parquet files that keep estimates.

An estimate holds only for the policy, sampling, reward and prompt that it was measured with. Each row of a file names
them by fingerprint, so that a run can read the files of all other runs and pick the estimates that hold for itself.
"""

import hashlib
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from posttrain.errors import ConfigError
from posttrain.files import replacing
from posttrain.metrics.intervals import wilson_ci95
from posttrain.metrics.pass_at_k import pass_at_k
from posttrain.metrics.unscored import Unscored
from posttrain.records import Outcome, Row

LATER = ("unscored",)  # columns that files of earlier versions lack


class Basis(Struct, frozen=True):
    """What an estimate was measured with: fingerprints of the policy, and of its sampling and scoring."""

    policy: str
    scoring: str


class Difficulty(Struct, frozen=True):
    """How often one policy passed one prompt: `passes` of the `n` replies that got a score.

    Example: n 8 and passes 2 are a pass rate of 0.25. n is 0 if the prompt was tried and no reply got a score; such a
    record has no pass rate.

    policy_version: the version of the policy. selected: whether the pass rate lies in the band that is trained on.
    prompt: the fingerprint of the prompt. samples: how many replies were asked for. tokens: how many tokens this run
    sampled for the estimate, 0 if it took the estimate of another run. unscored: why most of the replies without a
    score have none, such as "nan"; "" if every reply has one.
    """

    prompt_id: str
    capability: str
    n: int
    passes: int
    policy_version: int
    selected: bool
    prompt: str = ""
    samples: int = 0
    tokens: int = 0
    unscored: str = ""

    @property
    def pass_rate(self) -> float:
        """Share of the n scored replies that passed: pass@1."""
        return self.passes / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson's 95% interval of the pass rate."""
        return wilson_ci95(self.passes, self.n)

    @property
    def pass_at_k(self) -> tuple[float, ...]:
        """Unbiased pass@k for k = 1 to n [n]. Source: Chen et al. 2021, arXiv 2107.03374."""
        return tuple(pass_at_k(self.n, self.passes, k) for k in range(1, self.n + 1))

    def in_band(self, band: Sequence[float]) -> bool:
        """Whether the pass rate lies in [lowest, highest]."""
        return self.n > 0 and band[0] <= self.pass_rate <= band[1]


class DifficultyStore:
    """Estimates that runs share through a folder. Each run reads the files of all runs and writes a file of its own.

    Several runs may use the folder at the same time, because each file is written under another name and then renamed.
    run: the stage's folder. Its path, the host and the basis are hashed to name the run's file.
    """

    def __init__(self, folder: Path, basis: Basis, run: Path):
        if folder.exists() and not folder.is_dir():
            raise ConfigError("profile.store", [f"got {str(folder)!r}: is a file; give a folder"])
        place = f"{socket.gethostname()}:{run.resolve()}:{basis.policy}:{basis.scoring}"
        self.folder = folder
        self._file = folder / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.parquet"
        self._basis = basis
        self._found: dict[str, Difficulty] = {}
        for path in sorted(folder.glob("*.parquet")):
            for item in read_estimates(path, basis):
                known = self._found.get(item.prompt)
                if item.n and (known is None or known.samples < item.samples):
                    self._found[item.prompt] = item

    def find(self, row: Row, prompt: str, samples: int) -> Difficulty | None:
        """The estimate for a row, or None if no run asked for `samples` or more replies to it.

        prompt: the row's fingerprint, by which the estimate is found even if the row had another id in that run.
        """
        found = self._found.get(prompt)
        if found is None or found.samples < samples:
            return None
        return replace(found, prompt_id=row.id, capability=row.capability, tokens=0)

    def add(self, difficulties: Iterable[Difficulty]) -> None:
        """Add estimates to this run's file."""
        new = {item.prompt: item for item in difficulties if item.n}
        if not new:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        old = read_estimates(self._file, self._basis) if self._file.exists() else []
        write_estimates(self._file, list({**{item.prompt: item for item in old}, **new}.values()), self._basis)


def write_estimates(
    path: Path, difficulties: Sequence[Difficulty], basis: Basis, *, extra: Mapping[str, object] | None = None
) -> None:
    """Write a table of estimates, whole or not at all. extra: further columns, each with one value for all rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt_id": item.prompt_id,
            "capability": item.capability,
            "pass_rate": item.pass_rate if item.n else None,
            "ci95_low": item.ci95[0] if item.n else 0.0,
            "ci95_high": item.ci95[1] if item.n else 1.0,
            "n": item.n,
            "passes": item.passes,
            "pass_at_k": list(item.pass_at_k),
            "samples": item.samples,
            "tokens": item.tokens,
            "policy_version": item.policy_version,
            "selected": item.selected,
            "prompt": item.prompt,
            "unscored": item.unscored,
            "policy": basis.policy,
            "scoring": basis.scoring,
            **(extra or {}),
        }
        for item in difficulties
    ]
    with replacing(path) as aside:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema(pa, extra or {})), aside)


def read_estimates(path: Path, basis: Basis | None = None) -> list[Difficulty]:
    """The estimates in a file; if `basis` is given, only those that were measured with it.

    Raises ConfigError for a file that is not a table of estimates.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("prompt_id", "capability", "n", "passes", "policy_version", "selected", "prompt", "samples", "tokens")
    try:
        with path.open("rb") as file:  # opened once, because another run may replace the file at any time
            parquet = pq.ParquetFile(file)
            known = [*names, *(name for name in LATER if name in parquet.schema_arrow.names)]
            rows = parquet.read(columns=[*known, "policy", "scoring"]).to_pylist()
        return [
            Difficulty(**{name: row[name] for name in known})
            for row in rows
            if basis is None or (row["policy"], row["scoring"]) == (basis.policy, basis.scoring)
        ]
    except (pa.ArrowException, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("profile", [f"{path} is not a table of pass rates ({reason}); move it away"]) from error


def unscored_before(known: Iterable[Difficulty]) -> Unscored:
    """What could not be scored of the prompts whose estimates are known; of each, why is known of most replies."""
    unscored = Unscored()
    for item in known:
        unscored.add(item.prompt_id, [(Outcome.ERROR, item.unscored)] * (item.samples - item.n), item.samples)
    return unscored


def _schema(pa: Any, extra: Mapping[str, object]) -> Any:
    text, integer, real = pa.string(), pa.int64(), pa.float64()
    types: dict[str, Any] = {
        "prompt_id": text, "capability": text, "pass_rate": real, "ci95_low": real, "ci95_high": real, "n": integer,
        "passes": integer, "pass_at_k": pa.list_(real), "samples": integer, "tokens": integer,
        "policy_version": integer, "selected": pa.bool_(), "prompt": text, "unscored": text,
        "policy": text, "scoring": text,
        **dict.fromkeys(extra, real),
    }  # fmt: skip
    return pa.schema(list(types.items()))
