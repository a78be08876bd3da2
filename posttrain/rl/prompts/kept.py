"""The token ids of rows as prompts, kept on disk, because to render a chat template takes longer than all else that
the controller does for a group.
"""

from collections.abc import Sequence

from posttrain.data.chat import RenderRow
from posttrain.data.places import Places
from posttrain.records import Message, Row


class KeptPrompts:
    """Renders messages as a prompt; see `RenderRow`. Those of one of `rows` as they are were rendered before.

    ids: the token ids of each row. render: renders other messages, such as those with a system instruction.
    """

    def __init__(self, rows: Sequence[Row], ids: Sequence[Sequence[int]], render: RenderRow):
        self._place = Places(rows, lambda row: row.id)
        self._ids = ids
        self._render = render

    def __call__(self, row: Row, messages: Sequence[Message]) -> Sequence[int]:
        """The token ids of the messages. row: one of `rows`."""
        return self._ids[self._place[row.id]] if messages is row.messages else self._render(row, messages)
