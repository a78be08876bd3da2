"""The judge of an RL stage: a model on engines of its own that rates every reply before the reward sees it.

    (rollout, row) ──► judge's prompt ──► one of its engines (one constrained token) ──► row with "judge" ──► reward

The row that the reward function gets has a field `judge`: the likeliest label, the expected place among the labels in
[0, 1], and the probability of each (see `Verdict.to_json`). The reward `judged` returns the middle one; a function of
yours may do anything with them. A lost engine is replaced and asked again; a reply that could not be rated is
unscored, never 0.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from msgspec.structs import replace

from posttrain.actors.losses import is_loss
from posttrain.config.shared import RewardConfig, RewardResources
from posttrain.errors import StageError, UserError
from posttrain.judging.prompts import JudgePrompts, label_token_ids
from posttrain.judging.verdicts import Verdict, read_verdict
from posttrain.records import Message, Rollout, Row, Scored
from posttrain.rl.config import RlConfig, RlJudgeConfig
from posttrain.rl.grading.verifiers import JUDGE_FIELD, reward_config
from posttrain.sampling.client import Engines
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.scoring.remote.client import RewardClient

Pair = tuple[Rollout, Row]
Score = Callable[[Sequence[Pair]], Awaitable[Sequence[Scored]]]


class Question:
    """What the judge is asked about a reply, and what it may answer. tokenizer: the judge's, with a chat template.

    Raises UserError for labels that its answer could not tell apart.
    """

    def __init__(self, config: RlJudgeConfig, tokenizer: Any):
        self.config = config
        self.choice_ids = label_token_ids(tokenizer, config.labels)
        self._prompts = JudgePrompts(tokenizer, config)

    def requests(self, pairs: Sequence[Pair]) -> list[SampleRequest]:
        """One constrained request a reply. Raises DataError for one that does not fit, if the config says so."""
        replied = [replace(row, messages=(*row.messages, Message("assistant", out.text))) for out, row in pairs]
        return [SampleRequest(self._prompts.render(row), max_tokens=1, choice_ids=self.choice_ids) for row in replied]

    def verdict(self, answer: Completion) -> Verdict:
        """Raises StageError for an answer that holds no distribution over the labels."""
        return read_verdict(answer, self.config.labels, self.choice_ids)


class Judge:
    """Rates replies on `engines`, which serve the judge's model."""

    def __init__(self, question: Question, engines: Engines):
        self._question = question
        self._engines = engines
        self._rendering = asyncio.Lock()  # a tokenizer is for one thread at a time
        self.logs = engines.logs

    async def score(self, score: Score, pairs: Sequence[Pair]) -> list[Scored]:
        """`score` of the pairs with their verdicts, in order; a pair without a verdict is not scored."""
        try:
            async with self._rendering:
                requests = await asyncio.to_thread(self._question.requests, pairs)
            verdicts = await self._rate(requests)
        except Exception as error:
            if not (is_loss(error) or isinstance(error, UserError | StageError)):
                raise
            outcome = "infrastructure" if is_loss(error) else "error"
            return [Scored(None, outcome, f"the judge: {' '.join(str(error).split())[:300]}")] * len(pairs)
        name = self._question.config.model.path
        return list(
            await score(
                [
                    (rollout, replace(row, fields={**row.fields, JUDGE_FIELD: verdict.to_json(name)}))
                    for (rollout, row), verdict in zip(pairs, verdicts, strict=True)
                ]
            )
        )

    async def _rate(self, requests: Sequence[SampleRequest]) -> list[Verdict]:
        """The verdicts. Raises StageError where the engines are lost again and again."""
        return [self._question.verdict(answer[0]) for answer in await self._engines.sample(requests)]


def rewards(config: RlConfig, judge: Judge | None) -> RewardClient:
    """What scores replies during training: the reward actor, behind the judge if there is one."""
    reward, resources = reward_config(config), config.resources.reward
    return RewardClient(reward, resources) if judge is None else JudgedRewards(judge, reward, resources)


class JudgedRewards(RewardClient):
    """The reward actor behind a judge."""

    def __init__(self, judge: Judge, reward: RewardConfig, resources: RewardResources):
        super().__init__(reward, resources)
        self._judge = judge

    async def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        """The scores in order; see `Judge.score`."""
        return await self._judge.score(super().score, pairs) if pairs else []
