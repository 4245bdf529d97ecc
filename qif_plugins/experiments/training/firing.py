"""Firing rates of layers, measured while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...neuron.observe import Seen, watching


class FiringRates:
    """Spikes per neuron and time step of each layer, counted over the calls inside :meth:`measuring`.

    Args:
        layers: Modules by name. A layer's output is its spikes, or a tuple that begins with them. Layers whose spikes
            are not a tensor, such as the spike trains of exact layers, have no rate per step and are left out.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.clear()

    def clear(self) -> None:
        """Forget everything measured so far."""
        self._spikes: dict[str, Tensor | float] = dict.fromkeys(self.layers, 0.0)
        self._steps: dict[str, float] = dict.fromkeys(self.layers, 0.0)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the spikes inside the block, see :func:`~qif_plugins.neuron.observe.watching`."""
        with watching(self.layers, self._count):
            yield

    def _count(self, seen: Seen) -> None:
        spikes = seen.spikes
        if isinstance(spikes, Tensor):
            # Apple's GPUs have no float64.
            wide = torch.float32 if spikes.device.type == "mps" else torch.float64
            self._spikes[seen.name] = self._spikes[seen.name] + spikes.detach().sum(dtype=torch.float32).to(wide)
            self._steps[seen.name] += spikes.numel()

    def sums(self) -> list[float]:
        """Return the number of spikes of each layer, then its number of neuron-steps."""
        return [float(spikes) for spikes in self._spikes.values()] + list(self._steps.values())

    def restore(self, sums: list[float]) -> None:
        """Restore the numbers that :meth:`sums` returned."""
        half = len(self.layers)
        self._spikes = dict(zip(self.layers, sums[:half], strict=True))
        self._steps = dict(zip(self.layers, sums[half:], strict=True))

    def rates(self) -> dict[str, float]:
        """Return the spikes per neuron-step by layer; layers that were not called are left out."""
        return {name: float(self._spikes[name]) / steps for name, steps in self._steps.items() if steps}

    def mean(self) -> float | None:
        """Return the spikes per neuron-step over all layers together; ``None`` if no layer was called."""
        steps = sum(self._steps.values())
        return sum(map(float, self._spikes.values())) / steps if steps else None
