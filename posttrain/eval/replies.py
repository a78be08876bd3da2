"""The requests to the policy, and its scored replies, gathered by prompt.

A reply that could not be scored has no reward. It is counted and left out of every rate; it does not count as wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.data.chat import render_row
from posttrain.data.ends import end_token_ids
from posttrain.data.strata import sampled_rows
from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.tools import row_renderer
from posttrain.errors import DataError
from posttrain.eval.config import EvalConfig
from posttrain.records import EPISODE_COUNTS, DrawnPrompt, FinishReason, Prompt, Rollout, Row, Scored
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight

GREEDY, SAMPLE = "greedy", "sample"


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. reward: None if it could not be scored. reason: the reward function's reason, or why there is no
    reward. episode: of an episode, its counts by the names in EPISODE_COUNTS; empty for a single turn."""

    text: str
    num_tokens: int
    truncated: bool
    reward: float | None
    reason: str = ""
    episode: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptReplies:
    """All replies to one prompt: the greedy reply, and independent samples."""

    row: Row
    greedy: Reply | None
    samples: tuple[Reply, ...]


def eval_requests(
    rows: Sequence[Row], tokenizer: Tokenizer, config: EvalConfig
) -> list[tuple[str, Row, SampleRequest]]:
    """The requests, each as (GREEDY or SAMPLE, row, request). Raises DataError for a prompt that leaves no room for a
    reply."""
    prompts = {row.id: _prompt_ids(row, tokenizer, config) for row in rows}
    stop = tuple(end_token_ids(tokenizer))
    drawn = config.sampling
    asked: list[tuple[str, Row, SampleRequest]] = []
    if config.samples:
        for row in sampled_rows(rows, config.pass_k_limit):
            request = SampleRequest(
                prompts[row.id],
                n=config.samples,
                temperature=drawn.temperature,
                top_p=drawn.top_p,
                max_tokens=drawn.max_tokens,
                stop_token_ids=stop,
            )
            asked.append((SAMPLE, row, request))
    if config.greedy:
        asked += [(GREEDY, row, SampleRequest(prompts[row.id], 1, 0.0, 1.0, drawn.max_tokens, stop)) for row in rows]
    return asked


def flights(asked: Sequence[tuple[str, Row, SampleRequest]]) -> list[Flight]:
    """The requests as groups of rollouts to sample, in order."""
    return [
        Flight(order, 0, DrawnPrompt(row, None, Prompt(row.messages, request.prompt_ids)), request)
        for order, (_, row, request) in enumerate(asked)
    ]


def by_prompt(
    rows: Sequence[Row], asked: Sequence[tuple[str, Row, SampleRequest]], pairs: Sequence[tuple[Rollout, Row]],
    *, scores: Sequence[Scored],
) -> list[PromptReplies]:  # fmt: skip
    """Gather scored rollouts by prompt, in the order of `rows`. Every row gets an entry."""
    greedy: dict[str, Reply] = {}
    samples: dict[str, list[Reply]] = {row.id: [] for row in rows}
    kinds = [kind for kind, _, request in asked for _ in range(request.n)]
    for kind, (rollout, row), scored in zip(kinds, pairs, scores, strict=True):
        reply = _reply(rollout, scored)
        if kind == GREEDY:
            greedy[row.id] = reply
        else:
            samples[row.id].append(reply)
    return [PromptReplies(row, greedy.get(row.id), tuple(samples[row.id])) for row in rows]


def _reply(rollout: Rollout, scored: Scored) -> Reply:
    result = scored.result
    is_episode = rollout.scored is not None and result is not None
    return Reply(
        text=rollout.text,
        num_tokens=rollout.num_sampled,
        truncated=rollout.finish_reason == FinishReason.LENGTH,
        reward=None if result is None else result.value,
        reason=scored.reason or f"unscored: {scored.outcome}" if result is None else result.reason,
        episode={name: result.parts.get(name, 0.0) for name in EPISODE_COUNTS} if is_episode and result else {},
    )


def _prompt_ids(row: Row, tokenizer: Tokenizer, config: EvalConfig) -> tuple[int, ...]:
    ids = render_row(row_renderer(tokenizer, config.environment), row)
    room = config.engine.length - len(ids)
    if room < config.sampling.max_tokens:
        raise DataError(
            f"row {row.id}: its prompt has {len(ids)} tokens, which with sampling.max_tokens "
            f"{config.sampling.max_tokens} is more than engine.max_model_len {config.engine.length}; "
            "raise engine.max_model_len, lower sampling.max_tokens, or remove the row"
        )
    return ids
