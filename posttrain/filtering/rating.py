"""Gets the judge's answer about each row: from the file of earlier verdicts, or else from the judge.

    questions ─► verdicts/<stage>.sqlite ─► answers
                      │ not known    ▲
                      └─► judge ─────┘ as they arrive

So after a kill the judge rates only the remaining rows. If only `keep_fraction`, `stratify` or the seed changes, all
verdicts are in the file and no judge is started. The file is in the run directory and not in the stage's folder, which
is emptied when the stage's config changes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.judging.backend import PreparedJudge, open_judge, rate_all
from posttrain.judging.cache import VerdictCache
from posttrain.judging.prompts import Question
from posttrain.judging.verdicts import Answer, Verdict

FOLDER = "verdicts"


@dataclass(frozen=True, slots=True)
class Rated:
    """The answers in the order of the questions.

    num_known: number of answers from an earlier run. judging_s: seconds in which the judge gave the others.
    """

    answers: list[Answer]
    num_known: int
    judging_s: float


def rate(
    questions: Sequence[Question], judge: PreparedJudge, resources: ActorResources | None, *, context: StageContext
) -> Rated:
    """The answers to all questions. resources: of the judge's engines; None for a judge at an endpoint."""
    with VerdictCache(context.run_dir / FOLDER / f"{context.name}.sqlite", judge) as cache:
        answers: dict[int, Answer] = {}
        for place, question in enumerate(questions):
            if (known := cache.get(question)) is not None:
                answers[place] = known
        unknown = [place for place in range(len(questions)) if place not in answers]
        num_known = len(answers)

        def report() -> None:
            context.progress(len(answers), len(questions), "rows", values={"rated before": num_known})

        def take(index: int, answer: Answer) -> None:
            place = unknown[index]
            answers[place] = answer
            if isinstance(answer, Verdict):
                cache.add(questions[place], answer)
            report()

        judging_s = 0.0
        if unknown:
            with open_judge(judge, context, resources) as backend:
                began = time.time()
                found = rate_all(backend, [questions[place] for place in unknown], take)
                judging_s = time.time() - began
            answers.update(zip(unknown, found, strict=True))
        else:
            report()
        return Rated([answers[place] for place in range(len(questions))], num_known, judging_s)
