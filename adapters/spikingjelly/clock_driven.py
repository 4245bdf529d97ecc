"""QIF nodes for ``spikingjelly.clock_driven`` of SpikingJelly 0.0.0.0.14, which Spikformer-era projects use.

There, the single-step and the multi-step neuron are two classes, and a multi-step one always keeps ``v_seq``.
"""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.clock_driven import neuron, surrogate
from torch import Tensor
from typing_extensions import Unpack

from qif_plugins.ops.backends import BackendName

from .arguments import NodeOptions, show_options
from .node import broadcast, overridden
from .surrogate import AnalyticGaussianBase, AnalyticWindowBase, CudaText
from .v0 import HOOKS, HookedNeuron


class AnalyticWindow(AnalyticWindowBase, CudaText, surrogate.MultiArgsSurrogateFunctionBase):
    """The window as a ``clock_driven`` surrogate, with the arguments of :class:`..surrogate.AnalyticWindow`."""


class AnalyticGaussian(AnalyticGaussianBase, CudaText, surrogate.MultiArgsSurrogateFunctionBase):
    """The Gaussian as a ``clock_driven`` surrogate, with the arguments of :class:`..surrogate.AnalyticGaussian`."""


class QIFNode(HookedNeuron, neuron.BaseNode):
    """One time step of the QIF neuron in the place of ``clock_driven.neuron.LIFNode``.

    The first arguments are LIFNode's, in its order; the others and the equations are those of :class:`..v2.QIFNode`.

    Args:
        cupy_fp32_inference: Whether to use CuPy in eval mode on a GPU in float32, regardless of ``backend``.
            Default False.
    """

    surrogates = AnalyticWindow, AnalyticGaussian

    @show_options
    def __init__(
        self, tau: float | None = None, decay_input: bool | None = None, v_threshold: float = 1.0,
        v_reset: float | None = 0.0, surrogate_function: Any = None, detach_reset: bool = False,
        cupy_fp32_inference: bool = False, *, backend: BackendName = "auto", **options: Unpack[NodeOptions],
    ) -> None:  # fmt: skip
        self._construct(
            tau, decay_input, v_threshold, v_reset, surrogate_function, backend, options, detach_reset=detach_reset
        )
        if cupy_fp32_inference:
            neuron.check_backend("cupy")
        self.cupy_fp32_inference = cupy_fp32_inference

    def register_memory(self, name: str, value: Any) -> None:
        """Register state as the host does, but not the threshold and the reset potential, which it counts as state."""
        if name not in ("v_threshold", "v_reset"):
            super().register_memory(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """One time step ``[N, *]``."""
        if overridden(self, QIFNode, *HOOKS):
            return super().forward(x)
        spike, self.v, _ = self._run(*broadcast(x, self.v, single=True), single=True)
        return spike

    def _implementation(self, x: Tensor) -> BackendName:
        if self.cupy_fp32_inference and not self.training and x.is_cuda and x.dtype == torch.float32:
            return "cupy"
        return self.backend


class MultiStepQIFNode(QIFNode):
    """All time steps of the QIF neuron in the place of ``clock_driven.neuron.MultiStepLIFNode``.

    The first arguments are MultiStepLIFNode's, in its order; the others and the equations are those of
    :class:`..v2.QIFNode`. After a forward, ``v_seq`` holds the membrane of every step and ``v`` the last one, until
    ``reset()``.

    Args:
        backend: As for :class:`..v0.QIFNode`; MultiStepLIFNode's default is ``"torch"``, too.
        lava_s_cale: Kept for code that reads it; there is no Lava neuron of this kind.
    """

    v_seq: Any

    @show_options
    def __init__(
        self, tau: float | None = None, decay_input: bool | None = None, v_threshold: float = 1.0,
        v_reset: float | None = 0.0, surrogate_function: Any = None, detach_reset: bool = False,
        backend: BackendName = "auto", lava_s_cale: int = 1 << 6, **options: Unpack[NodeOptions],
    ) -> None:  # fmt: skip
        super().__init__(
            tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, backend=backend, **options
        )
        if backend == "cupy":
            neuron.check_backend(backend)
        self.register_memory("v_seq", None)
        self.lava_s_cale = lava_s_cale

    def forward(self, x_seq: Tensor) -> Tensor:
        """All time steps ``[T, N, *]``."""
        if x_seq.dim() < 2:
            raise ValueError(f"a multi-step node takes [T, N, *], got shape {list(x_seq.shape)}")
        if overridden(self, QIFNode, *HOOKS):
            steps = []
            for x in x_seq:
                spike = super().forward(x)
                steps.append((spike, self.v))
            spike_seq, self.v_seq = (torch.stack(sequence) for sequence in zip(*steps, strict=True))
            return spike_seq
        spike_seq, self.v, self.v_seq = self._run(*broadcast(x_seq, self.v), store_v_seq=True)
        return spike_seq
