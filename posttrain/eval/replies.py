"""The requests to the policy, and its scored replies, gathered by prompt.

A reply that could not be scored has no reward. It is counted and left out of every rate; it does not count as wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from posttrain.data.chat import RenderRow, render_row
from posttrain.data.ends import end_token_ids
from posttrain.data.images.render import Pictures, prompt_of
from posttrain.data.stored import Derived, StoreWriter
from posttrain.data.strata import sampled_places
from posttrain.data.tokenizer import Tokenizer
from posttrain.episodes.tools import row_renderer
from posttrain.errors import DataError
from posttrain.eval.config import EvalConfig
from posttrain.records import EPISODE_COUNTS, DrawnPrompt, FinishReason, Media, Outcome, Prompt, Rollout, Row, Scored
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight

GREEDY, SAMPLE = "greedy", "sample"


class Reply(Struct, frozen=True):
    """One reply. reward: None if it could not be scored; outcome then says how it failed. reason: the reward function's
    reason, or why there is no reward. episode: of an episode, its counts by the names in EPISODE_COUNTS; empty for a
    single turn."""

    text: str
    num_tokens: int
    truncated: bool
    reward: float | None
    reason: str = ""
    outcome: Outcome = Outcome.SCORED
    episode: Mapping[str, float] = {}  # a new one for each record

    @property
    def note(self) -> str:
        """The reason; of a reply without a reward and a reason, the outcome."""
        return self.reason or ("" if self.reward is not None else f"unscored: {self.outcome}")


@dataclass(frozen=True, slots=True)
class PromptReplies:
    """All replies to one prompt: the greedy reply, and independent samples."""

    row: Row
    greedy: Reply | None
    samples: tuple[Reply, ...]

    @property
    def replies(self) -> tuple[Reply, ...]:
        """All replies."""
        return self.samples if self.greedy is None else (self.greedy, *self.samples)


Asked = tuple[str, Row, SampleRequest]


def eval_requests(
    rows: Sequence[Row], tokenizer: Tokenizer, config: EvalConfig, *, pictures: Pictures | None = None
) -> Sequence[Asked]:
    """The requests, each as (GREEDY or SAMPLE, row, request), made when it is asked for: first the samples, then the
    greedy replies. Raises DataError for a prompt that leaves no room for a reply.

    pictures: those of the rows; None for rows of text."""
    render, store = row_renderer(tokenizer, config.environment, pictures), pictures and pictures.store
    for row in rows:
        _prompt_ids(row, render, config)
    stop = tuple(end_token_ids(tokenizer))
    drawn = config.sampling
    places = sampled_for(rows, config)

    def asked(number: int) -> Asked:
        kind = SAMPLE if number < len(places) else GREEDY
        row = rows[int(places[number]) if kind == SAMPLE else number - len(places)]
        n, temperature, top_p = (config.samples, drawn.temperature, drawn.top_p) if kind == SAMPLE else (1, 0.0, 1.0)
        prompt = prompt_of(row.messages, _prompt_ids(row, render, config), store)
        request = SampleRequest(
            prompt.token_ids,
            n,
            temperature,
            top_p,
            drawn.max_tokens,
            stop,
            pictures=prompt.pictures,
        )
        return kind, row, request

    return Derived(range(len(places) + len(rows) * config.greedy), asked)


def sampled_for(rows: Sequence[Row], config: EvalConfig) -> "Sequence[int] | np.ndarray":
    """The places of the rows for which replies are sampled."""
    return sampled_places(rows, config.pass_k_limit) if config.samples else ()


def flights(asked: Sequence[Asked]) -> Iterator[Flight]:
    """The requests as groups of rollouts to sample, in order."""
    for order, (_, row, request) in enumerate(asked):
        prompt = Prompt(row.messages, request.prompt_ids, tuple(map(Media, request.pictures)))
        yield Flight(order, 0, DrawnPrompt(row, None, prompt), request)


class ScoredReplies:
    """Takes the scored replies to `number` requests in any order, and keeps them in a file in `folder`.

    The file is deleted if an error ends the context.
    """

    def __init__(self, number: int, folder: Path | None):
        self._writer = StoreWriter[tuple[Reply, ...]](tuple[Reply, ...], folder)
        self._places = np.full(number, -1, np.int64)

    def __enter__(self) -> "ScoredReplies":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._writer.__exit__(*raised)

    def take(self, flight: Flight, scores: Sequence[Scored]) -> None:
        """Take the replies to one request."""
        self._places[flight.order] = len(self._writer)
        self._writer.append(tuple(map(reply_of, flight.rollouts, scores)))

    def close(self) -> Sequence[tuple[Reply, ...]]:
        """The replies to each request, in order of the requests."""
        return self._writer.close().take(self._places)


def by_prompt(
    rows: Sequence[Row], replies: Sequence[tuple[Reply, ...]], config: EvalConfig
) -> Derived[int, PromptReplies]:
    """The replies by prompt, in the order of `rows`. Every row gets an entry. replies: to each of `eval_requests`."""
    places = sampled_for(rows, config)
    number_N = np.full(len(rows), -1, np.int64)  # of the request for samples
    number_N[np.asarray(places, np.int64)] = np.arange(len(places))

    def gathered(place: int) -> PromptReplies:
        greedy = replies[len(places) + place][0] if config.greedy else None
        number = int(number_N[place])
        return PromptReplies(rows[place], greedy, tuple(replies[number]) if number >= 0 else ())

    return Derived(range(len(rows)), gathered)


def reply_of(rollout: Rollout, scored: Scored) -> Reply:
    """A scored rollout as it is reported."""
    result = scored.result
    is_episode = rollout.scored is not None and result is not None
    return Reply(
        text=rollout.text,
        num_tokens=rollout.num_sampled,
        truncated=rollout.finish_reason == FinishReason.LENGTH,
        reward=None if result is None else result.value,
        reason=scored.reason if result is None else result.reason,
        outcome=scored.outcome,
        episode={name: result.parts.get(name, 0.0) for name in EPISODE_COUNTS} if is_episode and result else {},
    )


def _prompt_ids(row: Row, render: RenderRow, config: EvalConfig) -> tuple[int, ...]:
    ids = render_row(render, row)
    room = config.engine.length - len(ids)
    if room < config.sampling.max_tokens:
        raise DataError(
            f"row {row.id}: its prompt has {len(ids)} tokens, which with sampling.max_tokens "
            f"{config.sampling.max_tokens} is more than engine.max_model_len {config.engine.length}; "
            "raise engine.max_model_len, lower sampling.max_tokens, or remove the row"
        )
    return ids
