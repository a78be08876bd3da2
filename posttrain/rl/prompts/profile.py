"""The pass@k profile of the prompts with the starting policy, before the training.

    prompts ─► known? ── this run's files, the shared store ─────────────────────────────► difficulty.parquet
                 └─ no ─► chunks, two at a time: engines ─► reward actor ─► a file ─►             │
                                                                               band.py: selected by pass rate

A prompt of which no reply could be scored is set aside: it is in difficulty.parquet with n = 0 and why, and is not
trained on. An event tells how many there are, and an alarm where they are many.

Each chunk is written to a file when it is scored, so a run that is stopped during the profile continues from there. An
estimate is stored with fingerprints of policy, sampling, reward and prompt (fingerprints.py). It is reused only if all
of them are the same.
"""

import asyncio
import contextlib
import math
import random
import shutil
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from posttrain.context import StageContext
from posttrain.data.ranked import Ranked
from posttrain.data.stored import Derived
from posttrain.data.strata import by_hash
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.errors import StageError
from posttrain.metrics.correctness import is_right
from posttrain.metrics.unscored import Unscored, kind_of
from posttrain.model.fingerprint import model_fingerprint
from posttrain.records import DrawnPrompt, Rollout, Row, Scored
from posttrain.rl.grading.judge import Judge, rewards
from posttrain.rl.prompts.band import ALL
from posttrain.rl.prompts.config import ProfileConfig, PromptsConfig
from posttrain.rl.prompts.difficulty import (
    Basis,
    Difficulty,
    DifficultyStore,
    read_estimates,
    unscored_before,
    write_estimates,
)
from posttrain.rl.prompts.fingerprints import prompt_fingerprint, scoring_fingerprint
from posttrain.rl.rollouts.requests import sample_request
from posttrain.sampling.client import Engines
from posttrain.sampling.groups import MIN_GROUPS, SampledGroups
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.scoring import ScoringProgress, sample_and_score

FILE = "difficulty.parquet"
CHUNKS_AT_ONCE = 2  # so engines work on one while the last replies of the other are sampled and scored


def profile_prompts(
    config: PromptsConfig,
    context: StageContext,
    engines: Engines,
    *,
    prompts: Derived[Row, DrawnPrompt],
    stop_ids: tuple[int, ...],
    judge: Judge | None = None,
    rollouter: EnvironmentRollouter | None = None,
) -> list[Difficulty]:
    """Measure how often the policy passes each prompt. n is 0 for a prompt of which no reply could be scored.

    prompts: made of their rows when they are sampled. In memory are the estimates, some 500 bytes a prompt.
    Prompts with a known estimate are not sampled again; the others get `profile.samples` replies each. The function
    writes difficulty.parquet. Raises StageError if not one reply could be scored.
    """
    asked = profile_of(config)
    basis = profile_basis(config)
    store = profile_store(asked.store, context.dir, basis)
    rows = prompts.items
    keys = {row.id: prompt_fingerprint(row) for row in rows}
    known = known_difficulties(
        context.dir,
        basis,
        store,
        rows=rows,
        keys=keys,
        samples=asked.samples,
    )
    missing = prompts.at([place for place, row in enumerate(rows) if row.id not in known])
    context.event("profile", prompts=len(prompts), known=len(known))
    sampled: list[Difficulty] = []
    unscored = unscored_before(known.values())
    if missing:
        sampled = asyncio.run(
            _sample(
                config,
                context,
                engines,
                prompts=missing,
                stop_ids=stop_ids,
                keys=keys,
                basis=basis,
                judge=judge,
                rollouter=rollouter,
                unscored=unscored,
            )
        )
        unscored.tell(context, "profile", config.reward.alarm_fraction)
    found = {**known, **{item.prompt_id: item for item in sampled}}
    band = asked.band
    ordered = [replace(found[name], selected=found[name].in_band(band or ALL)) for name in keys]
    if not any(item.n for item in ordered):
        raise nothing_scored()
    extra = {"band_low": float(band[0]), "band_high": float(band[1])} if band is not None else {}
    write_estimates(context.dir / FILE, ordered, basis, extra=extra)
    if store is not None:
        store.add(_partial(context.dir, basis))
    shutil.rmtree(_parts(context.dir), ignore_errors=True)
    return ordered


def profiled_places(rows: Sequence[Row], limit: int | None, seed: int) -> list[int]:
    """The places of the rows in random order, or `limit` of them, spread evenly over the strata."""
    if limit is None or limit >= len(rows):
        order = list(range(len(rows)))
    else:
        with Ranked(by_hash(rows, seed)) as ranked:
            order = sorted(ranked.spread(limit))
    random.Random(seed).shuffle(order)
    return order


def profile_of(config: PromptsConfig) -> ProfileConfig:
    """The section `profile` of a stage that has one."""
    assert config.profile is not None
    return config.profile


def profile_basis(config: PromptsConfig) -> Basis:
    """The fingerprints that the estimates of a run depend on, apart from those of the prompts."""
    return Basis(model_fingerprint(config.model.path), scoring_fingerprint(config))


def profile_store(folder: str | None, run: Path, basis: Basis) -> DifficultyStore | None:
    """The store of estimates that runs share in `folder`; None if `folder` is None. run: the stage's folder."""
    return None if folder is None else DifficultyStore(Path(folder).expanduser(), basis, run)


