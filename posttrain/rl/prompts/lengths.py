"""Rows as prompts, and the check that each leaves room for a reply, also with each system instruction that may be drawn
for it.
"""

from collections.abc import Iterable, Sequence

from posttrain.config.rewards import SystemInstruction
from posttrain.data.chat import RenderRow, render_row
from posttrain.data.images.render import prompt_of
from posttrain.data.images.store import ImageStore
from posttrain.data.stored import Derived
from posttrain.errors import DataError
from posttrain.records import DrawnPrompt, Message, Row

# In tokens. An instruction adds about as many tokens to every prompt, so only prompts that are this near to the limit
# are rendered with it.
_NEAR = 32


def plain_prompts(rows: Sequence[Row], render: RenderRow, store: ImageStore | None = None) -> Derived[Row, DrawnPrompt]:
    """Each row as a prompt without a system instruction, rendered each time it is asked for.

    store: of the pictures that the rows show, to which a prompt refers; None for rows of text.
    """
    return Derived(rows, lambda row: DrawnPrompt(row, None, prompt_of(row.messages, render_row(render, row), store)))


def check_room(
    prompts: Iterable[DrawnPrompt],
    render: RenderRow,
    instructions: Sequence[SystemInstruction] = (),
    *,
    max_tokens: int,
    max_model_len: int,
) -> None:
    """Raise DataError for the first prompt that is too long.

    prompts: without a sampled instruction. instructions: those that may be drawn for them. max_tokens: of a reply.
    max_model_len: how many tokens of prompt and reply an engine can hold.
    """
    limit = max_model_len - max_tokens

    def too_long(prompt: DrawnPrompt, length: int, how: str) -> DataError:
        return DataError(
            f"prompt {prompt.row.id!r} has {length} tokens{how}; with sampling.max_tokens {max_tokens} "
            f"that exceeds engine.max_model_len {max_model_len}"
        )

    added: dict[str, int] = {}  # tokens of each instruction
    for prompt in prompts:
        length = len(prompt.prompt.token_ids)
        if length > limit:
            raise too_long(prompt, length, "")
        if prompt.row.messages[0].role == "system":
            continue
        for text in [item.text for item in instructions if item.text]:
            if text in added and length + added[text] + _NEAR <= limit:
                continue
            whole = len(render(prompt.row, (Message("system", text), *prompt.prompt.messages)))
            added.setdefault(text, whole - length)
            if whole > limit:
                raise too_long(prompt, whole, f" with the system instruction {text[:40]!r}")
