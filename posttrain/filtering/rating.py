"""Gets the judge's answer about each row: from the file of earlier verdicts, or else from the judge.

    questions ─► verdicts/<stage>.sqlite ─► verdicts
                      │ not known    ▲
                      └─► judge ─────┘ as they arrive

So after a kill the judge rates only the remaining rows. If only `keep_fraction`, `stratify` or the seed changes, all
verdicts are in the file and no judge is started. The file is in the run directory and not in the stage's folder, which
is emptied when the stage's config changes.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.data.arrays import gathered
from posttrain.data.stored import Stored, pick, store
from posttrain.judging.backend import PreparedJudge, open_judge, rate_all
from posttrain.judging.cache import VerdictCache
from posttrain.judging.prompts import Question
from posttrain.judging.verdicts import NOT_ASKED, Answer, Undecided, Verdict
from posttrain.records import Outcome

FOLDER = "verdicts"
AT_ONCE = 1 << 16  # questions whose answers are in memory together


@dataclass(frozen=True, slots=True)
class Rated:
    """The verdicts in the order of the questions, if no question is without one.

    undecided: the questions without a verdict, by reason; the verdicts are then those of the others. num_known: number
    of verdicts from an earlier run. judging_s: seconds in which the judge gave the others.
    """

    verdicts: Stored[Verdict]
    undecided: Counter[str]
    num_known: int
    judging_s: float


def rate(
    questions: Sequence[Question], judge: PreparedJudge, resources: ActorResources | None, *, context: StageContext
) -> Rated:
    """Rate all questions. resources: of the judge's engines; None for a judge at an endpoint."""
    with VerdictCache(context.run_dir / FOLDER / f"{context.name}.sqlite", judge) as cache:
        unknown = gathered((place for place, asked in enumerate(questions) if cache.get(asked) is None), "q")
        num_known = num_rated = len(questions) - len(unknown)
        undecided: Counter[str] = Counter()

        def report() -> None:
            context.progress(num_rated, len(questions), "rows", values={"rated before": num_known})

        judging_s = 0.0
        if len(unknown):
            with open_judge(judge, context, resources) as backend:
                began = time.time()
                for start in range(0, len(unknown), AT_ONCE):
                    block = pick(questions, unknown[start : start + AT_ONCE])

                    def take(index: int, answer: Answer, block: Sequence[Question] = block) -> None:
                        nonlocal num_rated
                        num_rated += 1
                        if isinstance(answer, Verdict):
                            cache.add(block[index], answer)
                        report()

                    answers = rate_all(backend, block, take)
                    missing = [answer for answer in answers if isinstance(answer, Undecided)]
                    undecided.update(answer.reason for answer in missing)
                    if any(answer.outcome is Outcome.INFRASTRUCTURE for answer in missing):
                        undecided[NOT_ASKED] += max(0, len(unknown) - start - AT_ONCE)  # of later blocks
                        break
                judging_s = time.time() - began
        else:
            report()
        found = (cache.get(asked) for asked in questions)
        verdicts = store((verdict for verdict in found if verdict is not None), Verdict, context.dir)
        return Rated(verdicts, +undecided, num_known, judging_s)
