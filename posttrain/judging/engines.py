"""The judge on vLLM engines of the stage.

    questions ─► chunks ─► the next engine (one constrained token each) ─► distribution over the labels ─► Verdict

The engine allows only the first token of each label, so nothing is parsed, and no text in a row can make the answer
anything else. An engine that is lost is replaced, and its chunk is sent to the next one.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.context import BusyLog, StageContext
from posttrain.errors import StageError, UserError
from posttrain.judging.config import JudgeQuestion
from posttrain.judging.prompts import Question
from posttrain.judging.verdicts import Undecided, Verdict, verdict_of
from posttrain.sampling.client import CHUNK_REQUESTS, Engines, attended, reason_of
from posttrain.sampling.faults import is_loss
from posttrain.sampling.requests import Completion, SampleRequest

TRIES = 3
BUSY = "judge"


class EngineJudge:
    """Rates on `engines`, which serve the judge's model. choice_ids: the first token of each label, in their order."""

    def __init__(self, engines: Engines, context: StageContext, config: JudgeQuestion, *, choice_ids: tuple[int, ...]):
        assert config.engine is not None
        self._engines = engines
        self._labels = config.labels
        self._choice_ids = choice_ids
        self._deadline_s = config.engine.deadline_s
        # Several chunks in flight an engine, so that it never waits for the next one.
        self._lanes = (max(1, config.engine.max_num_seqs // CHUNK_REQUESTS) + 1) * len(engines.names)
        self._sent = 0
        self._replacing = [asyncio.Lock() for _ in engines.names]
        self.logs = {name: BusyLog(context, name, BUSY) for name in engines.names}

    async def rate(
        self, questions: Sequence[Question], on_done: Callable[[int], None] | None = None
    ) -> list[Verdict | Undecided]:
        """An answer to each question, in order. Where no engine stays alive the rest is not asked."""
        found: list[Verdict | Undecided] = [Undecided("infrastructure", "was not asked")] * len(questions)
        starts = iter(range(0, len(questions), CHUNK_REQUESTS))
        finished, gone = 0, ""

        async def drain() -> None:
            nonlocal finished, gone
            for start in starts:
                chunk = questions[start : start + CHUNK_REQUESTS]
                if gone:
                    found[start : start + len(chunk)] = [Undecided("infrastructure", gone)] * len(chunk)
                    continue
                answers = await self._rate_chunk(chunk)
                found[start : start + len(chunk)] = answers
                if isinstance(first := answers[0], Undecided) and first.outcome == "infrastructure":
                    gone = first.reason
                finished += len(chunk)
                if on_done is not None:
                    on_done(finished)

        await asyncio.gather(*(drain() for _ in range(self._lanes)))
        return found

    async def _rate_chunk(self, chunk: Sequence[Question]) -> list[Verdict | Undecided]:
        requests = [SampleRequest(item.token_ids, max_tokens=1, choice_ids=self._choice_ids) for item in chunk]
        try:
            completions = await self._generate(requests)
        except Exception as error:
            if not (is_loss(error) or isinstance(error, UserError | StageError)):
                raise
            outcome = "error" if isinstance(error, UserError) else "infrastructure"
            return [Undecided(outcome, reason_of(error))] * len(chunk)
        return [read_choice(answer[0], self._labels, self._choice_ids) for answer in completions]

    async def _generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """The answers of whichever engine is next; raises what the last engine was lost by."""
        lost = 0
        while True:
            index = self._sent % len(self._engines.names)
            self._sent += 1
            place, began = list(self.logs)[index], time.time()
            async with self._replacing[index]:
                name, actor = self._engines.names[index], self._engines.actors[index]
            try:
                answers, _, _ = await attended(actor, actor.generate.remote(requests), self._deadline_s, name)
            except Exception as error:
                lost += 1
                if not is_loss(error) or lost == TRIES:
                    raise
                await self._replace(index, actor, error)
            else:
                self.logs[place].add(began, time.time())
                return answers

    async def _replace(self, index: int, lost: Any, cause: BaseException) -> None:
        """Another engine in the place of one; whoever was waiting for it too finds it replaced."""
        async with self._replacing[index]:
            if self._engines.actors[index] is lost:
                await self._engines.replace(index, cause)


def read_choice(answer: Completion, labels: Sequence[str], choice_ids: Sequence[int]) -> Verdict | Undecided:
    """The verdict of one constrained answer."""
    try:
        return verdict_of(labels, [answer.choice_logprobs.get(token, -math.inf) for token in choice_ids])
    except ValueError as error:
        return Undecided("error", f"the answer cannot be used: {error}")
