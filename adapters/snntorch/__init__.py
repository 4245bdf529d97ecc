"""QIF neurons for snnTorch: :class:`QIF` in the place of ``snn.Leaky``, and the window for any of its neurons."""

from __future__ import annotations

try:
    import snntorch as _snntorch  # noqa: F401
except ImportError as error:
    raise ImportError("qif_plugins.adapters.snntorch needs snnTorch: pip install 'snntorch>=1.0'") from error

from .neuron import QIF
from .nir import refuse_export
from .surrogate import SpikeGradient, analytic_window

__all__ = ["QIF", "SpikeGradient", "analytic_window"]

refuse_export()
