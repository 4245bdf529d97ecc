"""Compute the energy that QIF adds to LIF's at any firing rate, in closed form or with neurons held at the rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...convert.hosts import loaded_hosts
from ...convert.walk import neurons
from .costs import Costs, Energy, Traffic, memory_traffic
from .counting import Operations, count_operations

_BISECTIONS = 12


@dataclass(frozen=True)
class StepCount:
    """Operations of one sample in one time step, from which the energy at any firing rate follows.

    Attributes:
        connections: SynOps if every neuron spiked.
        padded: The same, including connections to padding.
        input_macs: MACs of the input layer.
        other_macs: MACs of the other layers whose input is not binary.
        neurons: Number of neurons.
        weights: Number of weights.
    """

    connections: int
    padded: int
    input_macs: int
    other_macs: int
    neurons: int
    weights: int

    @classmethod
    def of(cls, operations: Operations) -> StepCount:
        """Take the counts of one sample over one time step.

        Raises:
            ValueError: No layer received spikes, so nothing depends on a rate.
        """
        if not operations.connections:
            raise ValueError("no layer with weights received spikes, so the energy does not depend on a firing rate")
        return cls(
            operations.connections,
            operations.padded,
            operations.input_macs,
            operations.macs - operations.input_macs,
            operations.neuron_steps,
            operations.weights,
        )

    def with_padding(self) -> StepCount:
        """Count spikes at borders like those inside, as papers do that multiply a layer's FLOPs by the firing rate."""
        return replace(self, connections=self.padded)

    def energy(self, rate: float, costs: Costs, once_in: int = 1) -> Energy:
        """Compute the energy of a time step at a firing rate.

        Args:
            rate: Spikes per neuron-step, weighted by fan-out.
            costs: Energies of the operations.
            once_in: Number of time steps that share one computation of the input layer: 1 (default) if it runs at
                every step, T if a static image passes it once.
        """
        macs = self.input_macs / once_in + self.other_macs
        return Energy.of(macs, self.connections * rate, self.neurons, costs)

    def traffic(self, rate: float, reuse: bool) -> Traffic:
        """Count the words moved in a time step at a firing rate, see :func:`~.costs.memory_traffic`."""
        used = self.connections * rate + self.input_macs + self.other_macs
        return memory_traffic(used, self.weights, self.neurons, reuse)

    def break_even(self, costs: Costs) -> float:
        """Compute by how many spikes per connection a QIF network must fire less to cost the same as a LIF network."""
        return self.energy(0.0, costs).qif_extra / (self.connections * costs.ac)

    def rate_at(self, overhead: float, costs: Costs, once_in: int = 1) -> float:
        """Compute the firing rate at which QIF costs the fraction ``overhead`` more than LIF.

        It is negative if QIF's overhead is smaller at every rate.

        Raises:
            ZeroDivisionError: SynOps cost nothing, so the rate does not matter.
        """
        per_rate = self.connections * costs.ac
        silent = self.energy(0.0, costs, once_in)
        return (silent.qif_extra / overhead - silent.total_lif) / per_rate


def count_at_rate(model: nn.Module, shape: Sequence[int], steps: int, rate: float, seed: int = 0) -> Operations:
    """Count the operations of one sample with every layer of neurons held at a firing rate.

    The sample is noise, N(0, 1), the same at every time step. The spikes are those of the model's own neurons.

    Args:
        model: A SpikingJelly model in multi-step mode, from ``[T, N, *shape]``.
        shape: Shape of one sample of one step.
        steps: Time steps T.
        rate: Spikes per neuron-step to hold, between 0 and 1. The rate that was reached is in the counts.
        seed: Seed of the sample. Default 0.

    Raises:
        ValueError: The rate is outside (0, 1), or
            :func:`~qif_plugins.diagnostics.energy.counting.count_operations` raises one.
    """
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, *shape, generator=generator, dtype=torch.float32, device="cpu")
    like = next((p for p in model.parameters() if p.is_floating_point()), sample)
    sample = sample.to(like.device, like.dtype)

    def drive(model: nn.Module) -> None:
        with held_at_rate(model, rate):
            model(sample.expand(steps, *sample.shape))

    return count_operations(model, drive)


@contextlib.contextmanager
def held_at_rate(model: nn.Module, rate: float) -> Iterator[None]:
    """Add a constant to the input of every layer of neurons, inside the block, so that the layer fires at ``rate``.

    At each call the constant is found from a reset state, by bisection of the input's mean between -2 θ and 3 θ.

    Args:
        model: A SpikingJelly model in multi-step mode.
        rate: Spikes per neuron-step, between 0 and 1.

    Raises:
        ValueError: The rate is outside (0, 1).
    """
    if not 0 < rate < 1:
        raise ValueError(f"a firing rate to hold must be between 0 and 1, got {rate}")

    def shift(neuron: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        theta = float(torch.as_tensor(neuron.v_threshold, dtype=torch.float32, device="cpu").mean())
        lo, hi = -2 * theta - x.mean(), 3 * theta - x.mean()
        for _ in range(_BISECTIONS):
            middle = (lo + hi) / 2
            neuron.reset()
            # Without the hooks, of which this is one.
            spikes = neuron.forward(x + middle)
            lo, hi = (lo, middle) if spikes.count_nonzero() > rate * spikes.numel() else (middle, hi)
        neuron.reset()
        return (x + (lo + hi) / 2, *args[1:])

    with contextlib.ExitStack() as stack:
        for site in neurons(model, loaded_hosts()):
            stack.callback(site.module.register_forward_pre_hook(shift).remove)
        yield
