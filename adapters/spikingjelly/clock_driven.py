"""QIF nodes for ``spikingjelly.clock_driven`` of SpikingJelly 0.0.0.0.14, which Spikformer-era projects use.

There, the single-step and the multi-step neuron are two classes, and a multi-step one always keeps ``v_seq``.
"""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.clock_driven import neuron, surrogate
from torch import Tensor

from qif_plugins.neuron.parameters import Number
from qif_plugins.neuron.surrogate import Gaussian, Window

from ._common import QIFNeuron, fused_surrogates, resolve
from .surrogate import CudaAnalyticGaussianBase, CudaAnalyticWindowBase
from .v0 import HOOKS, overridden

__all__ = ["AnalyticGaussian", "AnalyticWindow", "MultiStepQIFNode", "QIFNode"]


class AnalyticWindow(CudaAnalyticWindowBase, surrogate.MultiArgsSurrogateFunctionBase):
    """The rectangular window as a ``clock_driven`` surrogate; see :class:`..v0.AnalyticWindow`."""

    def __init__(self, lo: Number = -0.5, hi: Number = 0.5, height: Number = 1.0, spiking: bool = True) -> None:
        Window(lo, hi, height)  # checks
        super().__init__(spiking)
        self.lo, self.hi, self.height = lo, hi, height


class AnalyticGaussian(CudaAnalyticGaussianBase, surrogate.MultiArgsSurrogateFunctionBase):
    """The Gaussian as a ``clock_driven`` surrogate; see :class:`qif_plugins.Gaussian`.

    Build it from a neuron with :meth:`isometric`.

    Args:
        height: Value at the threshold, > 0. Default 1.
        width: Standard deviation, in units of the membrane, > 0. Default 0.5.
        spiking: As in the host: spikes with the Gaussian as gradient, or its integral. Default True.

    Raises:
        ValueError: As :class:`qif_plugins.Gaussian`.
    """

    def __init__(self, height: Number = 1.0, width: Number = 0.5, spiking: bool = True) -> None:
        Gaussian(height, width)  # checks
        super().__init__(spiking)
        self.height, self.width = height, width


class QIFNode(QIFNeuron, neuron.BaseNode):
    """One time step of the QIF neuron in the place of ``clock_driven.neuron.LIFNode``.

    The first arguments are LIFNode's, in its order; the others and the equations are those of
    :class:`qif_plugins.adapters.spikingjelly.QIFNode`.

    Args:
        cupy_fp32_inference: Whether to take CuPy in eval mode on a GPU in float32, whatever ``backend`` says.
            Default False.
        backend: ``"auto"`` (default) or an implementation by name.
    """

    analytic_window = AnalyticWindow
    analytic_gaussian = AnalyticGaussian
    fused_surrogates = fused_surrogates(surrogate)

    def __init__(
        self,
        tau: float | None = None,
        decay_input: bool | None = None,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        cupy_fp32_inference: bool = False,
        *,
        a: float | None = None,
        u1: float | None = None,
        u2: float | None = None,
        input_gain: float | None = None,
        dynamics: str | None = None,
        window: str | Window | None = None,
        backend: str = "auto",
    ) -> None:
        resolved = resolve(
            tau, decay_input, v_threshold, v_reset, a=a, u1=u1, u2=u2, input_gain=input_gain, dynamics=dynamics
        )
        arguments = self._configure(*resolved, surrogate_function, window)
        self.backend = backend
        if cupy_fp32_inference:
            neuron.check_backend("cupy")
        super().__init__(**arguments, detach_reset=detach_reset)
        self.cupy_fp32_inference = cupy_fp32_inference

    def register_memory(self, name: str, value: Any) -> None:
        """As the host's, except for the threshold and the reset potential, which it counts as state."""
        if name not in ("v_threshold", "v_reset"):
            super().register_memory(name, value)

    def neuronal_charge(self, x: Tensor) -> None:
        """h = f(v) + g x, into ``v``; what a subclass or a step-by-step user of the host's interface calls."""
        params, _ = self._neuron(x.unsqueeze(0))
        self.v = params.map(self.v) + params.input_gain * x

    def neuronal_fire(self) -> Any:
        """The spikes of ``v``."""
        return self.surrogate_function(self.v - self.params.v_threshold)

    def forward(self, x: Tensor) -> Tensor:
        """One time step ``[N, *]``."""
        if overridden(self, QIFNode, HOOKS):
            return super().forward(x)
        spike, self.v, _ = self._run(*self._broadcast(x, single=True), single=True)
        return spike

    def _implementation(self, x_seq: Tensor) -> str:
        if self.cupy_fp32_inference and not self.training and x_seq.is_cuda and x_seq.dtype == torch.float32:
            return "cupy"
        return self.backend


class MultiStepQIFNode(QIFNode):
    """All time steps of the QIF neuron in the place of ``clock_driven.neuron.MultiStepLIFNode``.

    The first arguments are MultiStepLIFNode's, in its order; the others and the equations are those of
    :class:`qif_plugins.adapters.spikingjelly.QIFNode`. After a forward, ``v_seq`` holds the membrane of every step
    and ``v`` the last one, until ``reset()``.

    Args:
        backend: ``"auto"`` (default) or an implementation by name. MultiStepLIFNode's default is ``"torch"``, which
            asks for the reference here: every implementation gives the same bits, so the fastest is taken
            unless one is asked for.
        lava_s_cale: Kept for code that reads it; there is no Lava neuron of this kind.
    """

    v_seq: Any

    def __init__(
        self,
        tau: float | None = None,
        decay_input: bool | None = None,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        backend: str = "auto",
        lava_s_cale: int = 1 << 6,
        *,
        a: float | None = None,
        u1: float | None = None,
        u2: float | None = None,
        input_gain: float | None = None,
        dynamics: str | None = None,
        window: str | Window | None = None,
    ) -> None:
        super().__init__(
            tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset,
            a=a, u1=u1, u2=u2, input_gain=input_gain, dynamics=dynamics, window=window, backend=backend,
        )  # fmt: skip
        if backend == "cupy":
            neuron.check_backend(backend)
        self.register_memory("v_seq", None)
        self.lava_s_cale = lava_s_cale

    def forward(self, x_seq: Tensor) -> Tensor:
        """All time steps ``[T, N, *]``."""
        if x_seq.dim() < 2:
            raise ValueError(f"a multi-step node takes [T, N, *], got shape {list(x_seq.shape)}")
        if overridden(self, QIFNode, HOOKS):
            steps = []
            for x in x_seq:
                spike = super().forward(x)
                steps.append((spike, self.v))
            spike_seq, self.v_seq = (torch.stack(sequence) for sequence in zip(*steps, strict=True))
            return spike_seq
        spike_seq, self.v, self.v_seq = self._run(*self._broadcast(x_seq), store_v_seq=True)
        return spike_seq
