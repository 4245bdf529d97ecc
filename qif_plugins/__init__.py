"""Discretized quadratic integrate-and-fire neurons for SpikingJelly and snnTorch.

The neurons themselves are in the adapters, ``qif_plugins.adapters.spikingjelly`` and ``qif_plugins.adapters.snntorch``;
an adapter imports its host. The names of this module are imported on first use. ``import qif_plugins`` registers the
operators, which a program saved by ``torch.export.save`` needs; only the ``qif`` command, which answers ``--help``
without PyTorch, leaves that to the subcommand.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .convert import swap
    from .convert.namespaces import register, unregister
    from .diagnostics.calibration import calibrate
    from .diagnostics.health import health
    from .diagnostics.initialisation import initialise
    from .neuron.functional import qif_multi_step, qif_step
    from .neuron.moments import MomentClosureError, firing_rate, membrane_moments
    from .neuron.parameters import QIFParameters
    from .neuron.surrogate import ATan, FastSigmoid, Gaussian, Sigmoid, Window
    from .ops.backends import available_backends

__version__ = "1.0.0"

__all__ = [
    "ATan", "FastSigmoid", "Gaussian", "MomentClosureError", "QIFParameters", "Sigmoid", "Window", "available_backends",
    "calibrate", "firing_rate", "health", "initialise", "membrane_moments", "qif_multi_step", "qif_step", "register",
    "swap", "unregister",
]  # fmt: skip

_HOMES = {
    ".convert": ("swap",),
    ".convert.namespaces": ("register", "unregister"),
    ".diagnostics.calibration": ("calibrate",),
    ".diagnostics.health": ("health",),
    ".diagnostics.initialisation": ("initialise",),
    ".neuron.functional": ("qif_multi_step", "qif_step"),
    ".neuron.moments": ("MomentClosureError", "firing_rate", "membrane_moments"),
    ".neuron.parameters": ("QIFParameters",),
    ".neuron.surrogate": ("ATan", "FastSigmoid", "Gaussian", "Sigmoid", "Window"),
    ".ops.backends": ("available_backends",),
}
"""The module of each public name."""

_ADAPTERS = {
    "AnalyticGaussian": "spikingjelly",
    "AnalyticWindow": "spikingjelly",
    "MultiStepQIFNode": "spikingjelly",
    "ParametricQIFNode": "spikingjelly",
    "QIF": "snntorch",
    "QIFNode": "spikingjelly",
    "SpikeGradient": "snntorch",
    "analytic_window": "snntorch",
}
"""The adapter of each name that belongs to a host."""


if not TYPE_CHECKING:  # a type checker knows the names above, and would believe any other

    def __getattr__(name):
        for module, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(module, __name__), name)
                return value
        if name in _ADAPTERS:
            # An AttributeError would lose its text in "from qif_plugins import ...".
            raise ImportError(f"{name} belongs to a host: from qif_plugins.adapters.{_ADAPTERS[name]} import {name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if Path(sys.argv[0] if sys.argv else "").stem not in ("qif", "-m"):  # "-m": python -m qif_plugins.cli
    import_module(".ops", __name__)
