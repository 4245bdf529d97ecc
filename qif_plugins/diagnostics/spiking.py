"""Find the spiking layers of a model."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..neuron.module import QIFLayer

__all__ = ["spiking_layers"]

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
