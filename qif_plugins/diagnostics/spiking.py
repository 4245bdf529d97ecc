"""Which modules of a model spike, and how often."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron.module import QIFLayer
from ..neuron.observe import Seen, watching

__all__ = ["FiringRates", "spiking_layers"]

_BASES = (
    ("spikingjelly.activation_based.base", "MemoryModule"),
    ("spikingjelly.clock_driven.base", "MemoryModule"),
    ("snntorch._neurons", "SpikingNeuron"),
)
_EXACT = "qif_plugins.exact.layers", "SpikingLayer"


def spiking_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The spiking layers of a model by name, in its order: QIF layers, either host's neurons, and exact layers.

    A host's neuron that does not spike is left out, as are other modules with a memory: a neuron that does has a
    threshold. One's own neuron is found if it derives from the host's base class.

    Args:
        model: Any module. A model that is itself a spiking layer has the name ``"(model)"``.
    """
    bases = (QIFLayer, *_loaded(_BASES))
    exact = _loaded((_EXACT,))
    return {
        name or "(model)": module
        for name, module in model.named_modules()
        if isinstance(module, exact)
        or (isinstance(module, bases) and (hasattr(module, "v_threshold") or hasattr(module, "threshold")))
    }


def _loaded(classes: tuple[tuple[str, str], ...]) -> tuple[Any, ...]:
    """Those of the classes whose modules were imported; a model cannot have others."""
    found = (getattr(sys.modules.get(path), name, None) for path, name in classes)
    return tuple(kind for kind in found if kind is not None)


class FiringRates:
    """Spikes per neuron-step of each of some layers, over the calls made inside :meth:`measuring`.

    Args:
        layers: Modules by name. A layer's output is its spikes, or a tuple that begins with them; one whose spikes are
            no tensor, such as an exact layer's trains, has no rate per step and is left out.
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
        """Count inside the block, see :func:`~qif_plugins.neuron.observe.watching`."""
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
        """Spikes of each layer, then neuron-steps of each."""
        return [float(spikes) for spikes in self._spikes.values()] + list(self._steps.values())

    def restore(self, sums: list[float]) -> None:
        """Set what :meth:`sums` returned."""
        half = len(self.layers)
        self._spikes = dict(zip(self.layers, sums[:half], strict=True))
        self._steps = dict(zip(self.layers, sums[half:], strict=True))

    def rates(self) -> dict[str, float]:
        """Spikes per neuron-step by layer; layers that were not called are left out."""
        return {name: float(self._spikes[name]) / steps for name, steps in self._steps.items() if steps}

    def mean(self) -> float | None:
        """Spikes per neuron-step over all layers together, ``None`` if none was called."""
        steps = sum(self._steps.values())
        return sum(map(float, self._spikes.values())) / steps if steps else None
