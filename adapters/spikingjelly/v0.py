"""QIF nodes for SpikingJelly 0.0.0.0.14: a backend argument, overridable charge, fire and reset."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based import base, neuron
from torch import Tensor
from typing_extensions import Unpack

from qif_plugins.ops.backends import BackendName

from .arguments import NodeOptions, StepMode, show_options
from .node import QIFNeuron, broadcast, overridden
from .parametric import ParametricQIFNeuron

HOOKS = ("neuronal_charge", "neuronal_fire", "neuronal_reset")


class HookedNeuron(QIFNeuron):
    """The charge and the spike as the methods that a subclass, or a step-by-step user, of the host's node calls."""

    def neuronal_charge(self, x: Tensor) -> None:
        """h = f(v) + g x, into ``v``."""
        params, _ = self._neuron(x, single=True)
        self.v = params.map(self.v) + params.input_gain * x

    def neuronal_fire(self) -> Any:
        """The spikes of ``v``."""
        if self.learns_window:
            self._followed()  # a charge of a subclass's own may have passed it by
        return self.surrogate_function(self.v - self.params.v_threshold)


class QIFNode(HookedNeuron, neuron.BaseNode):
    """Discretized quadratic integrate-and-fire neuron in the place of SpikingJelly's ``LIFNode``.

    The equations and the arguments are those of :class:`..v2.QIFNode`, in the order of this version's LIFNode. Both
    step modes have the gradients of one call over all steps. A subclass that overrides ``neuronal_charge``,
    ``neuronal_fire``, ``neuronal_reset`` or ``single_step_forward`` runs step by step through them, as in the host.

    Args:
        backend: ``"auto"`` (default) or an implementation by name, in either step mode. LIFNode's default is
            ``"torch"``, which asks for the reference here: every implementation gives the same bits, so the
            fastest is taken unless one is asked for. ``functional.set_backend(net, "cupy")`` selects CuPy.

    Raises:
        ImportError: ``backend="cupy"`` without CuPy.
    """

    @show_options
    def __init__(
        self, tau: float | None = None, decay_input: bool | None = None, v_threshold: float = 1.0,
        v_reset: float | None = 0.0, surrogate_function: Any = None, detach_reset: bool = False,
        step_mode: StepMode = "s", backend: BackendName = "auto", store_v_seq: bool = False,
        **options: Unpack[NodeOptions],
    ) -> None:  # fmt: skip
        self._construct(
            tau, decay_input, v_threshold, v_reset, surrogate_function, backend, options,
            detach_reset=detach_reset, step_mode=step_mode, store_v_seq=store_v_seq,
        )  # fmt: skip

    @QIFNeuron.backend.setter  # type: ignore[attr-defined]
    def backend(self, value: BackendName) -> None:
        if value == "cupy":
            base.check_backend_library(value)  # LIFNode asks for the library when the backend is set, too
        QIFNeuron.backend.fset(self, value)  # type: ignore[attr-defined]

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One time step ``[N, *]``."""
        if overridden(self, QIFNode, *HOOKS):
            return super().single_step_forward(x)
        spike, self.v, _ = self._run(*broadcast(x, self.v, single=True), single=True)
        return spike

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """All time steps ``[T, N, *]``."""
        if overridden(self, QIFNode, *HOOKS, "single_step_forward"):
            return super().multi_step_forward(x_seq)
        spike_seq, self.v, v_seq = self._run(*broadcast(x_seq, self.v), self.store_v_seq)
        if self.store_v_seq:
            self.v_seq = v_seq
        return spike_seq


class ParametricQIFNode(ParametricQIFNeuron, QIFNode):
    """QIF neuron that learns a, u1 and u2, in the place of SpikingJelly's ``ParametricLIFNode``.

    The arguments are those of :class:`..v2.ParametricQIFNode`, in the order of this version's ParametricLIFNode.
    """

    @show_options
    def __init__(
        self, init_tau: float | None = None, decay_input: bool | None = None, v_threshold: float = 1.0,
        v_reset: float | None = 0.0, surrogate_function: Any = None, detach_reset: bool = False,
        step_mode: StepMode = "s", backend: BackendName = "auto", store_v_seq: bool = False, *,
        channels: int | None = None, **options: Unpack[NodeOptions],
    ) -> None:  # fmt: skip
        super().__init__(
            init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend,
            store_v_seq, **options,
        )  # fmt: skip
        self._learn(channels)
