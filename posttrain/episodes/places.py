"""How many episodes run at the same time: the others wait, and begin in the order in which they came.

A rollout keeps its place until it has ended, also while its episode begins again in another process. So it does not
depend on the time which rollouts have a place, and a deterministic wave (sampling/workers.py) can wait for them alone.
"""

import asyncio
from collections import deque

from posttrain.sampling.rollouter import Session


class Places:
    """At most `limit` rollouts at a time; None for any number. A rollout takes a place, and leaves it at its end."""

    def __init__(self, limit: int | None):
        self.limit = self._num_free = limit
        self._waiting: deque[tuple[Session, asyncio.Future[None]]] = deque()

    async def take(self, session: Session) -> None:
        """Wait for a place. `Session.is_waiting` tells meanwhile that the rollout waits for others to end."""
        if self._num_free is None:
            return
        if self._num_free:
            self._num_free -= 1
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((session, given))
        session.is_waiting = True
        await session.outside(_await(given))

    def leave(self, session: Session) -> None:
        """Give the place to the rollout that has waited longest; or wait no more, if there was none yet."""
        if self._num_free is None:
            return
        if session.is_waiting:
            session.is_waiting = False
            self._waiting = deque(one for one in self._waiting if one[0] is not session)
        elif self._waiting:
            following, given = self._waiting.popleft()
            following.is_waiting = False
            given.set_result(None)
        else:
            self._num_free += 1


async def _await(given: asyncio.Future[None]) -> None:
    await given
