"""The loop of dispatch: admits groups whenever there is room, and sends their requests to the workers.

Until the engines have the trainer's weights (start.py) it holds a few groups back and sends no side work.
"""

import asyncio
from collections.abc import Iterable

from msgspec.structs import replace

from posttrain.records import DrawnPrompt
from posttrain.rl.history.recovery import Survivor
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.side import SideWork
from posttrain.rl.loop.start import HELD_BACK, HIGH_PRIORITY
from posttrain.rl.loop.steps import Steps, wake_all
from posttrain.rl.prompts.config import PromptsConfig
from posttrain.rl.records import Admission, Group
from posttrain.rl.rollouts.requests import sample_request
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.workers import RolloutWorkers

# The priority of a group that has replies: it was admitted before others that wait for their first. Those have 0, and
# -1 from the second turn on.
BEGUN = -1


class Dispatch:
    """Admits groups, and before them the side work that is due.

    stop_ids: token ids that end a reply. changed: is set when there may be room for new groups. is_early: whether it
    runs before the engines have the trainer's weights; `open` then ends this.
    """

    def __init__(
        self,
        config: PromptsConfig,
        book: GroupBook,
        workers: RolloutWorkers,
        *,
        side: SideWork,
        steps: Steps,
        stop_ids: tuple[int, ...],
        changed: asyncio.Event,
        is_early: bool = False,
    ):
        self._config = config
        self._book = book
        self._workers = workers
        self._side = side
        self._steps = steps
        self._stop_ids = stop_ids
        self._changed = changed
        self._held_back = HELD_BACK * len(workers.workers) if is_early else 0

    def open(self) -> list[int]:
        """Hold nothing back any more. Returns the orders of the groups that are sent now, to each worker in turn.

        Engines sample them before the groups that wait there, because the first step waits for them. There are none
        with an environment: the step would wait for the slowest tool of their episodes.
        """
        room = self._book.room(self._workers.oldest_version) if self._config.environment is None else 0
        count = min(self._held_back, room)
        admissions = [self._book.admit(self._workers.oldest_version) for _ in range(count)]
        for index, admission in enumerate(admissions):
            flight = self.flight(admission, self._workers.workers[index % len(self._workers.workers)].name)
            flight.request = replace(flight.request, priority=HIGH_PRIORITY)
            self._workers.send(flight)
        self._held_back = 0
        wake_all(self._changed)
        return [admission.order for admission in admissions]

    def go_on_with(self, survivors: Iterable[Survivor]) -> list[Group]:
        """Have the replies of groups from before a crash sampled to their ends. Returns those that need only scores."""
        rests = [self._book.adopt(survivor) for survivor in survivors]
        for rest in rests:
            if isinstance(rest, Admission):
                self.send(rest)
        return [rest for rest in rests if isinstance(rest, Group)]

    async def run(self) -> None:
        """Admit groups whenever there is room. Runs until it is cancelled."""
        while True:
            self._admit()
            await self._changed.wait()

    def _admit(self) -> None:
        """Admit as many groups as there is room for.

        A deterministic run admits them in waves: the next one begins when no group of the last one is in flight.
        """
        if self._config.deterministic and self._book.num_in_flight:
            return
        if not self._held_back:
            self._side.dispatch(self._steps.next_version)
        oldest = self._workers.oldest_version
        for _ in range(self._book.room(oldest) - self._held_back):
            self.send(self._book.admit(oldest))

    def send(self, admission: Admission, worker: str = "") -> None:
        """Have the replies of a group sampled. worker: the one that it goes to, if it can."""
        self._workers.send(self.flight(admission, worker))

    def flight(self, admission: Admission, worker: str = "") -> Flight:
        """The replies of a group that are sampled next: the first ones alone where these may end it."""
        request, recorded = self.request(admission.prompt), admission.recorded
        first = self._book.begins_with(admission.prompt.row.id)
        are_finished = bool(recorded) and all(reply.finish_reason for reply in recorded[:first])
        if first is not None and not any(reply.segments for reply in recorded[first:]) and not are_finished:
            request, recorded = replace(request, n=first), recorded[:first]
        if recorded:
            request = replace(request, priority=BEGUN)
        return Flight(admission.order, admission.stamp, admission.prompt, request, recorded, worker=worker)

    def request(self, prompt: DrawnPrompt) -> SampleRequest:
        """The request for the replies of a group."""
        config = self._config
        return sample_request(config.sampling, prompt, config.group_size, stop_ids=self._stop_ids)
