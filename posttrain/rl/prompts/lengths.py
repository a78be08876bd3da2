"""Check that every prompt leaves room for a reply, also with each system instruction that may be drawn for it."""

from collections.abc import Sequence

from posttrain.config.rewards import SystemInstruction
from posttrain.data.chat import RenderRow
from posttrain.errors import DataError
from posttrain.records import DrawnPrompt, Message

# In tokens. An instruction adds about as many tokens to every prompt, so only prompts that are this near to the limit
# are rendered with it.
_NEAR = 32


def check_room(
    prompts: Sequence[DrawnPrompt],
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

    for prompt in prompts:
        if len(prompt.prompt.token_ids) > limit:
            raise too_long(prompt, len(prompt.prompt.token_ids), "")
    bare = [prompt for prompt in prompts if prompt.row.messages[0].role != "system"]
    for text in [item.text for item in instructions if item.text and bare]:
        system = Message("system", text)
        added = len(render(bare[0].row, (system, *bare[0].prompt.messages))) - len(bare[0].prompt.token_ids)
        for prompt in bare:
            if len(prompt.prompt.token_ids) + added + _NEAR > limit:
                length = len(render(prompt.row, (system, *prompt.prompt.messages)))
                if length > limit:
                    raise too_long(prompt, length, f" with the system instruction {text[:40]!r}")
