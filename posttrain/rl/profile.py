"""pass@k profile of the prompts with the policy that starts, and the band of them that is worth training on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.context import StageContext
from posttrain.errors import ConfigError, StageError
from posttrain.records import Rollout, Row, Scored
from posttrain.rl.config import RlConfig
from posttrain.rl.groups import PASS_THRESHOLD, DrawnPrompt
from posttrain.rl.scoring import make_group
from posttrain.sampling.client import Engines
from posttrain.sampling.requests import SampleRequest
from posttrain.scoring.plugins import RewardSpec
from posttrain.scoring.pool import RewardPool


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How often the policy of `policy_version` passed a prompt. pass_rate is passes / n."""

    prompt_id: str
    capability: str
    n: int
    passes: int
    policy_version: int
    selected: bool

    @property
    def pass_rate(self) -> float:
        """Share of the n scored replies that passed."""
        return self.passes / self.n


def reward_pool(config: RlConfig) -> RewardPool:
    """The killable processes that score."""
    reward = config.reward
    return RewardPool(RewardSpec(reward.name, reward.args), reward.workers, reward.timeout_s)


def profile_prompts(
    config: RlConfig, context: StageContext, engines: Engines, prompts: Sequence[DrawnPrompt], stop_ids: tuple[int, ...]
) -> list[Difficulty]:
    """Sample every prompt `profile.samples` times and score the replies."""
    total = len(prompts)
    requests = profile_requests(config, prompts, stop_ids)
    completions = engines.generate(
        requests, lambda done: context.progress(done, total, "prompts", {"phase": "pass@k profile"})
    )
    groups = [
        make_group(index, prompt, replies, "profile", 0.0, 0.0)
        for index, (prompt, replies) in enumerate(zip(prompts, completions, strict=True))
    ]
    pairs = [(rollout, group.prompt.row) for group in groups for rollout in group.rollouts]
    return difficulties(config, pairs, reward_pool(config).score_all(pairs))


def profile_requests(
    config: RlConfig, prompts: Sequence[DrawnPrompt], stop_ids: tuple[int, ...]
) -> list[SampleRequest]:
    """One request a prompt."""
    return [sample_request(config, prompt, config.profile.samples, stop_ids) for prompt in prompts]


def difficulties(config: RlConfig, pairs: Sequence[tuple[Rollout, Row]], scores: Sequence[Scored]) -> list[Difficulty]:
    """How often each prompt was passed, in the order of the prompts; those of which nothing was scored are left out."""
    passes: Counter[str] = Counter()
    scored: Counter[str] = Counter()
    for (rollout, _), score in zip(pairs, scores, strict=True):
        if score.result is not None:
            scored[rollout.prompt_id] += 1
            passes[rollout.prompt_id] += score.result.value > PASS_THRESHOLD
    if not scored:
        reasons = Counter(f"{score.outcome}: {score.reason}" for score in scores)
        raise StageError(
            f"none of the profile's {len(scores)} replies could be scored; most often: {reasons.most_common(1)[0][0]}"
        )
    low, high = config.profile.band
    rows = [row for row in {row.id: row for _, row in pairs}.values() if scored[row.id]]
    return [
        Difficulty(
            row.id, row.capability, scored[row.id], passes[row.id], 0, low <= passes[row.id] / scored[row.id] <= high
        )
        for row in rows
    ]


def sample_request(config: RlConfig, prompt: DrawnPrompt, n: int, stop_ids: tuple[int, ...]) -> SampleRequest:
    """The request for `n` replies to a prompt."""
    sampling = config.sampling
    return SampleRequest(
        prompt.prompt_ids, n, sampling.temperature, sampling.top_p, sampling.max_tokens, stop_token_ids=stop_ids
    )


def select_band(difficulties: Sequence[Difficulty], rows: Sequence[Row], band: Sequence[float]) -> list[Row]:
    """The rows whose pass rate lies in the band; says which bands would select something if none does."""
    chosen = {item.prompt_id for item in difficulties if item.selected}
    if not chosen:
        counts = Counter(round(item.pass_rate, 2) for item in difficulties)
        found = ", ".join(f"{rate:.2f}: {count}" for rate, count in sorted(counts.items()))
        raise ConfigError(
            "profile.band", [f"got {list(band)}: no prompt's pass rate lies in it; prompts by rate: {found}"]
        )
    return [row for row in rows if row.id in chosen]


def write_difficulty(path: Path, difficulties: Sequence[Difficulty], band: Sequence[float]) -> None:
    """Write difficulty.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(
        [
            {
                "prompt_id": item.prompt_id,
                "capability": item.capability,
                "pass_rate": item.pass_rate,
                "n": item.n,
                "passes": item.passes,
                "policy_version": item.policy_version,
                "selected": item.selected,
                "band_low": float(band[0]),
                "band_high": float(band[1]),
            }
            for item in difficulties
        ]
    )
    aside = path.with_suffix(".writing")
    pq.write_table(table, aside)
    aside.rename(path)


def read_difficulty(path: Path) -> list[Difficulty]:
    """Read what `write_difficulty` wrote."""
    import pyarrow.parquet as pq

    names = ("prompt_id", "capability", "n", "passes", "policy_version", "selected")
    return [Difficulty(**{name: row[name] for name in names}) for row in pq.read_table(path).to_pylist()]
