"""For rl_curriculum.py: make pools of prompts of which most teach nothing, from the quick start's base and puzzles.

The prompts are those of a base stage that draws NUM_PROMPTS of them. The base answers each SAMPLES times. A pool has
NUM_MEDIUM prompts with a pass rate in MEDIUM. The others always passed, never passed, or are countdown puzzles without
a solution, as flawed data has them: a third each, as far as there are so many. (The sums of the same numbers with any
signs are all odd or all even, so a target that is moved by one cannot be reached.)

Each row has its kind, which is family and level, in the field `kind`. The held-out problems are of the kinds whose
mean pass rate lies in MEDIUM. All problems are different, and the base was trained on none of them.
"""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from posttrain.base.config import StageConfig
from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.chat import render_prompt
from posttrain.data.ends import end_token_ids
from posttrain.data.rows import load_rows
from posttrain.data.stored import Derived
from posttrain.files import read_jsonl
from posttrain.model.tokenizer import load_tokenizer
from posttrain.records import DrawnPrompt, Prompt, Row
from posttrain.rl.config import RlConfig

BASE = Path(__file__).parents[1] / "configs" / "quickstart" / "base.yaml"
NUM_PROMPTS = 4800
SAMPLES = 16
MEDIUM, TOO_EASY = (0.1, 0.7), 0.95
NUM_MEDIUM = 120
HELDOUT = 320


@dataclass(frozen=True)
class Pool:
    """The files of training prompts, of the medium ones among them, and of held-out problems.

    model: the policy for which they were chosen.
    """

    model: str
    prompts: str
    medium: str
    heldout: str


def make_pools(folder: Path, settings: dict[str, Any], shares: Sequence[int]) -> dict[int, Pool]:
    """Train or fetch the base, sample its prompts, and choose a pool for each percentage of medium prompts.

    Files that exist already are not made again. settings: of an RL stage, without model and prompts. Needs a Ray
    session.
    """
    told = folder / "pools.json"
    if not told.exists():
        base = _base(folder / "base")
        rows = [{**row, "kind": f"{row['family']} {row['level']}"} for row in read_jsonl(Path(base["prompts"]))]
        countdowns = [row for row in rows if row["family"] == "countdown"]
        rows += [_unsolvable(row) for row in countdowns]
        _write(folder / "candidates.jsonl", rows)
        rates = _pass_rates(folder, base["model"], settings)
        composition = {share: _choose(folder, rows, rates, share=share) for share in shares}
        _choose_heldout(folder, base, rows, rates=rates)
        told.write_text(json.dumps({"model": base["model"], "composition": composition}))
    model = json.loads(told.read_text())["model"]
    return {
        share: Pool(model, *(str(folder / f"{name}.jsonl") for name in (f"pool{share}", "medium", "heldout")))
        for share in shares
    }


def _base(folder: Path) -> dict[str, Any]:
    from posttrain.base.stage import run

    folder.mkdir(parents=True, exist_ok=True)
    data = {**yaml.safe_load(BASE.read_text()), "sets": {"prompts": NUM_PROMPTS}}
    config = validate_config(StageConfig, data, str(BASE))
    return run(config, StageContext("base", folder, folder / "events.jsonl", 0))


def _pass_rates(folder: Path, model: str, settings: dict[str, Any]) -> dict[str, float]:
    """How often the model passes each candidate, by prompt id."""
    from posttrain.rl.prompts.profile import profile_prompts
    from posttrain.sampling.client import Engines

    profile = {"samples": SAMPLES}
    data = settings | {"model": {"path": model, "dtype": "float32"}, "profile": profile}
    config = validate_config(RlConfig, data | {"prompts": {"path": str(folder / "candidates.jsonl")}}, "benchmark")
    tokenizer = load_tokenizer(config.model.path)
    rows = load_rows(config.prompts, kind="prompt")
    prompts = Derived(rows, lambda row: _plain(row, tokenizer))
    context = StageContext("pool", folder, folder / "events.jsonl", 0, warm_engines=True)
    with Engines(context, config.model, config.engine, resources=config.resources.rollout) as engines:
        stop_ids = tuple(end_token_ids(tokenizer))
        found = profile_prompts(config, context, engines, prompts=prompts, stop_ids=stop_ids)
    return {item.prompt_id: item.pass_rate for item in found if item.n == SAMPLES}


