"""Replies to one prompt that are scored together: when the first of them hang, the others wait, and may be given up.

    two replies hang ─► the rest is held back ─┬─ a retry of them passes ─► the rest is scored
                                               └─ both hang again, while the reward scores other prompts ─► given up

Without this, a prompt on which the grader always hangs would cost two deadlines for each of its replies. A reply that
is already in a process is not taken back.
"""

from posttrain.records import Outcome, Scored
from posttrain.scoring.pool.item import Item

ENOUGH = 2  # so many replies that hang in every try speak for the whole prompt
GIVEN_UP = Scored(
    None, Outcome.UNSCORABLE, f"not tried, because the reward hung on {ENOUGH} other replies to this prompt"
)


class Siblings:
    """What is known of the replies to one prompt. Of replies to different prompts nothing is concluded."""

    def __init__(self) -> None:
        self._late: set[int] = set()  # passed their deadline, and are not settled
        self._num_hung = 0
        self._is_cleared = False
        self._held: list[Item] = []

    def is_late(self, item: Item) -> None:
        """Note that a reply passed its deadline."""
        self._late.add(item.key)

    def holds_back(self, item: Item) -> bool:
        """Whether a reply must not be sent now. It is kept, and `settled` hands it back."""
        first_try = item.num_timeouts + item.num_deaths == 0
        if self._is_cleared or not first_try or len(self._late) + self._num_hung < ENOUGH:
            return False
        self._held.append(item)
        return True

    def settled(self, item: Item | None = None, outcome: Outcome | None = None) -> tuple[list[Item], list[Item]]:
        """Note what became of a reply, if one is given. Returns the held replies to send, and those to give up."""
        if item is not None:
            self._late.discard(item.key)
            self._num_hung += outcome is Outcome.UNSCORABLE
            self._is_cleared = self._is_cleared or outcome is Outcome.SCORED
        given_up = self._num_hung >= ENOUGH and not self._is_cleared
        if not given_up and not self._is_cleared and len(self._late) + self._num_hung >= ENOUGH:
            return [], []
        held, self._held = self._held, []
        return ([], held) if given_up else (held, [])
