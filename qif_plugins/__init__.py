"""Discretized quadratic integrate-and-fire neurons for SpikingJelly and snnTorch.

The names below are the public ones; the neurons themselves live in the adapters,
``qif_plugins.adapters.spikingjelly`` and ``qif_plugins.adapters.snntorch``. No host framework is imported
until an adapter is.
"""

from typing import TYPE_CHECKING, Any

from .neuron.functional import available_backends, qif_multi_step, qif_step
from .neuron.moments import MomentClosureError, firing_rate, membrane_moments
from .neuron.parameters import QIFParameters
from .neuron.surrogate import ATan, FastSigmoid, Gaussian, Sigmoid, Window

if TYPE_CHECKING:
    from .convert import swap
    from .convert.namespaces import register, unregister
    from .diagnostics.calibration import calibrate
    from .diagnostics.health import health

__version__ = "0.1.0"

__all__ = [
    "ATan",
    "FastSigmoid",
    "Gaussian",
    "MomentClosureError",
    "QIFParameters",
    "Sigmoid",
    "Window",
    "available_backends",
    "calibrate",
    "firing_rate",
    "health",
    "membrane_moments",
    "qif_multi_step",
    "qif_step",
    "register",
    "swap",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name in ("register", "unregister"):
        from .convert import namespaces as registration

        return getattr(registration, name)
    if name == "calibrate":
        from .diagnostics.calibration import calibrate

        return calibrate
    if name == "health":
        from .diagnostics.health import health

        return health
    if name == "swap":
        from .convert import swap

        return swap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
