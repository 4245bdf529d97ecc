"""Scale the weights of a network so that its neurons spike before training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from .adjoint import EventBudgetError
from .layers import SpikingLayer
from .spikes import Spikes


class InactiveError(ValueError):
    """Error of a layer that no scale of its weights gives the wanted number of spikes."""


@torch.no_grad()
def initialise(network: nn.Module | Iterable[nn.Module], spikes: Spikes, rate: float = 1.0, steps: int = 12) -> Spikes:
    """Scale the weights of one layer after the other until its neurons spike ``rate`` times in a trial on average.

    Exact gradients carry no information about spikes that are far from occurring, so the initial weights matter more
    than for surrogate gradients. Only the input weights of a layer are scaled, by one factor.

    Args:
        network: The layers in order, such as an ``nn.Sequential``; modified in place.
        spikes: A batch of inputs.
        rate: Wanted mean number of spikes of a neuron within a trial, > 0, pseudospikes not counted. Default 1.
        steps: Number of bisections of the factor's logarithm. Default 12.

    Returns:
        The last layer's output on the batch.

    Raises:
        ValueError: ``rate`` is not positive.
        InactiveError: No factor between 1/1024 and 1024 reaches ``rate``: the input has no spikes, or theta neurons
            spike more often without any input.
    """
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate}")
    layers = network.children() if isinstance(network, nn.Module) else network
    for number, layer in enumerate(layers):
        if not isinstance(layer, SpikingLayer):
            raise ValueError(f"initialise takes a stack of spiking layers; entry {number} is {type(layer).__name__}")
        weight = layer.weight.clone()
        mean_count = partial(_mean_count, layer, weight, spikes, rate)
        low, high = -10.0, 10.0
        if not mean_count(low) < rate <= mean_count(high):
            least, most = mean_count(low), mean_count(high)
            layer.weight.copy_(weight)
            raise InactiveError(
                f"layer {number} spikes {least:g} times a trial with its weights / 1024 and {most:g} times with them · "
                f"1024; no factor gives {rate:g}: does its input spike?"
            )
        for _ in range(steps):
            middle = (low + high) / 2
            low, high = (middle, high) if mean_count(middle) < rate else (low, middle)
        mean_count(high)
        spikes = layer(spikes)
    return spikes


def _mean_count(layer: SpikingLayer, weight: Tensor, spikes: Spikes, rate: float, power: float) -> float:
    """Set the weights to ``weight`` · 2^power, and count the spikes of a neuron in a trial, on average."""
    layer.weight.copy_(weight * 2**power)
    # If one sample has more spikes than the whole batch should have, the rest need not be counted.
    enough = math.ceil(rate * layer.out_features * max(1, len(spikes.times)))
    budget, layer.max_spikes = layer.max_spikes, min(layer.max_spikes, enough)
    try:
        return float(layer(spikes).ordinary_counts().double().mean())
    except EventBudgetError:
        return math.inf
    finally:
        layer.max_spikes = budget
