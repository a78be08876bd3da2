"""The `eval` stage: samples a policy's replies to held-out prompts, scores them, and writes rates with intervals.

    prompts ─► one greedy reply and n samples each (engines) ─► reward actor ─► results.json, samples.jsonl

Each request is scored as soon as its replies are sampled, and the progress counts what is scored.

Rows and replies lie on disk, so that memory does not grow with their number but for some bytes a prompt. Data, keys and
the reward are checked before an engine starts. Left out: comparing two policies, which the report and
`posttrain compare` do.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from posttrain.context import BusyLog, StageContext
from posttrain.data.chat import Messages, check_special_tokens
from posttrain.data.ends import note_added_end
from posttrain.data.images.modality import modality_of
from posttrain.data.images.render import for_template
from posttrain.data.images.section import image_reader, passing_reader, pictures_for
from posttrain.data.images.take import ImageReader
from posttrain.data.messages import messages_to_json
from posttrain.data.rows import store_rows
from posttrain.data.shown import Tools
from posttrain.data.stored import Stored
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.episodes.tools import check_environment_rows, row_tools
from posttrain.errors import StageError
from posttrain.eval.config import EvalConfig
from posttrain.eval.heldout import check_heldout
from posttrain.eval.replies import Asked, PromptReplies, ScoredReplies, by_prompt, eval_requests, flights
from posttrain.eval.results import results
from posttrain.files import write_json, write_jsonl
from posttrain.metrics.unscored import Unscored
from posttrain.model.tokenizer import load_tokenizer
from posttrain.records import Rollout, Row, Scored
from posttrain.sampling.client import Engines
from posttrain.sampling.groups import SampledGroups
from posttrain.sampling.scoring import ScoringProgress, score_each
from posttrain.scoring.plugins.lookup import RewardSpec, check_reward
from posttrain.scoring.plugins.requirements import check_fields
from posttrain.scoring.remote.client import RewardClient


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


def evaluate(config: EvalConfig, context: StageContext) -> Sequence[PromptReplies]:
    """The scored replies to every prompt, in the order of the data. Needs an initialised Ray session."""
    check_reward(config.reward.name, config.reward.args, python=config.reward.python or "")
    rows, asked = prepare(config, context)
    with ScoredReplies(len(asked), context.dir) as found:
        with Engines(context, config.model, config.engine, resources=config.resources.rollout) as engines:
            asyncio.run(_score(config, context, engines, asked=asked, found=found))
        prompts = by_prompt(rows, found.close(), config)
    report_unscored(prompts, config, context)
    return prompts


async def _score(
    config: EvalConfig, context: StageContext, engines: Engines, *, asked: Sequence[Asked], found: ScoredReplies
) -> None:
    """Have every request sampled and scored. found: takes the replies."""
    client, log = reward_client(config), BusyLog(context, "reward", "score")
    progress = ScoringProgress(context, len(asked), "requests", stats=lambda: client.stats, unscored=Unscored())

    async def score(pairs: Sequence[tuple[Rollout, Row]]) -> Sequence[Scored]:
        began = time.time()
        scores = await client.score(pairs)
        log.add(began, time.time())
        return scores

    await client.start()
    try:
        made = rollouter(config, context.seed)
        async with (
            made or contextlib.nullcontext(),
            SampledGroups(context, engines, config.engine, rollouter=made) as sampled,
            progress,
        ):
            await score_each(sampled, flights(asked), score, progress=progress, take=found.take)
    finally:
        await client.close()
        log.flush()


def prepare(config: EvalConfig, context: StageContext | None = None) -> tuple[Stored[Row], Sequence[Asked]]:
    """The held-out rows, and the requests for them. Raises DataError for a row that is wrong or not held out.

    context: of the stage, whose folder keeps the pictures of rows; None keeps none, and the requests for rows with
    pictures can then not be made later.
    """
    if context is not None:
        return _prepare(config, context, image_reader(config.images, context.dir))
    with passing_reader(config.images) as reader:
        return _prepare(config, None, reader)


def _prepare(
    config: EvalConfig, context: StageContext | None, reader: ImageReader | None
) -> tuple[Stored[Row], Sequence[Asked]]:
    rows = store_rows(config.data, kind="prompt", stage="eval", context=context, images=reader)
    check_fields(RewardSpec(config.reward.name, config.reward.args), check_environment_rows(config.environment, rows))
    if config.key_field is not None:
        check_heldout(rows, config.exclude, config.key_field)
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    note_added_end(tokenizer, context)
    check_special_tokens(tokenizer, config.data, _texts(config, rows))
    pictures = pictures_for(reader and reader.store, config.model.path, tokenizer)
    return rows, eval_requests(rows, tokenizer, config, pictures=pictures)


def _texts(config: EvalConfig, rows: Sequence[Row]) -> Iterator[tuple[str, Messages, Tools]]:
    return ((f"row {row.id!r}", for_template(row.messages), row_tools(config.environment, row) or None) for row in rows)


def rollouter(config: EvalConfig, seed: int) -> EnvironmentRollouter | None:
    """What makes the rollouts of rows with an environment; None if there is none."""
    if config.environment is None:
        return None
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    return EnvironmentRollouter(config.environment, tokenizer, length=config.engine.length, seed=seed)


def reward_client(config: EvalConfig) -> RewardClient:
    """The reward actor that scores, as in training: it is replaced when it is lost."""
    return RewardClient(config.reward, config.resources.reward)


def measure(prompts: Sequence[PromptReplies], config: EvalConfig, seed: int) -> dict[str, dict[str, Any]]:
    """The content of results.json."""
    return results(prompts, config.k, config.reward.correct_threshold, observe=config.observe, seed=seed)


def report_unscored(prompts: Iterable[PromptReplies], config: EvalConfig, context: StageContext) -> None:
    """Report how many prompts could not be scored, and why. Raises StageError if no reply has a score."""
    unscored = Unscored()
    for item in prompts:
        failed = [(reply.outcome, reply.reason) for reply in item.replies if reply.reward is None]
        unscored.add(item.row.id, failed, len(item.replies))
    unscored.tell(context, "evaluation", config.reward.alarm_fraction)
    if unscored.unscored == unscored.replies:
        most = unscored.most_frequent
        raise StageError(f"none of the {unscored.replies} replies could be scored; most often: {most}")


def _sample(item: PromptReplies) -> dict[str, Any]:
    """One line of samples.jsonl: the greedy reply, or the first sample where there is none, and all rewards."""
    reply = item.greedy or (item.samples[0] if item.samples else None)
    return {
        "id": item.row.id,
        "capability": item.row.capability,
        "modality": modality_of(item.row),
        "prompt": messages_to_json(item.row.messages),
        "answer": item.row.answer,
        "reply": reply.text if reply else None,
        "reward": reply.reward if reply else None,
        "reason": reply.note if reply else "",
        "truncated": reply.truncated if reply else None,
        "reply_tokens": reply.num_tokens if reply else None,
        "sample_rewards": [sample.reward for sample in item.samples],
    }


def _flat(found: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """The numbers of results.json as `capability/metric`, without intervals."""
    names = ("greedy", "pass@1", "pass@k", "truncated", "reply_tokens_mean", "unscored")
    return {f"{capability}/{name}": entry[name] for capability, entry in found.items() for name in names}
