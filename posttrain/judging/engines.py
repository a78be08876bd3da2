"""The judge on vLLM engines of the stage: one constrained token a question.

    questions ─► one group of one rollout each ─► the workers of sampling/workers.py ─► the chosen token ─► Verdict

The engine allows only the first token of each label. So nothing is parsed, and no text in a row can lead to any other
answer. The workers are those that sample a policy's replies: an engine that is lost is replaced, and its questions are
asked again.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack

from posttrain.actors.losses import is_loss, reason_of
from posttrain.config.engines import EngineConfig
from posttrain.context import BusyLog, StageContext
from posttrain.errors import StageError
from posttrain.judging.prompts import Question
from posttrain.judging.verdicts import Answer, OnAnswer, Undecided, verdict_of
from posttrain.records import DrawnPrompt, Outcome, Prompt, Rollout, Row
from posttrain.sampling.client import Engines
from posttrain.sampling.groups import SampledGroups
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.sampling.rollouter import Flight, Session

BUSY = "judge"


class EngineJudge:
    """Rates on `engines`, which serve the judge's model.

    engine: the settings of the engines. choice_ids: the first token of each label, in the order of the labels.
    """

    def __init__(
        self,
        engines: Engines,
        engine: EngineConfig,
        labels: Sequence[str],
        *,
        choice_ids: tuple[int, ...],
        context: StageContext,
    ):
        self._engines = engines
        self._engine = engine
        self._labels = labels
        self._choice_ids = choice_ids
        self._context = context
        self._orders = itertools.count()
        self._waiting: dict[int, Callable[[Completion], None]] = {}  # order of a flight -> receiver of its answer
        self._serving = AsyncExitStack()
        self._sampled: SampledGroups

    @property
    def logs(self) -> Mapping[str, BusyLog]:
        """When each engine worked, by its name."""
        return self._engines.logs

    async def start(self) -> None:
        """Begin to work in this event loop."""
        self._sampled = await self._serving.enter_async_context(
            SampledGroups(self._context, self._engines, self._engine, rollouter=self)
        )

    async def close(self) -> None:
        """Stop using the engines, so that another caller can use them."""
        await self._serving.aclose()

    async def rate(self, questions: Sequence[Question], on_answer: OnAnswer | None = None) -> list[Answer]:
        """An answer to each question, in order; see `JudgeBackend`. If no engine stays alive, the remaining questions
        are undecided."""
        answers: dict[int, Answer] = {}

        def take(index: int, completion: Completion) -> None:
            answers[index] = read_choice(completion, self._labels, self._choice_ids)
            if on_answer is not None:
                on_answer(index, answers[index])

        reason = ""
        try:
            await self._sampled.groups(self._flights(questions, take))
        except Exception as error:
            if not (is_loss(error) or isinstance(error, StageError)):
                raise
            reason = reason_of(error)
        return [answers.get(index) or Undecided(Outcome.INFRASTRUCTURE, reason) for index in range(len(questions))]

    async def run(self, prompt: Prompt, session: Session) -> Rollout:
        """The rollouter of the judge's workers: sample one token, and give it to the caller that asked the question."""
        completion = await session.sample()
        self._waiting.pop(session.flight.order)(completion)
        return session.rollout()

    def _flights(self, questions: Sequence[Question], take: Callable[[int, Completion], None]) -> Iterator[Flight]:
        """Each question as a group of one rollout, made when an engine has a place for it."""
        for index, question in enumerate(questions):
            order = next(self._orders)
            self._waiting[order] = lambda completion, index=index: take(index, completion)
            request = SampleRequest(
                question.token_ids, max_tokens=1, choice_ids=self._choice_ids, pictures=question.pictures
            )
            prompt = DrawnPrompt(Row(question.row_id, "", ()), None, Prompt((), question.token_ids))
            yield Flight(order, 0, prompt, request)


def read_choice(answer: Completion, labels: Sequence[str], choice_ids: Sequence[int]) -> Answer:
    """The verdict of one constrained answer."""
    try:
        return verdict_of(labels, [answer.choice_logprobs.get(token, -math.inf) for token in choice_ids])
    except ValueError as error:
        return Undecided(Outcome.ERROR, f"the answer cannot be used: {error}")
