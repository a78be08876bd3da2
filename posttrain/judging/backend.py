"""The protocol of a judge, `JudgeBackend`, and the choice between its two implementations by the config.

prepared = prepare_judge(config)                        # checks labels, tokenizer or endpoint; starts nothing
questions = [prepared.prompts.render(row) for row in rows]
with open_judge(prepared, context, resources) as judge:
    answers = rate_all(judge, questions)                # a Verdict or an Undecided for each, in order
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from posttrain.config.resources import ActorResources
from posttrain.context import BusyLog, StageContext
from posttrain.data.images.store import ImageStore
from posttrain.judging.config import EndpointConfig, JudgeQuestion
from posttrain.judging.forms import Form
from posttrain.judging.prompts import JudgePrompts, Question, judge_prompts
from posttrain.judging.verdicts import Answer, OnAnswer


class JudgeBackend(Protocol):
    """A running judge, which answers questions about rows: on engines of the stage or at an endpoint.

    Between `start` and `close` it works in one event loop. Afterwards it may be started again in another. logs: when
    each engine or endpoint was busy, by its name, for the timeline of the report.
    """

    @property
    def logs(self) -> Mapping[str, BusyLog]:
        """When each engine or endpoint was busy, by its name."""
        ...

    async def start(self) -> None:
        """Begin to work in the current event loop."""
        ...

    async def rate(self, questions: Sequence[Question], on_answer: OnAnswer | None = None) -> list[Answer]:
        """An answer to each question, in order. Any number of calls may run at the same time.

        on_answer: called with the index of a question and its answer, as soon as the answer has arrived. It is not
        called for a question that was not asked.
        """
        ...

    async def close(self) -> None:
        """End what `start` began. No call of `rate` may be in progress."""
        ...


@dataclass(frozen=True)
class PreparedJudge:
    """A judge that has been checked but not started. form: the form of an endpoint's requests; None for engines."""

    config: JudgeQuestion
    prompts: JudgePrompts
    form: Form | None


def prepare_judge(config: JudgeQuestion, store: ImageStore | None = None) -> PreparedJudge:
    """Check a judge before anything heavy starts. store: as for `JudgePrompts`.

    Raises UserError for labels that the tokenizer cannot tell apart, for a model folder that takes no pictures if it is
    to be shown some, and for an endpoint that is down, does not serve the model, or refuses the key.
    """
    prompts, form = judge_prompts(config, store), None
    if isinstance(config.source, EndpointConfig):
        from posttrain.judging.preflight import choose_form

        form = asyncio.run(choose_form(config.source, config.labels))
    return PreparedJudge(config, prompts, form)


@contextmanager
def open_judge(
    prepared: PreparedJudge, context: StageContext, resources: ActorResources | None
) -> Iterator[JudgeBackend]:
    """The backend of a judge. resources: those of its engines, which need an initialised Ray session."""
    config, source = prepared.config, prepared.config.source
    if isinstance(source, EndpointConfig):
        from posttrain.judging.endpoint import EndpointJudge

        assert prepared.form is not None
        context.event("judge_endpoint", base_url=source.base_url, model=source.model, form=prepared.form.name)
        yield EndpointJudge(source, config.labels, prepared.form, context=context)
        return
    from posttrain.judging.engines import BUSY, EngineJudge
    from posttrain.sampling.client import Engines

    assert config.engine is not None  # both are checked by the schemas
    assert resources is not None
    with Engines(context, source, config.engine, resources=resources, activity=BUSY) as engines:
        yield EngineJudge(
            engines, config.engine, config.labels, choice_ids=prepared.prompts.choice_ids, context=context
        )


def rate_all(judge: JudgeBackend, questions: Sequence[Question], on_answer: OnAnswer | None = None) -> list[Answer]:
    """Start the judge, let it rate all questions, and close it. For callers without an event loop."""

    async def rate() -> list[Answer]:
        await judge.start()
        try:
            return await judge.rate(questions, on_answer)
        finally:
            await judge.close()

    return asyncio.run(rate())
