"""How far a surrogate gradient is from the gradient that it stands for.

The loss of a spiking network is piecewise constant in its weights: its gradient is zero almost everywhere. What a
surrogate gradient can be held against is the gradient of the *noise-smoothed* loss, E[L], where Gaussian noise of
deviation σ_n on the charge of every neuron at every step makes the spikes random::

    h[t] = m[t] + σ_n ξ[t],    m[t] = f(v[t-1]) + g x[t],    ξ[t] ~ N(0, 1)

The likelihood-ratio (score-function) estimator of its gradient has no bias, whatever the neuron and its reset::

    ∇E[L] = E[ (L - b) Σ ξ[t]/σ_n · ∂m[t]/∂w + ∂L/∂w ]

with the sum over neurons and steps, ∂m[t]/∂w for given past (spikes and membranes count as constants), ∂L/∂w for
given spikes (the readout), and any baseline b that does not depend on these ξ: here the mean loss of the other
repeats of the same sample. Since f(v[t-1]) is past, only g x[t] is differentiated. So noise of deviation s = σ_n/g
on the *input* of the neuron does the same, and no neuron has to be taken apart.

Inner products and squared norms come from independent replicates, each pair of different ones once, so that they
have no bias either; cosine and ratio are plugged together from them, with the delete-one jackknife's standard error.

The network must treat its samples independently: batch norms in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Agreement", "agreement", "score_gradients", "surrogate_gradients"]

Forward = Callable[[Tensor], Tensor]
"""Samples ``[N, ...]`` to outputs ``[N, classes]``, from membranes at rest."""
SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and labels to one loss a sample."""


@dataclass(frozen=True)
class Agreement:
    """A surrogate gradient beside the true one, with standard errors.

    Attributes:
        cosine: Between the two.
        ratio: Norm of the surrogate gradient over that of the true one.
        resolved: Whether the squared norms of both are above three times their standard errors; if not, the
            replicates are too few to say anything.
    """

    cosine: float
    cosine_error: float
    ratio: float
    ratio_error: float
    resolved: bool


def score_gradients(
    forward: Forward,
    neurons: Sequence[nn.Module],
    parameters: Sequence[Tensor],
    x: Tensor,
    labels: Tensor,
    loss: SampleLoss,
    noise: float,
    repeats: int,
    replicates: int,
    generator: torch.Generator,
) -> Tensor:
    """Independent unbiased estimates of the gradient of the mean noise-smoothed loss.

    Args:
        forward: Runs the network.
        neurons: Its spiking layers, every one of them.
        parameters: With respect to what.
        x: Samples ``[N, ...]``.
        labels: Their classes ``[N]``.
        loss: Loss of each sample.
        noise: Deviation s of the noise on the neurons' input.
        repeats: Draws of the noise a sample in each replicate, at least 2.
        replicates: Independent estimates.
        generator: Of the noise.

    Returns:
        ``[replicates, P]``, the parameters flattened one after another.

    Raises:
        ValueError: Too few repeats, or a noise that is not positive.
    """
    if repeats < 2:
        raise ValueError(f"the baseline needs other repeats of the same sample: at least 2, got {repeats}")
    _check_noise(noise)
    many, targets = _repeated(x, labels, repeats)
    rows = []
    for _ in range(replicates):
        scores: list[Tensor] = []

        def inject(x_seq: Tensor, scores: list[Tensor] = scores) -> Tensor:
            drawn = noise * torch.randn(x_seq.shape, generator=generator, dtype=x_seq.dtype, device=x_seq.device)
            scores.append((drawn / noise**2 * x_seq).transpose(0, 1).flatten(1).sum(1))
            return x_seq.detach() + drawn

        with _at_inputs(neurons, inject):
            losses = loss(forward(many), targets)
        by_sample = losses.detach().view(repeats, -1)
        # L less the mean of the others.
        advantage = (by_sample - by_sample.mean(0)) * (repeats / (repeats - 1))
        score = torch.stack(scores).sum(0)
        rows.append(_gradient((advantage.flatten() * score + losses).mean(), parameters))
    return torch.stack(rows)


def surrogate_gradients(
    forward: Forward,
    neurons: Sequence[nn.Module],
    parameters: Sequence[Tensor],
    x: Tensor,
    labels: Tensor,
    loss: SampleLoss,
    noise: float,
    repeats: int,
    replicates: int,
    generator: torch.Generator,
) -> Tensor:
    """The surrogate gradient of the mean loss under the same noise, averaged over it; as :func:`score_gradients`."""
    _check_noise(noise)
    many, targets = _repeated(x, labels, repeats)
    with _at_inputs(
        neurons,
        lambda x_seq: (
            x_seq + noise * torch.randn(x_seq.shape, generator=generator, dtype=x_seq.dtype, device=x_seq.device)
        ),
    ):
        rows = [_gradient(loss(forward(many), targets).mean(), parameters) for _ in range(replicates)]
    return torch.stack(rows)


def agreement(true: Tensor, other: Tensor) -> Agreement:
    """Compare independent estimates ``[R, P]`` of the true gradient with those of another, or with a fixed ``[P]``.

    Raises:
        ValueError: Fewer than three estimates, or of another number than the true ones.
    """
    fixed = other.dim() == 1
    count = len(true)
    if count < 3 or (not fixed and len(other) != count):
        raise ValueError(f"an agreement needs 3 or more estimates of each gradient, got {count} and {len(other)}")
    true, other = true.double(), other.double()
    own, cross = true @ true.mT, true @ (other if fixed else other.mT)
    of_other = other @ (other if fixed else other.mT)

    def compare(keep: Tensor) -> tuple[float, float, float, float]:
        square = float(_off_diagonal(own[keep][:, keep]))
        inner = float(cross[keep].mean() if fixed else cross[keep][:, keep].mean())
        size = float(of_other if fixed else _off_diagonal(of_other[keep][:, keep]))
        if min(square, size) <= 0:
            return square, size, math.nan, math.nan
        return square, size, inner / math.sqrt(square * size), math.sqrt(size / square)

    everyone = torch.arange(count, device=true.device)
    square, size, cosine, ratio = compare(everyone)
    left_out = [compare(everyone[everyone != index]) for index in range(count)]
    errors = [_jackknife([row[k] for row in left_out]) for k in range(4)]
    resolved = square > 3 * errors[0] and size > 3 * errors[1]
    return Agreement(cosine, errors[2], ratio, errors[3], resolved)


@contextmanager
def _at_inputs(neurons: Sequence[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What each of these layers receives ``[T, N, ...]`` goes through ``change`` first."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    handles = [neuron.register_forward_pre_hook(before) for neuron in neurons]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def _repeated(x: Tensor, labels: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
    return x.repeat(repeats, *[1] * (x.dim() - 1)), labels.repeat(repeats)


def _off_diagonal(gram: Tensor) -> Tensor:
    """Mean product of two different replicates."""
    count = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))


def _jackknife(values: Sequence[float]) -> float:
    count = len(values)
    mean = math.fsum(values) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in values))


def _check_noise(noise: float) -> None:
    if not (noise > 0 and math.isfinite(noise)):
        raise ValueError(f"the noise must be positive and finite, got {noise}: without it the loss has no gradient")
