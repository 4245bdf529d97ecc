"""Measure how far a surrogate gradient is from the gradient that it approximates.

The loss of a spiking network is piecewise constant in its weights: its gradient is zero almost everywhere. A surrogate
gradient is therefore compared with the gradient of the *noise-smoothed* loss, E[L], where Gaussian noise of deviation
σ_n on the charge of every neuron at every step makes the spikes random::

    h[t] = m[t] + σ_n ξ[t],    m[t] = f(v[t-1]) + g x[t],    ξ[t] ~ N(0, 1)

The likelihood-ratio (score-function) estimator of its gradient has no bias for any neuron and reset::

    ∇E[L] = E[ (L - b) Σ ξ[t]/σ_n · ∂m[t]/∂w + ∂L/∂w ]

with the sum over neurons and steps, ∂m[t]/∂w for given past (spikes and membranes count as constants), ∂L/∂w for
given spikes (the readout), and any baseline b that does not depend on these ξ: here the mean loss of the other
repeats of the same sample. Since f(v[t-1]) is past, only g x[t] is differentiated. So noise of deviation s = σ_n/g
on the *input* of the neuron does the same, and no neuron has to be taken apart.

Inner products and squared norms come from independent replicates, each pair of different ones once, so that they
have no bias either; cosine and ratio are computed from them, with the delete-one jackknife's standard error.

The network must treat its samples independently: batch norms in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]
"""Samples ``[N, ...]`` to outputs ``[N, classes]``, from membranes at rest."""
SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Outputs and labels to one loss a sample."""


@dataclass(frozen=True)
class SmoothedLoss:
    """Loss of a network on samples, averaged over noise on the input of its neurons.

    Attributes:
        forward: Runs the network.
        neurons: Its spiking layers, every one of them.
        parameters: The tensors whose gradient is wanted.
        x: Samples ``[N, ...]``.
        labels: Their classes ``[N]``.
        loss: Loss of each sample.
        noise: Deviation s of the noise on the neurons' input.

    Raises:
        ValueError: A noise that is not positive.
    """

    forward: Forward
    neurons: Sequence[nn.Module]
    parameters: Sequence[Tensor]
    x: Tensor
    labels: Tensor
    loss: SampleLoss
    noise: float

    def __post_init__(self) -> None:
        if not (self.noise > 0 and math.isfinite(self.noise)):
            raise ValueError(
                f"the noise must be positive and finite, got {self.noise}: without it the loss has no gradient"
            )

    def score_gradients(self, repeats: int, replicates: int, generator: torch.Generator) -> Tensor:
        """Compute independent unbiased estimates of the gradient.

        Args:
            repeats: Draws of the noise for each sample in a replicate, at least 2.
            replicates: Number of estimates.
            generator: Generator of the noise.

        Returns:
            ``[replicates, P]``, the parameters flattened one after another.

        Raises:
            ValueError: Too few repeats.
        """
        if repeats < 2:
            raise ValueError(f"the baseline needs other repeats of the same sample: at least 2, got {repeats}")
        rows = []
        for _ in range(replicates):
            scores: list[Tensor] = []

            def inject(x_seq: Tensor, scores: list[Tensor] = scores) -> Tensor:
                drawn = self._draw(x_seq, generator)
                scores.append((drawn / self.noise**2 * x_seq).transpose(0, 1).flatten(1).sum(1))
                return x_seq.detach() + drawn

            losses = self._losses(repeats, inject)
            by_sample = losses.detach().view(repeats, -1)
            # L less the mean of the others.
            advantage = (by_sample - by_sample.mean(0)) * (repeats / (repeats - 1))
            rows.append(self._gradient((advantage.flatten() * torch.stack(scores).sum(0) + losses).mean()))
        return torch.stack(rows)

    def surrogate_gradients(self, repeats: int, replicates: int, generator: torch.Generator) -> Tensor:
        """Average the surrogate gradient over the same noise; arguments and result as :meth:`score_gradients`."""
        return torch.stack(
            [
                self._gradient(self._losses(repeats, lambda x_seq: x_seq + self._draw(x_seq, generator)).mean())
                for _ in range(replicates)
            ]
        )

    def _draw(self, x_seq: Tensor, generator: torch.Generator) -> Tensor:
        return self.noise * torch.randn(x_seq.shape, generator=generator, dtype=x_seq.dtype, device=x_seq.device)

    def _losses(self, repeats: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute the loss of each repeat of each sample, with ``change`` between the neurons and their input."""
        many = self.x.repeat(repeats, *[1] * (self.x.dim() - 1))
        with changed_inputs(self.neurons, change):
            return self.loss(self.forward(many), self.labels.repeat(repeats))

    def _gradient(self, value: Tensor) -> Tensor:
        gradients = torch.autograd.grad(value, self.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])


@dataclass(frozen=True)
class Agreement:
    """Comparison of a surrogate gradient with the true one, with standard errors.

    Attributes:
        cosine: Cosine between the two.
        cosine_error: Its standard error.
        ratio: Norm of the surrogate gradient over that of the true one.
        ratio_error: Its standard error.
        resolved: Whether the squared norms of both are above three times their standard errors; if not, the
            replicates are too few to say anything.
    """

    cosine: float
    cosine_error: float
    ratio: float
    ratio_error: float
    resolved: bool


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
def changed_inputs(neurons: Iterable[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what each of these layers receives, ``[T, N, ...]``, inside the block."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(inputs[0]), *inputs[1:])

    handles = [neuron.register_forward_pre_hook(before) for neuron in neurons]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _off_diagonal(gram: Tensor) -> Tensor:
    """Mean product of two different replicates."""
    count = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))


def _jackknife(values: Sequence[float]) -> float:
    count = len(values)
    mean = math.fsum(values) / count
    return math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in values))
