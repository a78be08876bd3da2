"""token_logprobs against a plain log-softmax: values, gradients, memory, and what it refuses."""

import pytest
import torch
from closeness import assert_as_exact

from posttrain.train.logprobs import token_logprobs


def _inputs(dtype: torch.dtype = torch.float64, tokens: int = 13, vocab: int = 17, width: int = 5):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden, weight, target


def _plain(hidden, weight, target, temperature):
    log_probs = (hidden @ weight.T / temperature).log_softmax(-1)
    return log_probs.gather(1, target[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_plain_log_softmax(chunk_size, temperature):
    hidden, weight, target = _inputs()
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(2, len(target), generator=generator, dtype=torch.float64)
    expected = _plain(hidden, weight, target, temperature)
    expected_grads = torch.autograd.grad((mix[0] * expected[0] + mix[1] * expected[1]).sum(), (hidden, weight))
    got = token_logprobs(hidden, weight, target, temperature=temperature, chunk_size=chunk_size, entropy=True)
    got_grads = torch.autograd.grad((mix[0] * got[0] + mix[1] * got[1]).sum(), (hidden, weight))
    for have, want in zip((*got, *got_grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_entropy_is_optional():
    hidden, weight, target = _inputs()
    logprobs, entropy = token_logprobs(hidden, weight.detach(), target, chunk_size=4)
    assert entropy is None
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden)
    (want,) = torch.autograd.grad(_plain(hidden, weight.detach(), target, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(grad, want)


def test_bf16_inputs_give_fp32_log_probabilities_of_their_own_logits():
    hidden, weight, target = _inputs(torch.bfloat16, tokens=64)
    logprobs, _ = token_logprobs(hidden, weight, target, chunk_size=16)
    # The same products as in a chunk: a product of another shape may round a logit to bf16 the other way.
    logits = torch.cat([chunk @ weight.T for chunk in hidden.split(16)]).detach()
    peer, exact = ((x.log_softmax(-1).gather(1, target[:, None])[:, 0]) for x in (logits.float(), logits.double()))
    assert logprobs.dtype == torch.float32
    assert_as_exact(logprobs, peer, exact)
    logprobs.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.isfinite().all()


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    hidden, weight, target = _inputs(torch.float32, tokens=256, vocab=400, width=8)
    with _LargestTensor() as seen:
        logprobs, _ = token_logprobs(hidden, weight, target, chunk_size=16, entropy=True)
        logprobs.sum().backward()
    assert seen.largest <= 16 * 400


def test_without_tokens_the_result_is_empty_and_the_gradient_zero():
    hidden, weight, _ = _inputs()
    logprobs, _ = token_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temperature": 0.0}, "temperature is 0.0"), ({"chunk_size": 0}, "chunk_size is 0"), ({"target": 3}, r"\[T\]")],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    hidden, weight, target = _inputs()
    target = target[: change.pop("target", None)]
    with pytest.raises(ValueError, match=message):
        token_logprobs(hidden, weight, target, **change)
