"""Penalties for long replies, to be added to another reward (see `weighted_sum`). Lengths are in reply tokens."""

from posttrain.records import RewardResult, Rollout, Row


def overlong(rollout: Rollout, row: Row, max_tokens: int, *, buffer_tokens: int | None = None) -> RewardResult:
    """0 up to `max_tokens - buffer_tokens` tokens, then falling in a line to -1 at `max_tokens` and beyond.

    buffer_tokens: a fifth of max_tokens if None. Raises ValueError unless 0 < buffer_tokens <= max_tokens.
    Source: DAPO, arXiv 2503.14476, soft overlong punishment.
    """
    buffer = max_tokens // 5 if buffer_tokens is None else buffer_tokens
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer}; it must be above 0 and at most max_tokens ({max_tokens})")
    over = len(rollout.token_ids) - (max_tokens - buffer)
    value = max(-1.0, min(-over / buffer, 0.0))
    return RewardResult(value, reason="overlong" if value < 0 else "")
