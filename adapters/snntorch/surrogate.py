"""Surrogates as snnTorch's neurons take them, functions of mem - θ, and the analytic window as one of them."""

from __future__ import annotations

import inspect
import numbers
from typing import Any

from torch import Tensor

from qif_plugins.neuron.module import checked_window
from qif_plugins.neuron.names import DEFAULT_WINDOW, WindowName
from qif_plugins.neuron.parameters import Number, QIFParameters
from qif_plugins.neuron.surrogate import ATan, FastSigmoid, FusedSurrogate, Sigmoid, Window, spike

HOST_SURROGATES: dict[str, tuple[str, type[Any]]] = {
    "atan.<locals>.inner": ("alpha", ATan),
    "fast_sigmoid.<locals>.inner": ("slope", FastSigmoid),
    "sigmoid.<locals>.inner": ("slope", Sigmoid),
}


class SpikeGradient:
    """A surrogate as snnTorch's neurons call it: takes mem - θ, returns the spike. Can be pickled.

    Args:
        surrogate: The derivative; a :class:`~qif_plugins.neuron.surrogate.Window` has its ends relative to the
            threshold here.
    """

    def __init__(self, surrogate: FusedSurrogate) -> None:
        self.surrogate = surrogate

    def __call__(self, x: Tensor) -> Tensor:
        return spike(x, 0.0, self.surrogate)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.surrogate})"


class Heaviside:
    """The spike without a gradient."""

    def __call__(self, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)

    def __repr__(self) -> str:
        return "disabled"


def analytic_window(
    params: QIFParameters | None = None,
    window: WindowName | Window = DEFAULT_WINDOW,
    input_std: Number | None = None,
    **options: Any,
) -> SpikeGradient:
    """A surrogate that follows from the membrane's moments, as a ``spike_grad`` for snnTorch's own neurons.

    It fires at mem >= θ. The surrogate is derived for ``params`` once and placed relative to the threshold
    of the neuron that uses it, which should be that of ``params``::

        snn.Leaky(beta=0.9, spike_grad=analytic_window(QIFParameters.matching_lif(0.9)))

    Args:
        params: The neuron whose membrane statistics give the window. ``None`` (default) means the paper's.
        window: ``"isometric"`` (default, a Gaussian), ``"unbiased"``, ``"paper"``, ``"heuristic"``, or a
            :class:`~qif_plugins.neuron.surrogate.Window` in units of the membrane.
        input_std: Standard deviation of the input. ``None`` (default) means θ.
        **options: For the named window, see :meth:`~qif_plugins.neuron.surrogate.Window.unbiased`.

    Raises:
        ValueError: Unknown window.
        TypeError: ``params`` are not QIFParameters.
        MomentClosureError: The moments do not converge.
    """
    params = QIFParameters() if params is None else params
    if not isinstance(params, QIFParameters):
        raise TypeError(f"params must be QIFParameters, got {params!r}; a window by name is window=")
    window = checked_window(window)
    derived = Window.named(window, params, input_std, **options) if isinstance(window, str) else window
    return SpikeGradient(derived.shifted(-params.v_threshold))


def recognised(spike_grad: Any) -> Any:
    """snnTorch's closures as the surrogates that the kernels have, which can also be pickled."""
    name = getattr(spike_grad, "__qualname__", None)
    if getattr(spike_grad, "__module__", None) == "snntorch.surrogate" and name in HOST_SURROGATES:
        variable, kind = HOST_SURROGATES[name]
        value = inspect.getclosurevars(spike_grad).nonlocals.get(variable)
        if isinstance(value, numbers.Real) and float(value) > 0:  # NumPy's, too; a tensor's value may change
            return SpikeGradient(kind(float(value), strict=True))
    return spike_grad
