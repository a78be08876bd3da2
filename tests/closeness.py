"""How close two computations of the same value must be on any CPU. Bounds come from a float64 reference.

The rule: `exact` is computed in float64 by the peer's code, `peer` in fp32 by the same code. So the error of the peer
shows how much rounding changes this computation on this machine. Our computation may use another order of sums, another
kernel or another instruction set, but it has the same number of roundings of the same size:

    max |ours - exact| <= SPREAD * max |peer - exact| + FLOOR * eps * max |exact|

SPREAD = 8: two sums of n terms in different orders have errors of the same distribution, and the largest of many such
errors differs between two draws by a small factor. A blocked and a plain sum differ by up to the root of the block's
length, which is 8 for 64 terms. FLOOR = 64: if few numbers are compared, the peer may be exact by luck, and a sum of 64
terms may still be wrong by an eps for each. A mistake in the computation (another pairing in the rotary embedding, a
missing temperature, a chunk one token longer) gives an error that is larger by a factor of a hundred or more.
"""

import contextlib
from collections.abc import Iterator, Mapping
from unittest import mock

import torch

SPREAD, FLOOR = 8, 64
# Of `apart`. Rounding gives some 1e-4 after a few steps of Adam, which makes much of tiny gradients; a gradient that
# lacks the part of one rank, or counts it twice, gives more than 0.1.
ROUNDING = 1e-2
Tensors = Mapping[str, torch.Tensor]


@contextlib.contextmanager
def float64_inside() -> Iterator[None]:
    """Compute in float64 what transformers' code computes in fp32: `x.float()` in norms, rotary embedding, router."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def error_and_bound(ours: Tensors, peer: Tensors, exact: Tensors, *, scale: float = 0.0) -> tuple[float, float]:
    """The largest error of ours in any tensor, and what the rule allows; both relative to the largest exact value.

    scale: the largest term, where the values are sums whose terms cancel: they are rounded by the size of the terms.
    """
    assert ours.keys() == peer.keys() == exact.keys()
    largest = max(scale, *(float(value.detach().abs().max()) for value in exact.values()))

    def error(found: Tensors) -> float:
        return max(float((found[name].detach().double() - exact[name].detach()).abs().max()) for name in exact)

    return error(ours) / largest, SPREAD * error(peer) / largest + FLOOR * torch.finfo(torch.float32).eps


def assert_as_exact(
    ours: Tensors | torch.Tensor, peer: Tensors | torch.Tensor, exact: Tensors | torch.Tensor, *, scale: float = 0.0
) -> None:
    """Raise AssertionError if `ours` is not as close to `exact` as the rule requires."""
    tables = [x if isinstance(x, Mapping) else {"": x} for x in (ours, peer, exact)]
    error, bound = error_and_bound(*tables, scale=scale)
    assert error <= bound, f"{error:.2e} of the largest value, allowed {bound:.2e}"


def apart(ours: Tensors, peer: Tensors, start: Tensors) -> float:
    """Root mean square of the difference of two trainings' weights, relative to that of the change since `start`.

    For trainings that cannot run in float64. It must be less than ROUNDING.
    """

    def rms(values: Tensors, base: Tensors) -> float:
        return float(
            torch.cat([(values[name].double() - base[name].double()).flatten() for name in base]).square().mean().sqrt()
        )

    assert ours.keys() == peer.keys() == start.keys()
    return rms(ours, peer) / rms(peer, start)


def assert_trained_as_exact(ours: Tensors, peer: Tensors, exact: Tensors, start: Tensors) -> None:
    """The rule for weights after steps of Adam: root mean square errors, relative to that of the change since `start`.

    Adam divides by the root of tiny squares. A weight whose gradient is about as large as its rounding may move either
    way, so the largest error of a training is that of a few such weights, and differs much between two roundings.
    """

    def rms(values: Tensors, base: Tensors) -> float:
        return float(
            torch.cat([(values[name].double() - base[name]).flatten() for name in exact]).square().mean().sqrt()
        )

    assert ours.keys() == peer.keys() == exact.keys()
    change = rms(exact, start)
    error = rms(ours, exact) / change
    bound = SPREAD * rms(peer, exact) / change + FLOOR * torch.finfo(torch.float32).eps
    assert error <= bound, f"{error:.2e} of the change, allowed {bound:.2e}"