def _plain(row: Row, tokenizer: Any) -> DrawnPrompt:
    """A row as a prompt without a sampled system instruction."""
    return DrawnPrompt(row, None, Prompt(row.messages, tuple(render_prompt(tokenizer, row.messages))))


def _unsolvable(row: dict[str, Any]) -> dict[str, Any]:
    """The countdown puzzle with another target, which its numbers cannot reach."""
    target, (turn,) = row["target"] + 1, row["messages"]
    moved = turn | {"content": turn["content"].replace(f"Make {row['target']} ", f"Make {target} ")}
    return row | {"id": f"{row['id']}-unsolvable", "target": target, "messages": [moved], "key": moved["content"]}


def _choose(folder: Path, rows: list[dict[str, Any]], rates: dict[str, float], *, share: int) -> dict[str, int]:
    """Write the pool with this percentage of medium prompts. Returns how many prompts of each sort it has."""
    rows = [row for row in rows if row["id"] in rates]
    random.Random(0).shuffle(rows)
    sorts = defaultdict[str, list[dict[str, Any]]](list)
    for row in rows:
        rate = rates[row["id"]]
        name = "unsolvable" if row["id"].endswith("unsolvable") and rate == 0 else _name(rate)
        if name is not None:
            sorts[name].append(row)
    medium = sorts.pop("medium", [])[:NUM_MEDIUM]
    counts = _even({name: len(found) for name, found in sorts.items()}, NUM_MEDIUM * 100 // share - NUM_MEDIUM)
    if len(medium) < NUM_MEDIUM:
        raise RuntimeError(f"only {len(medium)} of the base's prompts are medium, not {NUM_MEDIUM}")
    others = [row for name, count in counts.items() for row in sorts[name][:count]]
    _write(folder / f"pool{share}.jsonl", [*medium, *others])
    _write(folder / "medium.jsonl", medium)
    return {"medium": len(medium), **counts}


def _even(there: Mapping[str, int], total: int) -> dict[str, int]:
    """As many of each sort, but no more than there are; sorts of which there are more make up for the others."""
    counts: dict[str, int] = {}
    for place, name in enumerate(sorted(there, key=lambda name: there[name])):
        counts[name] = min(there[name], (total - sum(counts.values())) // (len(there) - place))
    if sum(counts.values()) < total:
        raise RuntimeError(f"the base's prompts do not give {total} prompts that teach nothing, only {dict(there)}")
    return counts


def _choose_heldout(folder: Path, base: dict[str, Any], rows: list[dict[str, Any]], *, rates: dict[str, float]) -> None:
    by_kind = defaultdict[str, list[float]](list)
    for row in rows:
        if row["id"] in rates and not row["id"].endswith("unsolvable"):
            by_kind[row["kind"]].append(rates[row["id"]])
    medium = {kind for kind, found in by_kind.items() if MEDIUM[0] <= fmean(found) <= MEDIUM[1]}
    others = [row for name in ("heldout", "tune") for row in read_jsonl(Path(base[name]))]
    heldout = [row for row in others if f"{row['family']} {row['level']}" in medium][:HELDOUT]
    if len(heldout) < HELDOUT:
        raise RuntimeError(f"only {len(heldout)} held-out problems are of medium kinds, not {HELDOUT}")
    _write(folder / "heldout.jsonl", heldout)


def _name(rate: float) -> str | None:
    if rate >= TOO_EASY:
        return "too_easy"
    if rate == 0:
        return "too_hard"
    return "medium" if MEDIUM[0] <= rate <= MEDIUM[1] else None


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
