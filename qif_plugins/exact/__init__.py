"""Continuous-time neurons whose spike times, and their gradients, are exact.

Layers take and return :class:`Spikes`, padded arrays of times and neuron indices, and can be stacked with
``nn.Sequential``. The mathematics is in docs/exact.md. Needs Numba (``pip install 'qif-plugins[cpu]'``); runs on the
CPU.
"""

try:
    import numba  # noqa: F401
except ImportError as error:
    raise ImportError("qif_plugins.exact needs Numba: pip install 'qif-plugins[cpu]'") from error

from .adjoint import EventBudgetError
from .encoders import encode_images, pad_events
from .functional import EndState, LayerOutput, Traces, spiking_layer
from .initialisation import initialise
from .layers import LIFLayer, OscillatingLIFLayer, QIFLayer, SpikingLayer, ThetaLayer
from .losses import count_cross_entropy, first_spike_cross_entropy, spike_count_loss, spike_time_loss
from .spikes import Spikes

__all__ = [
    "EndState", "EventBudgetError", "LIFLayer", "LayerOutput", "OscillatingLIFLayer", "QIFLayer", "Spikes",
    "SpikingLayer", "ThetaLayer", "Traces", "count_cross_entropy", "encode_images", "first_spike_cross_entropy",
    "initialise", "pad_events", "spike_count_loss", "spike_time_loss", "spiking_layer",
]  # fmt: skip
