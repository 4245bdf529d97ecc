"""Discretized quadratic integrate-and-fire neurons for SpikingJelly and snnTorch.

The names below are the public ones; the neurons themselves live in the adapters,
``qif_plugins.adapters.spikingjelly`` and ``qif_plugins.adapters.snntorch``. No host framework is imported
until an adapter is.
"""

from .functional import available_backends, qif_multi_step, qif_step
from .moments import MomentClosureError, firing_rate, membrane_moments
from .parameters import QIFParameters
from .surrogate import ATan, FastSigmoid, Sigmoid, Window

__version__ = "0.1.0"

__all__ = [
    "ATan",
    "FastSigmoid",
    "MomentClosureError",
    "QIFParameters",
    "Sigmoid",
    "Window",
    "available_backends",
    "firing_rate",
    "membrane_moments",
    "qif_multi_step",
    "qif_step",
]
