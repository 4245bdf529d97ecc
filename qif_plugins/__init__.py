"""Discretized quadratic integrate-and-fire neurons for SpikingJelly and snnTorch.

The names below are the public ones; the neurons themselves live in the adapters,
``qif_plugins.adapters.spikingjelly`` and ``qif_plugins.adapters.snntorch``. No host framework is imported
until an adapter is.
"""

from typing import TYPE_CHECKING, Any

from .functional import available_backends, qif_multi_step, qif_step
from .moments import MomentClosureError, firing_rate, membrane_moments
from .parameters import QIFParameters
from .surrogate import ATan, FastSigmoid, Sigmoid, Window

if TYPE_CHECKING:
    from .calibration import calibrate
    from .convert import swap
    from .healthcheck import health
    from .registration import register, unregister

__version__ = "0.1.0"

__all__ = [
    "ATan",
    "FastSigmoid",
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
        from . import registration

        return getattr(registration, name)
    if name == "calibrate":
        from .calibration import calibrate

        return calibrate
    if name == "health":
        from .healthcheck import health

        return health
    if name == "swap":
        from .convert import swap

        return swap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
