"""QIF nodes for SpikingJelly 0.0.0.0.14: a backend argument, overridable charge, fire and reset."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based import base, neuron, surrogate
from torch import Tensor, nn

from qif_plugins.neuron.parameters import Number
from qif_plugins.neuron.surrogate import Gaussian, Window

from ._common import QIFNeuron, fused_surrogates, resolve
from .parametric import ParametricQIFNeuron
from .surrogate import CudaAnalyticGaussianBase, CudaAnalyticWindowBase

__all__ = ["AnalyticGaussian", "AnalyticWindow", "ParametricQIFNode", "QIFNode"]

HOOKS = ("neuronal_charge", "neuronal_fire", "neuronal_reset")


class AnalyticWindow(CudaAnalyticWindowBase, surrogate.MultiArgsSurrogateFunctionBase):
    """The rectangular window as a SpikingJelly surrogate, for our nodes and the host's alike, CuPy kernels included.

    Build it from a neuron with :meth:`unbiased`, :meth:`paper` or :meth:`heuristic`.

    Args:
        lo: Lower end relative to the threshold. Default -0.5.
        hi: Upper end relative to the threshold, above ``lo``. Default 0.5.
        height: Value inside, > 0. Default 1.
        spiking: As in the host: spikes with the window as gradient, or the integral of the window. Default True.

    Raises:
        ValueError: As :class:`qif_plugins.neuron.surrogate.Window`.
    """

    def __init__(self, lo: Number = -0.5, hi: Number = 0.5, height: Number = 1.0, spiking: bool = True) -> None:
        Window(lo, hi, height)  # checks
        super().__init__(spiking)
        self.lo, self.hi, self.height = lo, hi, height


class AnalyticGaussian(CudaAnalyticGaussianBase, surrogate.MultiArgsSurrogateFunctionBase):
    """The Gaussian as a SpikingJelly surrogate, CuPy kernels included; see :class:`qif_plugins.Gaussian`.

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
    """Discretized quadratic integrate-and-fire neuron in the place of SpikingJelly's ``LIFNode``.

    ::

        f(v) = a (v - u1)(v - u2)
        h[t] = f(v[t-1]) + g x[t];   s[t] = 1 if h[t] >= θ else 0;   v[t] = v_reset if s[t] else h[t]

    The first arguments are LIFNode's, in its order. A leak that is passed (``tau``, ``decay_input``) is matched, see
    :meth:`qif_plugins.QIFParameters.matching_lif`; without one the parameters are those of arXiv 2510.05168.
    Both step modes have the gradients of one call over all steps. A subclass that overrides ``neuronal_charge``,
    ``neuronal_fire``, ``neuronal_reset`` or ``single_step_forward`` runs step by step through them, as in the host.
    For that (and for half precision) the next step starts from a membrane kept beside ``v``. A write to ``v``
    between two steps is noticed and drops it, except one to the same memory through ``v.data`` and one in place around
    a step under torch.compile: assign the new membrane there, ``node.v = ...``.

    All of them may be assigned after construction, with the effect and the checks that they have here. A
    ``v_threshold`` that is then an ``nn.Parameter``, or another tensor with gradient, is learned, and kept where the
    membrane is stable; a named window follows it.

    Args:
        tau: LIF's time constant to match, in steps, > 1. Left out: no leak is matched (with ``decay_input`` alone, 2).
        decay_input: Whether the LIF neuron to match scales its input by 1/tau. Left out with a ``tau``: True.
        v_threshold: Threshold θ, below the unstable fixed point of the map. Default 1.
        v_reset: Membrane after a spike and at the start; what a matched leak decays to. Default 0. ``None`` subtracts
            the threshold instead; a QIF membrane is then unbounded.
        surrogate_function: A surrogate of the host, used as passed. ATan, Sigmoid, Erf and :class:`AnalyticWindow`
            run fused, others on the reference. Left out: the analytic window.
        detach_reset: Whether the reset passes no gradient to the spike. Default False.
        step_mode: ``"s"`` (default) or ``"m"``.
        backend: ``"auto"`` (default) or an implementation by name, in either step mode. LIFNode's default is
            ``"torch"``, which asks for the reference here: every implementation gives the same bits, so the
            fastest is taken unless one is asked for. ``functional.set_backend(net, "cupy")`` selects CuPy.
        store_v_seq: Whether to keep the membrane of every step in ``v_seq`` in multi-step mode. Default False.
        a: Curvature of the map; any of ``a``, ``u1``, ``u2`` sets the leak aside. Paper's value 0.25.
        u1: First root of the map. Paper's value 0.
        u2: Second root of the map. Paper's value 0.5.
        input_gain: Factor g on the input. Default 1, or 1/tau where a leak with ``decay_input`` is matched.
        dynamics: ``"paper"`` or ``"lif"`` to decide regardless of the leak, which is then set aside, as ``repr``
            shows; see :mod:`qif_plugins.neuron.arguments`. Default: by the other arguments.
        window: ``"unbiased"`` (default), ``"isometric"``, ``"paper"``, ``"heuristic"`` or a
            :class:`~qif_plugins.Window`.

    Raises:
        ValueError: ``dynamics`` together with a, u1 or u2, ``window`` together with ``surrogate_function``, an unknown
            name, or parameters that :class:`~qif_plugins.QIFParameters` refuses.
        TypeError: A number that is none, or a ``surrogate_function`` that cannot be called.
        ImportError: ``backend="cupy"`` without CuPy.
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
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        a: float | None = None,
        u1: float | None = None,
        u2: float | None = None,
        input_gain: float | None = None,
        dynamics: str | None = None,
        window: str | Window | None = None,
    ) -> None:
        resolved = resolve(
            tau, decay_input, v_threshold, v_reset, a=a, u1=u1, u2=u2, input_gain=input_gain, dynamics=dynamics
        )
        arguments = self._configure(*resolved, surrogate_function, window)
        super().__init__(
            **arguments, detach_reset=detach_reset, step_mode=step_mode, backend=backend, store_v_seq=store_v_seq
        )

    @property
    def backend(self) -> str:
        """Which implementation runs; ``"auto"`` takes the best one for the input's device."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value == "cupy":
            base.check_backend_library(value)  # LIFNode asks for the library when the backend is set, too
        QIFNeuron.backend.fset(self, value)  # type: ignore[attr-defined]

    def neuronal_charge(self, x: Tensor) -> None:
        """h = f(v) + g x, into ``v``; what a subclass or a step-by-step user of the host's interface calls."""
        params, _ = self._neuron(x.unsqueeze(0))
        self.v = params.map(self.v) + params.input_gain * x

    def neuronal_fire(self) -> Any:
        """The spikes of ``v``."""
        return self.surrogate_function(self.v - self.params.v_threshold)

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One time step ``[N, *]``."""
        if overridden(self, QIFNode, HOOKS):
            return super().single_step_forward(x)
        spike, self.v, _ = self._run(*self._broadcast(x, single=True), single=True)
        return spike

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """All time steps ``[T, N, *]``."""
        if overridden(self, QIFNode, (*HOOKS, "single_step_forward")):
            return super().multi_step_forward(x_seq)
        spike_seq, self.v, v_seq = self._run(*self._broadcast(x_seq), self.store_v_seq)
        if self.store_v_seq:
            self.v_seq = v_seq
        return spike_seq


class ParametricQIFNode(ParametricQIFNeuron, QIFNode):
    """QIF neuron that learns a, u1 and u2, in the place of SpikingJelly's ``ParametricLIFNode``.

    The parametrization keeps every optimizer step in the region where the resting point is stable and the threshold
    lies below the unstable point, see :mod:`qif_plugins.adapters.spikingjelly.parametric`. ``v_threshold``,
    ``v_reset`` and ``input_gain`` are not learned; ``v_reset`` stays at the given number while u1 moves.
    The windows "isometric", "unbiased" and "paper" follow the parameters: they are a function of the current values, in
    training and in evaluation, however often forward ran, see :mod:`qif_plugins.neuron.following`; ``moments`` are
    those they are derived from.

    The first arguments are ParametricLIFNode's, in its order; those not named here are :class:`QIFNode`'s.

    Args:
        init_tau: LIF's time constant to match at the start. Left out: start at the paper's parameters.
        channels: ``None`` (default) learns one value a layer; a number learns one a channel of ``[N, channels, *]``.

    Raises:
        ValueError: As :class:`QIFNode`, or parameters outside the region at the start.
    """

    def __init__(
        self,
        init_tau: float | None = None,
        decay_input: bool | None = None,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        a: float | None = None,
        u1: float | None = None,
        u2: float | None = None,
        input_gain: float | None = None,
        dynamics: str | None = None,
        window: str | Window | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__(
            init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode,
            store_v_seq=store_v_seq, a=a, u1=u1, u2=u2, input_gain=input_gain, dynamics=dynamics, window=window,
            backend=backend,
        )  # fmt: skip
        self._learn(channels)


def overridden(node: nn.Module, cls: type, names: tuple[str, ...]) -> bool:
    """Whether a subclass, or the node itself, has methods of its own that the fused forward would pass by."""
    mine = vars(node)
    return any(name in mine or getattr(type(node), name) is not getattr(cls, name) for name in names)
