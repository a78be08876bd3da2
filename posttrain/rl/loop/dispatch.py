"""The loop of dispatch: admits groups whenever there is room, and sends their requests to the workers."""

import asyncio
from collections.abc import Iterable

from posttrain.records import DrawnPrompt
from posttrain.rl.history.recovery import Survivor
from posttrain.rl.loop.group_book import GroupBook
from posttrain.rl.loop.side import SideWork
from posttrain.rl.loop.steps import Steps
from posttrain.rl.records import Admission, Group
from posttrain.rl.rollouts.config import RolloutsConfig
from posttrain.rl.rollouts.requests import sample_request
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.workers import RolloutWorkers


class Dispatch:
    """Admits groups, and before them the side work that is due.

    stop_ids: token ids that end a reply. changed: is set when there may be room for new groups.
    """

    def __init__(
        self,
        config: RolloutsConfig,
        book: GroupBook,
        workers: RolloutWorkers,
        *,
        side: SideWork,
        steps: Steps,
        stop_ids: tuple[int, ...],
        changed: asyncio.Event,
    ):
        self._config = config
        self._book = book
        self._workers = workers
        self._side = side
        self._steps = steps
        self._stop_ids = stop_ids
        self._changed = changed

    def go_on_with(self, survivors: Iterable[Survivor]) -> list[Group]:
        """Have the replies of groups from before a crash sampled to their ends. Returns those that need only scores."""
        rests = [self._book.adopt(survivor) for survivor in survivors]
        for rest in rests:
            if isinstance(rest, Admission):
                self._send(rest)
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
        self._side.dispatch(self._steps.next_version)
        for _ in range(self._book.room(self._workers.oldest_version)):
            self._send(self._book.admit(self._workers.oldest_version))

    def _send(self, admission: Admission) -> None:
        request = self.request(admission.prompt)
        self._workers.send(Flight(admission.order, admission.stamp, admission.prompt, request, admission.recorded))

    def request(self, prompt: DrawnPrompt) -> SampleRequest:
        """The request for the replies of a group."""
        config = self._config
        return sample_request(config.sampling, prompt, config.group_size, stop_ids=self._stop_ids)
