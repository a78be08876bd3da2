"""The judge at a server that speaks the chat completions protocol of OpenAI.

    questions ─► at most `concurrency` requests at a time, each with its retries ─► Verdict or Undecided

A server that is out of service must not be asked about every row of a large dataset, each with all of its retries. So
when `concurrency` questions in a row have failed for good, `rate` does not ask the other questions.
"""

import asyncio
import time
from collections.abc import Sequence

import openai

from posttrain.context import BusyLog, StageContext
from posttrain.data.images.references import data_url
from posttrain.judging.config import EndpointConfig
from posttrain.judging.forms import Form, read_answer, request_body
from posttrain.judging.prompts import Question
from posttrain.judging.requests import complete, is_outage, make_client, why
from posttrain.judging.verdicts import NOT_ASKED, Answer, OnAnswer, Undecided
from posttrain.records import Outcome

NAME = "judge endpoint"
BUSY = "judge"


class EndpointJudge:
    """Rates at `endpoint`, with requests in the form that `preflight.choose_form` found."""

    def __init__(self, endpoint: EndpointConfig, labels: Sequence[str], form: Form, *, context: StageContext):
        self._endpoint = endpoint
        self._labels = labels
        self._form = form
        self._client: openai.AsyncOpenAI
        self._seats: asyncio.Semaphore
        self.logs = {NAME: BusyLog(context, NAME, BUSY)}

    async def start(self) -> None:
        """Begin to work in the current event loop. The client's connections then belong to it."""
        self._client = make_client(self._endpoint)
        self._seats = asyncio.Semaphore(self._endpoint.concurrency)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
        self.logs[NAME].flush()

    async def rate(self, questions: Sequence[Question], on_answer: OnAnswer | None = None) -> list[Answer]:
        """An answer to each question, in order; see `JudgeBackend`."""
        found: list[Answer] = [Undecided(Outcome.INFRASTRUCTURE, NOT_ASKED)] * len(questions)
        todo = iter(enumerate(questions))
        given_up = 0  # in a row

        async def drain() -> None:
            nonlocal given_up
            for index, question in todo:
                async with self._seats:
                    if given_up >= self._endpoint.concurrency:
                        return
                    answer = await self._rate_one(question)
                found[index] = answer
                is_out = isinstance(answer, Undecided) and answer.outcome is Outcome.INFRASTRUCTURE
                given_up = given_up + 1 if is_out else 0
                if on_answer is not None:
                    on_answer(index, answer)

        await asyncio.gather(*(drain() for _ in range(min(self._endpoint.concurrency, len(questions)))))
        return found

    async def _rate_one(self, question: Question) -> Answer:
        endpoint, began = self._endpoint, time.time()
        body = request_body(
            self._form,
            endpoint.model,
            question.text,
            labels=self._labels,
            top_logprobs=endpoint.top_logprobs,
            pictures=[data_url(reference) for reference in question.pictures],
        )
        try:
            answer = await complete(self._client, endpoint, body)
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            return Undecided(Outcome.INFRASTRUCTURE if is_outage(error) else Outcome.ERROR, why(error, endpoint))
        self.logs[NAME].add(began, time.time())
        return read_answer(answer, self._form, self._labels)
