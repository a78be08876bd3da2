"""The judge on vLLM engines of the stage: one constrained token a question.

The engine allows only the first token of each label, so nothing is parsed, and no text in a row can make the answer
anything else. An engine that is lost is replaced by `Engines`, and what it was asked is asked again.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from posttrain.actors.losses import is_loss, reason_of
from posttrain.context import BusyLog
from posttrain.errors import StageError
from posttrain.judging.prompts import Question
from posttrain.judging.verdicts import Undecided, Verdict, verdict_of
from posttrain.records import Outcome
from posttrain.sampling.client import Engines
from posttrain.sampling.requests import Completion, SampleRequest

BUSY = "judge"


class EngineJudge:
    """Rates on `engines`, which serve the judge's model. choice_ids: the first token of each label, in their order."""

    def __init__(self, engines: Engines, labels: Sequence[str], choice_ids: tuple[int, ...]):
        self._engines = engines
        self._labels = labels
        self._choice_ids = choice_ids

    @property
    def logs(self) -> Mapping[str, BusyLog]:
        """When each engine worked, by its name."""
        return self._engines.logs

    async def rate(
        self, questions: Sequence[Question], on_done: Callable[[int], None] | None = None
    ) -> list[Verdict | Undecided]:
        """An answer to each question, in order. Where no engine stays alive, all of them are undecided."""
        requests = [SampleRequest(item.token_ids, max_tokens=1, choice_ids=self._choice_ids) for item in questions]
        try:
            completions = await self._engines.sample(requests, on_done)
        except Exception as error:
            if not (is_loss(error) or isinstance(error, StageError)):
                raise
            return [Undecided(Outcome.INFRASTRUCTURE, reason_of(error))] * len(questions)
        return [read_choice(answer[0], self._labels, self._choice_ids) for answer in completions]


def read_choice(answer: Completion, labels: Sequence[str], choice_ids: Sequence[int]) -> Verdict | Undecided:
    """The verdict of one constrained answer."""
    try:
        return verdict_of(labels, [answer.choice_logprobs.get(token, -math.inf) for token in choice_ids])
    except ValueError as error:
        return Undecided(Outcome.ERROR, f"the answer cannot be used: {error}")
