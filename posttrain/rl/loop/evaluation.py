"""The prompts and requests of an evaluation beside the training, and the accuracies of its replies.

Each line of evaluations.jsonl is one evaluation, of exactly one policy version. Left out: the choice of the engine, and
the sampling (side.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec import Struct

from posttrain.context import StageContext
from posttrain.data.chat import RenderRow
from posttrain.data.images.store import ImageStore
from posttrain.data.images.take import ImageReader
from posttrain.data.rows import store_rows
from posttrain.data.stored import Derived, pick
from posttrain.data.strata import sampled_places
from posttrain.files import keep_lines, read_jsonl
from posttrain.metrics.correctness import is_right
from posttrain.metrics.intervals import bootstrap_ci95, wilson_ci95
from posttrain.metrics.unscored import Failure, Unscored
from posttrain.records import EPISODE_COUNTS, DrawnPrompt, Row
from posttrain.rl.config import EvaluationConfig
from posttrain.rl.grading.alarm import failures_of
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.verifiers import check_rewardable
from posttrain.rl.prompts.lengths import check_room, plain_prompts
from posttrain.rl.records import ScoredGroup
from posttrain.rl.rollouts.config import RolloutsConfig
from posttrain.sampling.requests import SampleRequest

FILE = "evaluations.jsonl"
# Metrics of the step in which an evaluation has ended.
OF_CAPABILITY = "evaluation/accuracy/"
EPISODE_MEANS = {
    "evaluation/turns": "turns",
    "evaluation/tool_calls": "tool_calls",
    "evaluation/malformed_calls": "malformed_calls",
    "evaluation/tool_failures": "tool_failures",
}


class EvaluatedPrompt(Struct, frozen=True):
    """What is kept of a prompt's replies until the evaluation ends: no tokens and no texts, so memory stays small.

    rewards: one for each reply, None without a score. failures: of the replies without a score. num_episodes: how many
    of the replies with a score are episodes. episode_counts: their sums, in the order of EPISODE_COUNTS.
    """

    row_id: str
    capability: str
    rewards: tuple[float | None, ...]
    failures: tuple[Failure, ...] = ()
    num_episodes: int = 0
    episode_counts: tuple[float, ...] = (0.0,) * len(EPISODE_COUNTS)

    @property
    def scored_rewards(self) -> list[float]:
        """The rewards that are known."""
        return [reward for reward in self.rewards if reward is not None]


def evaluated_prompt(scored: ScoredGroup) -> EvaluatedPrompt:
    """What is kept of a scored group."""
    row = scored.group.prompt.row
    results = [rollout.scored.result for rollout in scored.group.rollouts if rollout.scored is not None]
    episodes = [result.parts for result in results if result is not None]
    counts = tuple(sum(parts.get(name, 0.0) for parts in episodes) for name in EPISODE_COUNTS)
    failures = tuple(failures_of(scored))
    return EvaluatedPrompt(row.id, row.capability, scored.rewards, failures, len(episodes), counts)


def unscored_prompts(prompts: Sequence[EvaluatedPrompt]) -> Unscored:
    """The replies of an evaluation that could not be scored."""
    counted = Unscored()
    for prompt in prompts:
        counted.add(prompt.row_id, prompt.failures, len(prompt.rewards))
    return counted


def heldout_rows(
    config: GradingConfig,
    evaluation: EvaluationConfig | None,
    context: StageContext | None = None,
    *,
    images: ImageReader | None = None,
) -> Sequence[Row]:
    """The rows of `evaluation`; none if the config has no such section. Raises UserError for rows that do not fit.

    images: takes their pictures; None for a stage that takes none.
    """
    if evaluation is None:
        return []
    rows = store_rows(evaluation.data, kind="prompt", stage="rl", context=context, images=images)
    check_rewardable(config, rows)
    return pick(rows, sampled_places(rows, evaluation.prompts))


def heldout_prompts(
    config: RolloutsConfig, rows: Sequence[Row], render: RenderRow, *, store: ImageStore | None = None
) -> Derived[Row, DrawnPrompt]:
    """The rows as prompts, without a sampled system instruction. Raises DataError if one leaves no room for a reply.

    store: of the pictures that the rows show; None for rows of text.
    """
    prompts = plain_prompts(rows, render, store)
    check_room(prompts, render, max_tokens=config.sampling.max_tokens, max_model_len=config.engine.length)
    return prompts


def evaluation_request(
    asked: EvaluationConfig, prompt: DrawnPrompt, *, max_tokens: int, stop_ids: tuple[int, ...]
) -> SampleRequest:
    """The request for all replies to a prompt. max_tokens: of each. stop_ids: token ids that end one."""
    return SampleRequest(
        prompt.prompt.token_ids,
        asked.samples,
        asked.temperature,
        asked.top_p if asked.temperature else 1.0,
        max_tokens,
        stop_ids,
        pictures=prompt.prompt.pictures,
    )


def is_due(asked: EvaluationConfig, version: int, last: int | None) -> bool:
    """Whether to evaluate `version`. last: the version of the evaluation before, None if there was none.

    If an evaluation becomes due while another one is running, it begins when that one has ended.
    """
    return last is None or version // asked.every > last // asked.every


def last_evaluated(folder: Path, version: int) -> int | None:
    """The version of the last evaluation up to `version`, None if there is none.

    Lines of later versions are removed from the file: a crash has undone their steps.
    """
    path = folder / FILE
    keep_lines(path, lambda line: line["policy_version"] <= version)
    return max((line["policy_version"] for line in read_jsonl(path)), default=None)


def accuracies(prompts: Sequence[EvaluatedPrompt], *, samples: int, threshold: float) -> dict[str, dict[str, Any]]:
    """The accuracy on each capability, in order of name, and on "all" prompts.

    samples: replies to each prompt. threshold: the least reward of a right reply. The entry of a capability has

    n          the number of prompts with a scored reply
    accuracy   the share of scored replies that are right, averaged over prompts; None if n is 0
    ci95       its interval: Wilson's for one reply to each prompt, otherwise a bootstrap over prompts
    unscored   the number of replies without a score
    episodes   of the scored replies that are episodes: their number n, and the means of their turns, tool_calls,
               malformed_calls and tool_failures; left out if there are none
    """
    names = sorted({prompt.capability for prompt in prompts})
    parts: Mapping[str, Sequence[EvaluatedPrompt]] = {
        **{name: [prompt for prompt in prompts if prompt.capability == name] for name in names},
        "all": prompts,
    }
    return {name: _accuracy(part, samples, threshold) for name, part in parts.items()}


def _accuracy(prompts: Sequence[EvaluatedPrompt], samples: int, threshold: float) -> dict[str, Any]:
    rewards = [known for prompt in prompts if (known := prompt.scored_rewards)]
    shares = [fmean(is_right(reward, threshold) for reward in known) for known in rewards]
    interval = None
    if shares:
        interval = wilson_ci95(sum(shares), len(shares)) if samples == 1 else bootstrap_ci95(shares, 0)
    return {
        "n": len(shares),
        "accuracy": fmean(shares) if shares else None,
        "ci95": interval and list(interval),
        "unscored": sum(prompt.rewards.count(None) for prompt in prompts),
        **_episode_means(prompts),
    }


def _episode_means(prompts: Sequence[EvaluatedPrompt]) -> dict[str, Any]:
    """The number of episodes and the means of their counts, as `eval` reports them; empty if there are none."""
    if not (number := sum(prompt.num_episodes for prompt in prompts)):
        return {}
    totals = map(sum, zip(*(prompt.episode_counts for prompt in prompts), strict=True))
    return {"episodes": {"n": number, **{name: t / number for name, t in zip(EPISODE_COUNTS, totals, strict=True)}}}


def evaluation_metrics(version: int, found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What an evaluation of a version found, as metrics of a step. found: of `accuracies`."""
    accuracy = {name: entry["accuracy"] for name, entry in found.items() if entry["accuracy"] is not None}
    metrics: dict[str, float] = {"evaluation/version": version}
    if "all" in accuracy:
        metrics["evaluation/accuracy"] = accuracy.pop("all")
    if len(accuracy) > 1:
        metrics |= {OF_CAPABILITY + name: value for name, value in accuracy.items()}
    means = found["all"].get("episodes", {})
    return metrics | {metric: means[name] for metric, name in EPISODE_MEANS.items() if name in means}
