"""Log-probabilities of given tokens from hidden states, without holding the logits of all tokens at once.

The product with the head, the log-softmax and the gather run on one chunk of tokens at a time. Backward computes the
logits of each chunk again. Left out: a bias on the head, and gathering a head that ZeRO-3 divides (the caller does).

Shapes: T tokens, H hidden, V vocabulary.
"""

import torch

# Logits of one chunk hold at most this many elements (64 MiB in fp32).
_MAX_CHUNK_ELEMENTS = 1 << 24


def token_logprobs(
    hidden_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each target under softmax(hidden @ weight.T / temperature), with its exact gradient.

    Args:
        hidden_TH, weight_VH: final hidden states and head, of one floating dtype. The product runs in that dtype, the
            softmax in fp32 (in fp64 for fp64 inputs).
        target_T: int64 ids in [0, V); hidden state t is the one that predicts target t.
        temperature: positive.
        chunk_size: tokens of a chunk; by default so many that the logits of a chunk take at most 64 MiB in fp32.
        entropy: also return the entropy of each distribution, differentiable as well.

    Returns:
        logprobs_T and entropy_T (nats, or None), both fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes do not fit, or temperature or chunk_size is not positive.
    """
    tokens, width = hidden_TH.shape
    if weight_VH.shape[1] != width or target_T.shape != (tokens,):
        raise ValueError(
            f"hidden {list(hidden_TH.shape)}, weight {list(weight_VH.shape)} and target {list(target_T.shape)} must be "
            "[T, H], [V, H] and [T]"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if chunk_size is None:
        chunk_size = max(1, _MAX_CHUNK_ELEMENTS // weight_VH.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    logprobs_T, entropy_T = _TokenLogprobs.apply(hidden_TH, weight_VH, target_T, temperature, chunk_size, entropy)
    return logprobs_T, entropy_T if entropy else None


def _log_softmax(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_CV = hidden_CH @ weight_VH.T
    logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return (logits_CV if temperature == 1.0 else logits_CV.div_(temperature)).log_softmax(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, target_T, temperature, chunk_size, entropy):
        ctx.temperature, ctx.chunk_size, ctx.entropy = temperature, chunk_size, entropy
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        logprobs_T = torch.empty(len(target_T), dtype=dtype, device=hidden_TH.device)
        entropy_T = torch.zeros_like(logprobs_T)
        for start in range(0, len(target_T), chunk_size):
            part = slice(start, start + chunk_size)
            log_probs_CV = _log_softmax(hidden_TH[part], weight_VH, temperature)
            logprobs_T[part] = log_probs_CV.gather(1, target_T[part, None]).squeeze(1)
            if entropy:
                entropy_T[part] = -(log_probs_CV.exp() * log_probs_CV).sum(-1)
        ctx.save_for_backward(hidden_TH, weight_VH, target_T, entropy_T)
        if not entropy:
            ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        hidden_TH, weight_VH, target_T, entropy_T = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_TH = torch.empty_like(hidden_TH) if wants_hidden else None
        grad_weight_VH = torch.zeros(weight_VH.shape, dtype=entropy_T.dtype, device=weight_VH.device)
        for start in range(0, len(target_T), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            log_probs_CV = _log_softmax(hidden_TH[part], weight_VH, ctx.temperature)
            grad_CV = _grad_logits(
                log_probs_CV,
                target_T[part],
                grad_logprobs_T[part] / ctx.temperature,
                entropy_C=entropy_T[part],
                grad_entropy_C=grad_entropy_T[part] / ctx.temperature if ctx.entropy else None,
            ).to(weight_VH.dtype)
            if grad_hidden_TH is not None:
                grad_hidden_TH[part] = grad_CV @ weight_VH
            if wants_weight:
                grad_weight_VH += grad_CV.T @ hidden_TH[part]
        return grad_hidden_TH, grad_weight_VH.to(weight_VH.dtype) if wants_weight else None, None, None, None, None


def _grad_logits(log_probs_CV, target_C, grad_logprobs_C, *, entropy_C, grad_entropy_C):
    """d logprob / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)."""
    probs_CV = log_probs_CV.exp()
    if grad_entropy_C is None:
        grad_CV = probs_CV.mul_(-grad_logprobs_C[:, None])
    else:
        scale_CV = (log_probs_CV + entropy_C[:, None]).mul_(grad_entropy_C[:, None]).add_(grad_logprobs_C[:, None])
        grad_CV = probs_CV.mul_(scale_CV).neg_()
    return grad_CV.scatter_add_(1, target_C[:, None], grad_logprobs_C[:, None])
