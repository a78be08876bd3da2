"""Episodes whose environments run in real processes, while the test plays the policy."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout_records import drawn

from posttrain.config.environments import EnvironmentConfig
from posttrain.data.ends import end_token_ids
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.episodes.tools import row_renderer
from posttrain.records import FinishReason, Message, Rollout, Row, VersionSpan
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.running import RunningRollouters
from posttrain.sampling.turns import Turn

Says = Callable[[Turn], str]
LENGTH = 512


def question(row_id: str, text: str = "a question", **fields: Any) -> Row:
    """A row of one user turn."""
    return Row(row_id, fields.pop("capability", "tools"), (Message("user", text),), fields.pop("answer", "4"), fields)


def completion(tokenizer: Any, text: str, max_tokens: int = 10_000) -> Completion:
    """A turn with this text and the token that ends it, or its first tokens."""
    ids = (*tokenizer.encode(text, add_special_tokens=False), end_token_ids(tokenizer)[0])[:max_tokens]
    reason = FinishReason.STOP if ids[-1] in end_token_ids(tokenizer) else FinishReason.LENGTH
    said = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(ids, said, (-0.5,) * len(ids), reason, (VersionSpan(0, 0, len(ids)),))


def play(
    tokenizer: Any,
    environment: Mapping[str, Any],
    rows: Sequence[Row],
    says: Says,
    *,
    length: int = LENGTH,
    group: int = 1,
    max_tokens: int = 64,
    beside: Callable[[EnvironmentRollouter], Any] | None = None,
) -> dict[str, tuple[Rollout, ...]]:
    """The rollouts by row. says: what the policy says in a turn. beside: a coroutine function that runs meanwhile."""
    config = EnvironmentConfig.model_validate(environment)

    async def run() -> dict[str, tuple[Rollout, ...]]:
        found: dict[str, tuple[Rollout, ...]] = {}
        done = asyncio.Event()

        def asked(turns: list[Turn]) -> None:
            for turn in turns:
                turn.finish(completion(tokenizer, says(turn), turn.request.max_tokens), 7.0)
                running.can_go_on(turn.session)

        def finished(flight: Flight) -> None:
            found[flight.prompt.row.id] = flight.rollouts
            if len(found) == len(rows):
                done.set()

        async with EnvironmentRollouter(config, tokenizer, length=length, seed=3) as rollouter:
            running = RunningRollouters(rollouter, asked=asked, finished=finished)
            for order, row in enumerate(rows):
                ids = tuple(row_renderer(tokenizer, config)(row, row.messages))
                request = SampleRequest(
                    ids, group, max_tokens=max_tokens, stop_token_ids=(end_token_ids(tokenizer)[0],)
                )
                running.start(Flight(order, 0, drawn(row, row.messages, ids), request))
            waiting = [asyncio.ensure_future(done.wait()), asyncio.ensure_future(running.raise_failure())]
            if beside is not None:
                await beside(rollouter)
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in waiting:
                one.cancel()
            if waiting[1].done() and not waiting[1].cancelled() and waiting[1].exception():
                waiting[1].result()
        return found

    return asyncio.run(run())


# How the Hermes family writes tools, calls and results, with the quick start's tokens.
HERMES = """{{- bos_token }}
{%- if tools %}
    {{- '<|header_start|>system<|header_end|>\\n\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|eot|>' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|header_start|>' + m.role + '<|header_end|>\\n\\n' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
        {{- '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""
