"""QIF neurons for SpikingJelly 2, for 0.0.0.0.14, and for 0.0.0.0.14's ``clock_driven``.

The interfaces of the installed version decide which of them is imported. Names: :class:`QIFNode`,
:class:`ParametricQIFNode`, :class:`AnalyticGaussian`, :class:`AnalyticWindow` and, where the host has ``clock_driven``,
``MultiStepQIFNode``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

try:
    from spikingjelly.activation_based import base as _base
except ImportError as error:
    raise ImportError(
        "qif_plugins.adapters.spikingjelly needs SpikingJelly: pip install spikingjelly (2.x or 0.0.0.0.14)"
    ) from error

from .surrogate import AnalyticGaussian, AnalyticWindow

if hasattr(_base.MemoryModule, "single_step_functional_forward"):
    from .counters import teach_counters
    from .v2 import ParametricQIFNode, QIFNode

    teach_counters()
elif hasattr(_base.MemoryModule, "supported_backends"):
    from .v0 import ParametricQIFNode, QIFNode  # type: ignore[assignment]
else:
    raise ImportError(
        f"the SpikingJelly at {_base.__file__} has neither MemoryModule.single_step_functional_forward (2.x) nor "
        "MemoryModule.supported_backends (0.0.0.0.14); install one of these versions"
    )

__all__ = ["AnalyticGaussian", "AnalyticWindow", "ParametricQIFNode", "QIFNode"]

_HAS_CLOCK_DRIVEN = find_spec("spikingjelly.clock_driven") is not None
if _HAS_CLOCK_DRIVEN:
    __all__ += ["MultiStepQIFNode"]


def __getattr__(name: str) -> Any:
    if name == "QIF":  # no AttributeError, whose message "from ... import QIF" would not show
        raise ImportError("QIF is snnTorch's neuron, in qif_plugins.adapters.snntorch; SpikingJelly's is QIFNode")
    if name != "MultiStepQIFNode":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HAS_CLOCK_DRIVEN:
        raise ImportError(
            "MultiStepQIFNode is for spikingjelly.clock_driven, which the installed SpikingJelly does not have; "
            "SpikingJelly 0.0.0.0.14 has it. On this version use QIFNode(..., step_mode='m')."
        )
    from .clock_driven import MultiStepQIFNode

    return MultiStepQIFNode
