"""The judge at a server that speaks the chat completions protocol of OpenAI.

    questions ─► `concurrency` lanes ─► one request each, with its retries ─► Verdict or Undecided

A server that is out of service must not be asked about every row of a large dataset, each with all of its retries.
When as many questions in a row as there are lanes were given up, the rest of the call is not asked.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import openai

from posttrain.context import BusyLog, StageContext
from posttrain.judging.config import EndpointConfig
from posttrain.judging.forms import Form, read_answer, request_body
from posttrain.judging.prompts import Question
from posttrain.judging.requests import complete, is_outage, make_client, why
from posttrain.judging.verdicts import Undecided, Verdict
from posttrain.records import Outcome

NAME = "judge endpoint"
BUSY = "judge"


class EndpointJudge:
    """Rates at `endpoint`, asking in the form that `preflight.choose_form` found."""

    def __init__(self, endpoint: EndpointConfig, labels: Sequence[str], form: Form, *, context: StageContext):
        self._endpoint = endpoint
        self._labels = labels
        self._form = form
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: openai.AsyncOpenAI | None = None
        self._seats = asyncio.Semaphore(endpoint.concurrency)
        self._num_calls = 0  # of `rate`, in progress
        self.logs = {NAME: BusyLog(context, NAME, BUSY)}

    async def rate(
        self, questions: Sequence[Question], on_done: Callable[[int], None] | None = None
    ) -> list[Verdict | Undecided]:
        """An answer to each question, in order. on_done: called with the number of questions that are finished."""
        client = self._client_of_this_loop()
        found: list[Verdict | Undecided] = [Undecided(Outcome.INFRASTRUCTURE, "was not asked")] * len(questions)
        todo = iter(enumerate(questions))
        finished, given_up = 0, 0

        async def drain() -> None:
            nonlocal finished, given_up
            for index, question in todo:
                async with self._seats:
                    if given_up >= self._endpoint.concurrency:
                        return
                    answer = await self._rate_one(client, question)
                found[index] = answer
                is_out = isinstance(answer, Undecided) and answer.outcome is Outcome.INFRASTRUCTURE
                given_up = given_up + 1 if is_out else 0
                finished += 1
                if on_done is not None:
                    on_done(finished)

        self._num_calls += 1
        try:
            await asyncio.gather(*(drain() for _ in range(min(self._endpoint.concurrency, len(questions)))))
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self.logs[NAME].flush()
        return found

    async def _rate_one(self, client: openai.AsyncOpenAI, question: Question) -> Verdict | Undecided:
        endpoint, began = self._endpoint, time.time()
        body = request_body(
            self._form, endpoint.model, question.text, labels=self._labels, top_logprobs=endpoint.top_logprobs
        )
        try:
            answer = await complete(client, endpoint, body)
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            return Undecided(Outcome.INFRASTRUCTURE if is_outage(error) else Outcome.ERROR, why(error, endpoint))
        self.logs[NAME].add(began, time.time())
        return read_answer(answer, self._form, self._labels)

    def _client_of_this_loop(self) -> openai.AsyncOpenAI:
        """The client. Its connections belong to an event loop, and RL has one for the profile and one for training."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._loop, self._client = loop, make_client(self._endpoint)
            self._seats = asyncio.Semaphore(self._endpoint.concurrency)
        return self._client
