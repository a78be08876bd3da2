"""Checks, when a tokenizer is loaded, that its chat template writes what people say as they said it, and one BOS token.

A template that changes letters (upper case, accents removed, other words) would train and sample on text that no row
holds. Blanks at both ends of a turn may go, as in the templates of Llama 3 and Gemma. Left out: templates that refuse
the turns of the check; rows that they accept are compared when they are rendered.
"""

from typing import Any

from posttrain.data.templates import chat_template

# Letters of both cases, an accent, two blanks, an indented line and another script: whatever a template might change.
PROBE = "Straße  {x}\n    y = [Öl, qQ] 你好 & <b>½</b>"


def template_problem(tokenizer: Any) -> str | None:
    """What is wrong with a tokenizer's chat template; None if nothing is, or if it has no template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    for role in ("user", "assistant"):
        text = _rendered(tokenizer, role, PROBE)
        as_parts = [{"type": "text", "text": PROBE}]  # what templates of multimodal models read
        if text is not None and PROBE not in text and PROBE not in (_rendered(tokenizer, role, as_parts) or ""):
            return (
                f"the chat template changes the text of a turn of role {role}: {PROBE!r} becomes "
                f"{text.strip()[-2 * len(PROBE) :]!r}; take its filters off the content, or set another chat_template "
                "beside the model's path"
            )
        bos = getattr(tokenizer, "bos_token", None)
        if text is not None and bos and text.startswith(2 * bos):
            return (
                f"the chat template begins with {bos!r} twice, so that every prompt would have two BOS tokens; remove "
                "one from the template, or set another chat_template beside the model's path"
            )
    return None


def _rendered(tokenizer: Any, role: str, content: Any) -> str | None:
    """The text that the template makes of a conversation that ends with this turn; None if it refuses the turns."""
    asked = [{"role": "user", "content": "Which?"}] if role == "assistant" else []
    messages, is_prompt = [*asked, {"role": role, "content": content}], not asked
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=chat_template(tokenizer), tokenize=False, add_generation_prompt=is_prompt
            )
        )
    except Exception:  # whatever the template raises: what it refuses is told when a row is rendered
        return None
