"""Simulate many independent QIF neurons under normal input, to compare the moment closures with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import qif_multi_step
from .parameters import QIFParameters
from .surrogate import FusedSurrogate, Window

_CHUNK = 2**16


@dataclass(frozen=True)
class MembraneStatistics:
    """Statistics of the simulated pre-reset membrane h, over neurons and over the steps after the transient.

    Attributes:
        mean: Mean of h.
        std: Standard deviation of h.
        rate: Spikes per neuron-step.
        mean_error: Standard error of ``mean``, from its spread over groups of neurons.
        std_error: Standard error of ``std``, from the same groups.
        window_means: Mean of each window's w(h), in the order given.
        neurons: Number of neurons.
        steps: Number of steps of each neuron.
        seed: Seed of the input.
    """

    mean: float
    std: float
    rate: float
    mean_error: float
    std_error: float
    window_means: tuple[float, ...]
    neurons: int
    steps: int
    seed: int


@torch.no_grad()
def simulate_membrane(
    params: QIFParameters,
    input_std: float,
    input_mean: float = 0.0,
    *,
    neurons: int = 2**18,
    steps: int = 60,
    transient: int = 20,
    windows: tuple[FusedSurrogate, ...] = (),
    seed: int = 0,
) -> MembraneStatistics:
    """Run independent neurons from ``v_reset`` under independent input N(input_mean, input_std²) and measure h.

    Args:
        params: The neuron; every number a float. ``input_std`` and ``input_mean`` are those of g·x.
        input_std: Standard deviation of the input, > 0.
        input_mean: Mean of the input. Default 0.
        neurons: Number of neurons, >= 2. Default 2^18.
        steps: Steps of each neuron. Default 60.
        transient: Steps left out at the beginning, < ``steps``. Default 20.
        windows: Surrogates whose mean w(h) is measured as well.
        seed: Seed of the input. Default 0.

    Returns:
        The measured statistics; the same for the same arguments on every machine of one PyTorch version.

    Raises:
        ValueError: A size is out of range, a parameter is a tensor, the input gain is 0, or the membrane ran away
            (possible only under a soft reset with rebound).
    """
    tensors = [name for name, value in params.numbers().items() if isinstance(value, Tensor)]
    if tensors:
        raise ValueError(
            f"a simulation is of one neuron, whose parameters are floats; {', '.join(tensors)} "
            f"{'is a tensor' if len(tensors) == 1 else 'are tensors'}: pass one of its entries"
        )
    if not params.input_gain:
        raise ValueError("an input gain of 0 shuts the input out, which leaves nothing to simulate; pass another one")
    if neurons < 2 or not 0 <= transient < steps:
        raise ValueError(
            f"a simulation needs at least 2 neurons and more steps than its transient of {transient}, "
            f"got neurons={neurons}, steps={steps}"
        )
    if not (input_std > 0 and math.isfinite(input_std) and math.isfinite(input_mean)):
        raise ValueError(
            f"the input's mean must be finite and its deviation positive, got input_mean={input_mean}, "
            f"input_std={input_std}"
        )
    generator = torch.Generator().manual_seed(seed)
    start = params.v_reset
    assert isinstance(start, float)  # for the type checker
    gain = float(params.input_gain)
    # At least 16 groups, so that the spread of the groups says how sure the whole is.
    chunk = min(_CHUNK, max(1, neurons // 16))
    groups: list[Tensor] = []
    for first in range(0, neurons, chunk):
        size = (steps, min(chunk, neurons - first))
        x = (torch.randn(size, generator=generator, dtype=torch.float32, device="cpu") * input_std + input_mean) / gain
        spike, _, h = qif_multi_step(x, start, params, _ANY_WINDOW, store_h_seq=True)
        h, spike = h[transient:], spike[transient:]
        center = h.mean(dtype=torch.float64)
        square = (h.double() - center).square().mean()
        shares = [window.derivative(h, params.v_threshold).mean(dtype=torch.float64) for window in windows]
        groups.append(torch.stack([center, square, spike.mean(dtype=torch.float64), *shares]))
    table = torch.stack(groups)
    weight = torch.full((len(groups), 1), float(chunk), dtype=torch.float64, device="cpu")
    weight[-1] = neurons - chunk * (len(groups) - 1)
    weight /= neurons
    mean, _, rate, *passed = (weight * table).sum(0).tolist()
    variance = (weight[:, 0] * (table[:, 1] + (table[:, 0] - mean).square())).sum().item()
    if not math.isfinite(variance):
        raise ValueError(
            "the simulated membrane ran away: use a hard reset, a map without rebound, or a smaller input deviation"
        )
    mean_error = (table[:, 0].std() / math.sqrt(len(groups))).item()
    std_error = (table[:, 1].sqrt().std() / math.sqrt(len(groups))).item()
    return MembraneStatistics(
        mean, math.sqrt(variance), rate, mean_error, std_error, tuple(passed), neurons, steps, seed
    )


_ANY_WINDOW = Window(0.0, 1.0)  # forward only: the surrogate plays no part
