"""Whether every prompt leaves room for a reply, with each system instruction that may be drawn for it."""

from collections.abc import Callable, Sequence

from posttrain.errors import DataError
from posttrain.records import Message
from posttrain.rl.config import RlConfig
from posttrain.rl.records import DrawnPrompt

_NEAR = 32  # tokens; an instruction adds about as many to every prompt, so only those this near are rendered


def check_room(
    config: RlConfig, prompts: Sequence[DrawnPrompt], render: Callable[[Sequence[Message]], Sequence[int]]
) -> None:
    """Raises DataError for the first prompt that is too long. prompts: without a sampled instruction."""
    limit = config.engine.max_model_len - config.sampling.max_tokens
    for prompt in prompts:
        if len(prompt.prompt.token_ids) > limit:
            raise _too_long(config, prompt, len(prompt.prompt.token_ids), "")
    bare = [prompt for prompt in prompts if prompt.row.messages[0].role != "system"]
    for text in [item.text for item in config.systems.instructions if item.text and bare]:
        system = Message("system", text)
        added = len(render((system, *bare[0].prompt.messages))) - len(bare[0].prompt.token_ids)
        for prompt in bare:
            if len(prompt.prompt.token_ids) + added + _NEAR > limit:
                length = len(render((system, *prompt.prompt.messages)))
                if length > limit:
                    raise _too_long(config, prompt, length, f" with the system instruction {text[:40]!r}")


def _too_long(config: RlConfig, prompt: DrawnPrompt, length: int, how: str) -> DataError:
    return DataError(
        f"prompt {prompt.row.id!r} has {length} tokens{how}; with sampling.max_tokens {config.sampling.max_tokens} "
        f"that exceeds engine.max_model_len {config.engine.max_model_len}"
    )
