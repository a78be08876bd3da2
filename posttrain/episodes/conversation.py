"""What the policy reads next in an episode, as token ids: a suffix to what it has read so far, or a new branch.

Sampled ids are never made from text again. After a turn of the policy, the chat template is rendered twice: the
conversation up to that turn, and the conversation with what was added. Where the second begins with the first, the rest
of it is the suffix. Where it does not, the template rewrites earlier turns (it cuts their reasoning, or joins turns),
and the conversation goes on as a new branch: the tokens that both have in common are kept, and the others are rendered.

Mostly one rendering is enough, and no more than the suffix is encoded: where the text begins with the text of the
latest prompt and then with the very text of the turn that was sampled. The first time that this is so for a form of
conversation, it is compared with the rule above.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from posttrain.data.chat import as_dicts, begun_thinking, conversation_ids, prompt_ids, prompt_text
from posttrain.data.ends import end_token_ids
from posttrain.data.shown import require_tools_shown
from posttrain.data.special import guard_of
from posttrain.data.templates import chat_template
from posttrain.data.tokenizer import Tokenizer
from posttrain.records import Message, Prompt


@dataclass(frozen=True, slots=True)
class Continuation:
    """Token ids to add. keeps: None for a suffix; for a branch, how many of the tokens so far stay before them."""

    token_ids: tuple[int, ...]
    keeps: int | None = None

    def after(self, ids: Sequence[int]) -> tuple[int, ...]:
        """All that the policy reads. ids: what it has read so far."""
        return (*(ids if self.keeps is None else ids[: self.keeps]), *self.token_ids)


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Conversation:
    """The messages of one episode. messages: begin with those of the prompt.

    checked: is filled with what is known of the template: for which forms of conversation it shows the results of
    tools, and for which the suffix is found in the text.
    heard: is called with each message and its place, the prompt's too, once it is part of the conversation.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        tools: Sequence[dict[str, Any]],
        *,
        checked: set[str],
        heard: Callable[[int, Message], None] | None = None,
    ):
        self._tokenizer = tokenizer
        self._tools = list(tools) or None
        self._ends = set(end_token_ids(tokenizer))
        self._rendered: list[int] | None = list(prompt.token_ids)  # the latest prompt as the template writes it
        self._text = ""  # and its text, or ""
        self._num_read = 0  # how many tokens the policy has read before its latest turn
        self._num_plain = 0  # how many of the first messages are known to hold no special token
        self._said: int | None = None  # index of the policy's latest turn
        self._checked = checked
        self._heard = heard
        self._num_heard = 0
        self.messages = list(prompt.messages)

    def fork(self) -> "Conversation":
        """A conversation that goes on from here by itself."""
        other = copy(self)
        other.messages = list(self.messages)
        return other

    def add(self, messages: Sequence[Message]) -> None:
        """Add turns of the world."""
        self.messages += messages

    def add_said(self, message: Message) -> None:
        """Add a turn of the policy."""
        content = message.content
        if isinstance(content, str) and "</think>" in content and "<think>" not in content:
            # The prompt began the reasoning, so the sampled text has only its end.
            begun = begun_thinking(self._tokenizer, self._ids_of_rendered())
            message = Message("assistant", begun + content, message.tool_calls)
        self._said = len(self.messages)
        self.messages.append(message)
        self._tell()

    def next(self, ids: Sequence[int]) -> Continuation:
        """What is added to `ids`, the tokens that the policy has read and sampled so far, before its next turn.

        Raises DataError if the chat template refuses the messages, or leaves out what was added.
        """
        dicts = as_dicts(self.messages)
        known = f"suffix of {_form(dicts)}"
        text = prompt_text(self._tokenizer, dicts, self._tools) if self._is_plain(dicts) else ""
        suffix = self._suffix(text, ids)
        if suffix and known in self._checked:
            found, self._rendered = Continuation(suffix), None
        else:
            found = self._by_both(dicts, ids)
            if suffix and found == Continuation(suffix):
                self._checked.add(known)
        self._text, self._num_read = text, len(found.after(ids))
        self._tell()
        return found

    def _suffix(self, text: str, ids: Sequence[int]) -> tuple[int, ...]:
        """What follows the latest turn in `text`, the next prompt, if it begins with what the policy has read and said;
        else nothing."""
        if not text or not self._text or self._said is None or not ids or ids[-1] not in self._ends:
            return ()
        said, end = (
            self._tokenizer.decode(part, clean_up_tokenization_spaces=False)
            for part in (ids[self._num_read : -1], ids[-1:])
        )
        for turn in (said + end, said.strip() + end):  # most templates trim turns
            if text.startswith(turn, len(self._text)) and text.startswith(self._text):
                # The end of the turn is encoded too: a tokenizer may treat the beginning of a text in its own way.
                rest = text[len(self._text) + len(turn) - len(end) :]
                first, *suffix = self._tokenizer.encode(rest, add_special_tokens=False)
                return tuple(suffix) if first == ids[-1] else ()
        return ()

    def _is_plain(self, dicts: list[dict[str, Any]]) -> bool:
        """Whether no special token is text of the messages, which would have to be encoded as text."""
        guard = guard_of(self._tokenizer, chat_template(self._tokenizer))
        if guard.found_in(dicts[self._num_plain :], None if self._num_plain else self._tools) is not None:
            return False
        self._num_plain = len(dicts)
        return True

    def _ids_of_rendered(self) -> list[int]:
        if self._rendered is None:
            self._rendered = list(self._tokenizer.encode(self._text, add_special_tokens=False))
        return self._rendered

    def _by_both(self, dicts: list[dict[str, Any]], ids: Sequence[int]) -> Continuation:
        """By both renderings."""
        wanted = prompt_ids(self._tokenizer, dicts, self._tools)
        self._require_shown(dicts, wanted)
        rendered, self._rendered = self._ids_of_rendered(), wanted
        if self._said is None and wanted == rendered:
            return Continuation(())
        if self._said is not None:
            whole = conversation_ids(self._tokenizer, dicts[: self._said + 1], self._tools)
            last = next((at for at in range(len(whole) - 1, len(rendered) - 1, -1) if whole[at] in self._ends), None)
            if last is not None and whole[: len(rendered)] == rendered and wanted[: last + 1] == whole[: last + 1]:
                is_ended = bool(ids) and ids[-1] in self._ends
                return Continuation(tuple(wanted[last + 1 if is_ended else last :]))
        common = num_common(ids, wanted)
        # A prompt ends with the header of the policy's turn, so something is always left to add.
        return Continuation(tuple(wanted[common:]), common)

    def _tell(self) -> None:
        if self._heard is not None:
            for place in range(self._num_heard, len(self.messages)):
                self._heard(place, self.messages[place])
            self._num_heard = len(self.messages)

    def _require_shown(self, dicts: list[dict[str, Any]], wanted: list[int]) -> None:
        """Check once for each form of conversation that the template shows what tools do."""
        form = _form(dicts)
        if "tool" not in form and not any(item.get("tool_calls") for item in dicts):
            return
        if form not in self._checked:
            require_tools_shown(lambda *given: prompt_ids(self._tokenizer, *given), dicts, self._tools, ids=wanted)
            self._checked.add(form)


def _form(dicts: list[dict[str, Any]]) -> str:
    """The form of a conversation: the roles of its latest turns, and which of them have calls."""
    return "/".join(f"{item['role']}{'+' if item.get('tool_calls') else ''}" for item in dicts[-3:])
