"""The `eval` stage: samples a policy's replies to held-out prompts, scores them, and writes rates with intervals.

    prompts ─► one greedy reply and n samples each (engines) ─► reward processes ─► results.json, samples.jsonl

Data, keys and the reward are checked before an engine starts. Left out: comparing two policies; the report does that.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.context import StageContext
from posttrain.data.chat import check_special_tokens
from posttrain.data.ends import note_added_end
from posttrain.data.messages import messages_to_json
from posttrain.data.rows import load_rows
from posttrain.errors import StageError
from posttrain.eval.config import EvalConfig
from posttrain.eval.heldout import check_heldout
from posttrain.eval.replies import PromptReplies, by_prompt, eval_requests, flights
from posttrain.eval.results import results
from posttrain.files import write_json, write_jsonl
from posttrain.model.load import load_tokenizer
from posttrain.records import Row, Scored
from posttrain.sampling.client import Engines
from posttrain.sampling.groups import sample_groups
from posttrain.sampling.requests import SampleRequest
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward
from posttrain.scoring.plugins.requirements import check_fields
from posttrain.scoring.pool.pool import RewardPool


def run(config: EvalConfig, context: StageContext) -> dict[str, Any]:
    """Measure the policy. Returns {"results": path, "samples": path, "stats": the entry of all capabilities}.

    Raises UserError for data, keys or a reward that are wrong, and StageError if not one reply could be scored.
    """
    started = time.time()
    prompts = evaluate(config, context)
    found = measure(prompts, config, context.seed)
    paths = {"results": context.dir / "results.json", "samples": context.dir / "samples.jsonl"}
    write_jsonl(paths["samples"], (_sample(item) for item in prompts))
    write_json(paths["results"], found)
    context.metrics(0, {**_flat(found), "wall_s": time.time() - started})
    return {**{name: str(path) for name, path in paths.items()}, "stats": found["all"]}


def evaluate(config: EvalConfig, context: StageContext) -> list[PromptReplies]:
    """The scored replies to every prompt, in the order of the data. Needs an initialised Ray session."""
    check_reward(config.reward.name, config.reward.args)
    rows, asked = prepare(config, context)
    groups = flights(asked)
    with Engines(context, config.model, config.engine, resources=config.resources.rollout) as engines:
        sample_groups(context, engines, config.engine, flights=groups, on_done=_reporter(context, len(groups)))
    pairs = [(rollout, group.prompt.row) for group in groups for rollout in group.rollouts]
    began = time.time()
    scores = reward_pool(config).score_all(pairs)
    context.busy("reward", "score", start=began, end=time.time())
    _report_unscored(scores, context)
    return by_prompt(rows, asked, pairs, scores=scores)


def prepare(
    config: EvalConfig, context: StageContext | None = None
) -> tuple[list[Row], list[tuple[str, Row, SampleRequest]]]:
    """The held-out rows, and what to ask about them. Raises DataError for a row that is wrong or not held out."""
    rows = load_rows(config.data, kind="prompt", stage="eval", context=context)
    check_fields(RewardSpec(config.reward.name, config.reward.args), rows)
    if config.key_field is not None:
        check_heldout(rows, config.exclude, config.key_field)
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    note_added_end(tokenizer, context)
    check_special_tokens(tokenizer, config.data, ((f"row {row.id!r}", row.messages, None) for row in rows))
    return rows, eval_requests(rows, tokenizer, config)


def reward_pool(config: EvalConfig) -> RewardPool:
    """The killable processes that score."""
    reward = config.reward
    return RewardPool(RewardSpec(reward.name, reward.args), reward.workers, reward.timeout_s)


def measure(prompts: Sequence[PromptReplies], config: EvalConfig, seed: int) -> dict[str, dict[str, Any]]:
    """The content of results.json."""
    return results(prompts, config.k, config.reward.correct_threshold, observe=config.observe, seed=seed)


def _report_unscored(scores: Sequence[Scored], context: StageContext) -> None:
    """Say how many replies could not be scored and why; if none could, the reward is broken and the stage fails."""
    reasons = Counter(f"{scored.outcome}: {scored.reason}" for scored in scores if scored.result is None)
    if not reasons:
        return
    count = sum(reasons.values())
    context.event("unscored", count=count, total=len(scores), reasons=dict(reasons.most_common(5)))
    if count == len(scores):
        raise StageError(f"none of the {count} replies could be scored; most often: {reasons.most_common(1)[0][0]}")


def _sample(item: PromptReplies) -> dict[str, Any]:
    """One line of samples.jsonl: the greedy reply, or the first sample where there is none, and all rewards."""
    reply = item.greedy or (item.samples[0] if item.samples else None)
    return {
        "id": item.row.id,
        "capability": item.row.capability,
        "prompt": messages_to_json(item.row.messages),
        "answer": item.row.answer,
        "reply": reply.text if reply else None,
        "reward": reply.reward if reply else None,
        "reason": reply.reason if reply else "",
        "truncated": reply.truncated if reply else None,
        "reply_tokens": reply.num_tokens if reply else None,
        "sample_rewards": [sample.reward for sample in item.samples],
    }


def _flat(found: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """The numbers of results.json as `capability/metric`, without intervals."""
    names = ("greedy", "pass@1", "pass@k", "truncated", "reply_tokens_mean", "unscored")
    return {f"{capability}/{name}": entry[name] for capability, entry in found.items() for name in names}


def _reporter(context: StageContext, total: int) -> Callable[[int], None]:
    return lambda done: context.progress(done, total, "requests")
