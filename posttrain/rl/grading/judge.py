"""The judge of an RL stage: it rates every reply before the reward function sees it.

    (rollout, row) ─► question ─► judge (engines or an endpoint) ─► row with the field "judge" ─► reward function

The row that the reward function gets has a field `judge`: the likeliest label, the expected place among the labels in
[0, 1], and the probability of each label (see `Verdict.to_json`). The reward `judged` returns the expected place. A
reward function of yours may use all of them. A reply without a verdict has no score, which is not a reward of 0.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from msgspec.structs import replace

from posttrain.config.resources import RewardResources
from posttrain.config.rewards import RewardConfig
from posttrain.context import BusyLog
from posttrain.errors import UserError
from posttrain.judging.backend import JudgeBackend, PreparedJudge
from posttrain.judging.prompts import Question
from posttrain.judging.verdicts import Undecided, Verdict
from posttrain.records import Message, Outcome, Row, Scored
from posttrain.rl.grading.config import GradingConfig
from posttrain.rl.grading.verifiers import JUDGE_FIELD, reward_config
from posttrain.scoring.remote.client import RewardClient, TakeScores, score_together
from posttrain.scoring.remote.messages import Pair

Score = Callable[[Sequence[Pair]], Awaitable[Sequence[Scored]]]


class Judge:
    """Rates replies with `backend`, and then has the reward function score them."""

    def __init__(self, prepared: PreparedJudge, backend: JudgeBackend):
        self._prompts = prepared.prompts
        self._name = prepared.config.judge_name
        self._backend = backend
        self._rendering = threading.Lock()  # a tokenizer must not be used by two threads at once

    @property
    def logs(self) -> Mapping[str, BusyLog]:
        """The busy times of the judge, by the name of each engine or endpoint."""
        return self._backend.logs

    async def start(self) -> None:
        """Begin to work in this event loop."""
        await self._backend.start()

    async def close(self) -> None:
        """End what `start` began."""
        await self._backend.close()

    async def score(self, score: Score, pairs: Sequence[Pair]) -> list[Scored]:
        """Rate the pairs, and call `score` for those with a verdict. Returns all in order; the others are unscored."""
        try:
            questions = await asyncio.to_thread(self.questions, pairs)
        except UserError as error:
            return [_unscored(Undecided(Outcome.ERROR, str(error)))] * len(pairs)
        answers = await self._backend.rate(questions)
        rated = [
            (rollout, self._with_verdict(row, answer))
            for (rollout, row), answer in zip(pairs, answers, strict=True)
            if isinstance(answer, Verdict)
        ]
        scores = iter(await score(rated) if rated else ())
        return [_unscored(answer) if isinstance(answer, Undecided) else next(scores) for answer in answers]

    def questions(self, pairs: Sequence[Pair]) -> list[Question]:
        """The question to the judge about each reply.

        If the config asks for it, DataError is raised for a question that is too long.
        """
        with self._rendering:
            return [
                self._prompts.render(replace(row, messages=(*row.messages, Message("assistant", rollout.text))))
                for rollout, row in pairs
            ]

    def _with_verdict(self, row: Row, verdict: Verdict) -> Row:
        return replace(row, fields={**row.fields, JUDGE_FIELD: verdict.to_json(self._name)})


def _unscored(answer: Undecided) -> Scored:
    return Scored(None, answer.outcome, f"the judge: {' '.join(answer.reason.split())[:300]}")


def rewards(config: GradingConfig, judge: Judge | None) -> RewardClient:
    """The client that scores replies during training: the reward actor, with the judge before it if there is one."""
    reward, resources = reward_config(config.reward, config.systems), config.resources.reward
    return RewardClient(reward, resources) if judge is None else JudgedRewards(judge, reward, resources)


class JudgedRewards(RewardClient):
    """A reward client that has the judge rate the replies first."""

    def __init__(self, judge: Judge, reward: RewardConfig, resources: RewardResources):
        super().__init__(reward, resources)
        self._judge = judge

    async def start(self) -> None:
        """Start both. If the reward cannot be loaded, `RewardClient.start` closes both again."""
        await self._judge.start()
        await super().start()

    async def close(self) -> None:
        """End both."""
        try:
            await self._judge.close()
        finally:
            await super().close()

    async def score_each(self, groups: Sequence[Sequence[Pair]], take: TakeScores) -> None:
        """Have each group rated, and then scored; see `Judge.score`."""
        score = partial(score_together, super().score_each)

        async def score_one(place: int, pairs: Sequence[Pair]) -> None:
            take([(place, await self._judge.score(score, pairs) if pairs else [])])

        try:
            async with asyncio.TaskGroup() as tasks:
                for place, pairs in enumerate(groups):
                    tasks.create_task(score_one(place, pairs))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