def known_difficulties(
    run: Path,
    basis: Basis,
    store: DifficultyStore | None,
    *,
    rows: Sequence[Row],
    keys: Mapping[str, str],
    samples: int,
) -> dict[str, Difficulty]:
    """The known estimates by prompt id: those of this run, and for other prompts those of other runs.

    run: the stage's folder. keys: the fingerprint of each row by its id. samples: estimates from fewer replies are
    ignored.
    """
    own = _partial(run, basis) + (read_estimates(run / FILE, basis) if (run / FILE).exists() else [])
    known = {item.prompt_id: item for item in own if item.prompt == keys.get(item.prompt_id)}
    known = {name: item for name, item in known.items() if item.samples >= samples}
    if store is not None:
        shared = [store.find(row, keys[row.id], samples) for row in rows if row.id not in known]
        known |= {item.prompt_id: item for item in shared if item is not None}
    return known


def profile_figures(run: Path) -> dict[str, Any]:
    """How much a finished profile could not score, and why: see `Unscored.figures`. run: the stage's folder."""
    return unscored_before(read_estimates(run / FILE)).figures()


async def _sample(
    config: PromptsConfig,
    context: StageContext,
    engines: Engines,
    *,
    prompts: Sequence[DrawnPrompt],
    stop_ids: tuple[int, ...],
    keys: Mapping[str, str],
    basis: Basis,
    judge: Judge | None,
    rollouter: EnvironmentRollouter | None,
    unscored: Unscored,
) -> list[Difficulty]:
    """Sample and score the prompts in chunks. Each chunk is written when it is done.

    unscored: counts what could not be scored, beginning with what is known of other prompts.
    """
    found: list[Difficulty] = []
    folder = _parts(context.dir)
    folder.mkdir(exist_ok=True)
    size, samples = chunk_size(config), profile_of(config).samples
    starts = iter(range(0, len(prompts), size))
    client = rewards(config, judge)  # as in training
    progress = ScoringProgress(
        context, len(prompts), "prompts", stats=lambda: client.stats, phase="pass@k profile", unscored=unscored
    )

    async def drain() -> None:
        for start in starts:
            chunk = prompts[start : start + size]
            flights = [
                Flight(
                    start + index,
                    0,
                    prompt,
                    request=sample_request(config.sampling, prompt, samples, stop_ids=stop_ids),
                )
                for index, prompt in enumerate(chunk)
            ]
            scored = await sample_and_score(sampled, flights, client.score, progress=progress)
            pairs = [(rollout, flight.prompt.row) for flight in flights for rollout in flight.rollouts]
            scores = [score for group in scored for score in group]
            measured = difficulties(config, pairs, scores)
            measured = [replace(item, prompt=keys[item.prompt_id]) for item in measured]
            found.extend(measured)
            if not any(item.n for item in found):  # report a broken reward now, not after all prompts
                raise nothing_scored(scores)
            write_estimates(folder / f"{uuid.uuid4().hex[:16]}.parquet", measured, basis)

    def seed(flight: Flight) -> int:
        """The seed of a wave. It depends on the first row alone, not on how many chunks were known before."""
        return zlib.crc32(f"{context.seed}/{flight.prompt.row.id}".encode()) >> 1

    await client.start()
    try:
        # A deterministic run samples one chunk after another, so a stopped run has written the first ones.
        num_at_once = 1 if config.deterministic else CHUNKS_AT_ONCE
        wave_seed = seed if config.deterministic else None
        async with (
            rollouter or contextlib.nullcontext(),
            SampledGroups(context, engines, config.engine, rollouter=rollouter, wave_seed=wave_seed) as sampled,
            progress,
        ):
            await asyncio.gather(*(drain() for _ in range(num_at_once)))
    finally:
        await client.close()
    return found


def chunk_size(config: PromptsConfig) -> int:
    """The number of prompts in a chunk: enough to fill every engine, so that engines need not wait between chunks."""
    seats = config.engine.max_num_seqs * config.resources.rollout.least
    return max(MIN_GROUPS, math.ceil(2 * seats / profile_of(config).samples))


def _parts(run: Path) -> Path:
    return run / "profile"


def _partial(run: Path, basis: Basis) -> list[Difficulty]:
    return [item for path in sorted(_parts(run).glob("*.parquet")) for item in read_estimates(path, basis)]


def nothing_scored(scores: Sequence[Scored] = ()) -> StageError:
    """The error of a profile in which no reply has a score. scores: give the most frequent reason."""
    reasons = Counter(f"{score.outcome}: {score.reason}" for score in scores).most_common(1)
    why = "".join(f"; most often: {reason}" for reason, _ in reasons)
    return StageError(f"not one reply of the profile could be scored{why}")


def difficulties(
    config: PromptsConfig, pairs: Sequence[tuple[Rollout, Row]], scores: Sequence[Scored]
) -> list[Difficulty]:
    """How often each prompt was passed, in the order of the prompts. n is 0 for a prompt without a scored reply."""
    passes: Counter[str] = Counter()
    scored: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for (rollout, _), score in zip(pairs, scores, strict=True):
        tokens[rollout.prompt_id] += rollout.num_sampled
        if score.result is not None:
            scored[rollout.prompt_id] += 1
            passes[rollout.prompt_id] += is_right(score.result.value, config.reward.correct_threshold)
        else:
            kinds.setdefault(rollout.prompt_id, Counter())[kind_of((score.outcome, score.reason))] += 1
    rows = {row.id: row for _, row in pairs}.values()
    asked = profile_of(config)
    counted = [
        Difficulty(
            row.id,
            row.capability,
            scored[row.id],
            passes[row.id],
            0,
            False,
            samples=asked.samples,
            tokens=tokens[row.id],
            unscored=kinds[row.id].most_common(1)[0][0] if row.id in kinds else "",
        )
        for row in rows
    ]
    return [replace(item, selected=item.in_band(asked.band or ALL)) for item in counted]
