"""The simulated run when engines join and leave: the policy of rl/loop/scaling.py decides after each step."""

from posttrain.forecast.actors import Engine
from posttrain.forecast.simulation import Setting, Simulation, StepRecord
from posttrain.rl.loop.scaling import Scaling, StepFigures


class ElasticSimulation(Simulation):
    """Begins with `setting.engines` engines. join_s: from the decision until a new engine samples.

    numbers: of engines, after each step.
    """

    def __init__(self, setting: Setting, policy: Scaling, *, join_s: float, seed: int = 0):
        super().__init__(setting, seed)
        self._policy = policy
        self._join_s = join_s
        self._joining = 0
        self._made = setting.engines
        self._left: list[Engine] = []  # they finish what they have
        self._told = 0.0
        self._told_busy_s = 0.0
        self.numbers: list[int] = []

    def _update(self, now: float) -> None:
        step = self._steps[-1]
        super()._update(now)
        self._follow(step, now)

    def _follow(self, step: StepRecord, now: float) -> None:
        for engine in (*self._engines, *self._left):
            engine.advance(now)
        busy_s = sum(engine.busy_s for engine in (*self._engines, *self._left))
        count, seconds = len(self._engines), max(1e-9, now - self._told)
        figures = StepFigures(seconds, step.waited_s, min(1.0, (busy_s - self._told_busy_s) / seconds / count))
        self._told, self._told_busy_s = now, busy_s
        self.numbers.append(count)
        decision = self._policy.observe(figures, count, is_changing=bool(self._joining))
        self._touched.update(self._engines)
        if decision is None:
            return
        for _ in range(decision.workers - count):
            self._joining += 1
            self._at(now + self._join_s, self._join)
        for _ in range(count - decision.workers):
            engine = min(self._engines, key=lambda engine: len(engine.groups))
            self._engines.remove(engine)
            self._left.append(engine)

    def _join(self, now: float) -> None:
        self._joining -= 1
        setting = self._setting
        engine = Engine(
            f"engine-{self._made}",
            setting.costs.engine,
            setting.max_seqs,
            prompt_tokens=setting.prompt_tokens,
            finished=self._sampled,
            padded=setting.padded,
        )
        self._made += 1
        engine.advance(now)
        engine.version = max(other.version for other in self._engines)
        self._engines.append(engine)
        self._touched.add(engine)
