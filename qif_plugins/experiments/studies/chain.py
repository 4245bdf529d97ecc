"""Predict how gradients grow from layer to layer, from the Markov chain of one neuron's membrane.

In a deep network with a norm before each neuron the inputs of a neuron are nearly normal and independent from step to
step. Then h[0], h[1], ... is a Markov chain, and backward the gradient of h[t] is

    e[t] = w(h[t]) g[t] + D(h[t]) e[t+1],    D = ∂h[t+1]/∂h[t] = (1 - s) f'(h) + (f(v_reset) - f(h)) w(h)

for the gradients g[t] of the spikes. Written out, e[t] is the sum over k >= t of D(h[t]) ... D(h[k-1]) w(h[k]) g[k],
so that E[e[t] e[u]] is linear in E[g[k] g[l]], its coefficients being means over the chain of products of w and D.
They are computed on a grid of membranes. The weights and the norm's slope multiply by σ_I²/(r (1 - r)), which gives
E[g[k] g[l]] of the layer below.

The closed form of :mod:`qif_plugins.neuron.isometry` takes the g[t] as uncorrelated, the D and w of successive steps as
independent, the membrane as stationary, and leaves the surrogate out of D. This module makes none of these assumptions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...neuron.parameters import QIFParameters
from ...neuron.surrogate import FusedSurrogate

REACH = 8.0
"""How far the grid reaches from the threshold, in units of the input's deviation."""
CELLS = 640
ROUNDS = 10
"""Iterations of rates and deviations, step by step, whose fixed point all layers but the first few have."""


class GradientChain:
    """Second moments of the gradients of one layer after another, backward.

    Args:
        params: The neuron, with a hard reset; every number a float.
        surrogate: Its surrogate.
        steps: Number of time steps T, from a membrane at v_reset. The cost grows as T⁵.
        input_std: Deviation σ_I of g·x, over time and samples, which the norm sets. Default: the threshold.

    Attributes:
        rates: Spikes per neuron of each step.
    """

    def __init__(
        self, params: QIFParameters, surrogate: FusedSurrogate, steps: int, input_std: float | None = None
    ) -> None:
        threshold = float(params.v_threshold)
        input_std = threshold if input_std is None else input_std
        # The threshold lies between two cells.
        h = threshold + input_std * REACH * (torch.arange(CELLS, dtype=torch.float64) * 2 + 1 - CELLS) / CELLS
        spikes = (h >= threshold).double()
        w = surrogate.derivative(h, threshold)
        reset = torch.full_like(h, float(params.numbers()["v_reset"]))
        by_reset = params.map(reset) - params.map(h if params.rebound else h.clamp(max=threshold))
        slope = (1 - spikes) * params.map_derivative(h) + w * by_reset
        charged = params.map(torch.where(spikes > 0, reset, h))

        deviations = torch.full((steps,), input_std, dtype=torch.float64)
        for _ in range(ROUNDS):
            start = _normal(h, params.map(reset[:1]), deviations[0])
            moves = [_normal(h, charged, deviation) for deviation in deviations[1:]]
            density, rates = start, [start @ spikes]
            for move in moves:
                density = density @ move
                rates.append(density @ spikes)
            self.rates = torch.cat(rates)
            rate = self.rates.mean()
            # The norm's statistics are over time: in a step of rate r its output's variance goes with E[(s - mean r)²].
            gain = input_std**2 / (rate * (1 - rate))
            deviations = torch.sqrt(gain * (self.rates * (1 - 2 * rate) + rate * rate))

        self._paths = [(t, k) for t in range(steps) for k in range(t, steps)]
        factors = [
            torch.stack([slope if t <= step < k else w if step == k else torch.ones_like(h) for t, k in self._paths])
            for step in range(steps)
        ]
        state = start.expand(len(self._paths), len(self._paths), CELLS)
        for step, factor in enumerate(factors):
            state = (state if step == 0 else state @ moves[step - 1]) * factor[:, None] * factor
        self._coefficients = gain * state.sum(-1)
        self._steps = steps

    def back(self, moments: Tensor) -> Tensor:
        """One layer back.

        Args:
            moments: E[g[k] g[l]] of the gradients of a layer's spikes, ``[T, T]``.

        Returns:
            The same of the layer below, which is also σ_I²/(r (1 - r)) times that of this layer's inputs, E[e[t] e[u]].
        """
        first, last = torch.tensor(self._paths).T
        terms = self._coefficients * moments[last[:, None], last]
        found = torch.zeros(self._steps, self._steps, dtype=torch.float64)
        return found.index_put((first[:, None].expand_as(terms), first.expand_as(terms)), terms, accumulate=True)

    def mean_squares(self, layers: int, moments: Tensor) -> list[float]:
        """Mean square of the gradient of each layer's input, the first layer first, relative to that of the last.

        Args:
            layers: Number of layers.
            moments: E[g[k] g[l]] of the gradients of the last layer's spikes, ``[T, T]``: the identity where they are
                independent from step to step, ones where the loss takes the mean over time.
        """
        found = []
        for _ in range(layers):
            moments = self.back(moments)
            found.append(moments.diagonal().mean().item())
        return [value / found[0] for value in reversed(found)]


def _normal(h: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Shares of the cells ``h`` under N(mean, std²), a row for each mean."""
    shares = torch.exp(-0.5 * ((h - mean[:, None]) / std) ** 2)
    return shares / shares.sum(1, keepdim=True)
