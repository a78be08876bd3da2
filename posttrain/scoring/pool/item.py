"""A rollout in a pool, and who gets its score."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from posttrain.records import Scored
from posttrain.scoring.pool.wire import EncodedPair

if TYPE_CHECKING:
    from posttrain.scoring.pool.siblings import Siblings


class Receiver(Protocol):
    """Gets one score. A future is one."""

    def done(self) -> bool:
        """Whether it waits no more: it has its score, or has given up."""
        ...

    def set_result(self, result: Scored, /) -> None:
        """Take the score."""
        ...


@dataclass(slots=True, eq=False)
class Item:
    """A rollout to be scored, and what has happened to it so far. Times are monotonic seconds.

    siblings: shared by the replies to its prompt that are scored together.
    alone: whether the item must be the only one in its process. It is set when a process is lost while it scores
    several items, because only a run alone shows which item ended the process.
    """

    key: int
    pair: EncodedPair
    receiver: Receiver
    started_s: float
    siblings: "Siblings"
    sent_s: float = 0.0
    is_control: bool = False
    num_timeouts: int = 0
    num_deaths: int = 0
    alone: bool = False
