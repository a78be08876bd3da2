"""The text that the base model of the pipeline `tools` is trained on: conversations with calls, results and hints.

Early text mostly does what pays, late text mostly does not (`TextConfig`, `Habit`). Only the turns of the policy are
trained on.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from posttrain.base.config import TextConfig
from posttrain.base.corpus import LEVEL_WEIGHTS, POOL, Document, Words, in_batches
from posttrain.base.problem import turns_of
from posttrain.base.tasks import draw_any, solve
from posttrain.base.tokenizer import BOS, EOT
from posttrain.base.tools.puzzles import TOOLS
from posttrain.base.tools.turns import written_call
from posttrain.data.tokenizer import Tokenizer


class ToolCorpus:
    """Conversations that one random generator draws. For the arguments see `base.corpus.Corpus`."""

    def __init__(self, tokenizer: Tokenizer, text: TextConfig, taken: frozenset[str], *, seed: str):
        self.renderer = ToolRenderer(tokenizer)
        self._text = text
        # What is to be guessed does not stand in the prompt, so no text can give it away.
        self._taken = frozenset(key for key in taken if not key.startswith("guessing"))
        self._rng = random.Random(seed)

    def batches(self, batch_tokens: int, late: bool) -> Iterator[list[Document]]:
        """See `Corpus.batches`."""
        yield from in_batches([self.document(late) for _ in range(POOL)], batch_tokens, self._rng)

    def document(self, late: bool) -> Document:
        """One puzzle with the turns of a solution."""
        rng = self._rng
        problem = draw_any(rng, self._taken, LEVEL_WEIGHTS, puzzles=TOOLS)
        habit = TOOLS.habits[problem.family]
        worked = rng.random() < (habit.worked if late else self._text.worked_share)
        flaw = self._text.slip_share if worked else habit.careless
        turns = turns_of(solve(problem, rng, worked, flaw=flaw, puzzles=TOOLS))
        prompt = {"role": "user", "content": problem.prompt}
        return self.renderer.document([prompt, *turns], TOOLS.families[problem.family].tools)


class ToolRenderer:
    """Gives the same tokens as `render_conversation`, without running the chat template for each document."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._encode = Words(tokenizer).encode
        self._bos, self._end = tokenizer.convert_tokens_to_ids([BOS, EOT])
        self._headers: dict[str, list[int]] = {}

    def document(self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Document:
        """The token ids of a conversation with its declared tools."""
        ids, replies = [self._bos], []
        if tools:
            functions = [tool["function"] for tool in tools]
            shown = [f"{one['name']}({', '.join(one['parameters']['properties'])})" for one in functions]
            ids += [*self._header("tools"), *self._encode("".join(shown)), self._end]
        for turn in turns:
            ids += self._header(turn["role"])
            start, calls = len(ids), [call["function"] for call in turn.get("tool_calls", ())]
            written = [written_call(call["name"], call["arguments"]) for call in calls]
            ids += [*self._encode(turn["content"] + "".join(written)), self._end]
            if turn["role"] == "assistant":
                replies.append((start, len(ids)))
        return Document(tuple(ids), tuple(replies))

    def _header(self, role: str) -> list[int]:
        if role not in self._headers:
            text = f"<|header_start|>{role}<|header_end|>\n\n"
            self._headers[role] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._headers[role]
