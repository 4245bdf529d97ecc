"""QIF nodes for SpikingJelly 2: explicit-state functional forms, no backend argument of the host's own."""

from __future__ import annotations

from typing import Any

from spikingjelly.activation_based import neuron
from torch import Tensor
from typing_extensions import Unpack

from qif_plugins.neuron.functional import qif_multi_step
from qif_plugins.ops.backends import BackendName

from .arguments import NodeOptions, StepMode, show_options
from .node import QIFNeuron, overridden
from .parametric import ParametricQIFNeuron


class QIFNode(QIFNeuron, neuron.BaseNode):
    """Discretized quadratic integrate-and-fire neuron in the place of SpikingJelly's ``LIFNode``.

    ::

        f(v) = a (v - u1)(v - u2)
        h[t] = f(v[t-1]) + g x[t];   s[t] = 1 if h[t] >= θ else 0;   v[t] = v_reset if s[t] else h[t]

    The first arguments are LIFNode's, in its order. A leak that is passed (``tau``, ``decay_input``) is matched, see
    :meth:`qif_plugins.QIFParameters.matching_lif`; without one, that of ``tau=2`` with an input gain of 1.
    ``dynamics="paper", window="paper"`` is the neuron of arXiv 2510.05168.

    The module's own forward has the gradients of one call over all steps in either step mode. The functional
    forms chain through the state that they are given, the membrane after its reset: without ``detach_reset`` a
    single-step loop over them differs in the gradient through the reset, as their explicit state cannot carry it.
    That gradient (and half precision) makes the next step start from a membrane kept beside ``v``. A write to ``v``
    between two steps is noticed and drops it, except one to the same memory through ``v.data`` and one in place around
    a step under torch.compile: assign the new membrane there, ``node.v = ...``.

    All of them may be assigned after construction, with the effect and the checks that they have here. A
    ``v_threshold`` that is then an ``nn.Parameter``, or another tensor with gradient, is learned, and kept where the
    membrane is stable; a named window follows it.

    Args:
        tau: LIF's time constant to match, in steps, > 1. Left out: 2.
        decay_input: Whether the LIF neuron to match scales its input by 1/tau. Left out: True with a ``tau`` or
            ``dynamics="lif"``, else False.
        v_threshold: Threshold θ, below the unstable fixed point of the map. Default 1.
        v_reset: Membrane after a spike and at the start; what a matched leak decays to. Default 0. ``None`` subtracts
            the threshold instead, which with ``dynamics="monotone"`` leaves at most the threshold; with other
            dynamics the membrane is then unbounded.
        surrogate_function: A surrogate of the host, used as passed. ATan, Sigmoid, Erf and :class:`AnalyticWindow`
            run fused, others on the reference. Left out: the surrogate that ``window`` names.
        detach_reset: Whether the reset passes no gradient to the spike. Default False.
        step_mode: ``"s"`` (default) or ``"m"``.
        store_v_seq: Whether to keep the membrane of every step in ``v_seq``. Default False.
        a: Curvature of the map; any of ``a``, ``u1``, ``u2`` sets the leak aside. Paper's value 0.25.
        u1: First root of the map. Paper's value 0.
        u2: Second root of the map. Paper's value 0.5.
        input_gain: Factor g on the input. Default 1, or 1/tau where a leak with ``decay_input`` is matched.
        dynamics: ``"paper"`` for the paper's map, regardless of the leak, which is then set aside, as ``repr`` shows;
            ``"lif"`` to match the leak; ``"monotone"`` to match it by a map that below rest is LIF's. See
            :mod:`qif_plugins.neuron.arguments`. Default: by the other arguments.
        window: ``"isometric"`` (default), ``"unbiased"``, ``"paper"``, ``"heuristic"`` or a
            :class:`~qif_plugins.Window`.
        backend: ``"auto"`` (default) or an implementation by name, see :func:`qif_plugins.available_backends`.

    Raises:
        ValueError: ``dynamics`` together with a, u1 or u2, ``window`` together with ``surrogate_function``, an unknown
            name, or parameters that :class:`~qif_plugins.QIFParameters` refuses.
        TypeError: An argument that is not a number, or a ``surrogate_function`` that cannot be called.
    """

    v_seq: Any

    @show_options
    def __init__(
        self,
        tau: float | None = None,
        decay_input: bool | None = None,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        step_mode: StepMode = "s",
        store_v_seq: bool = False,
        *,
        backend: BackendName = "auto",
        **options: Unpack[NodeOptions],
    ) -> None:
        self._construct(
            tau, decay_input, v_threshold, v_reset, surrogate_function, backend, options,
            detach_reset=detach_reset, step_mode=step_mode, store_v_seq=store_v_seq,
        )  # fmt: skip

    def detach(self) -> None:
        """Cut the state, and ``v_seq`` where it is stored, from the graph behind it."""
        QIFNeuron.detach(self)
        self.v_seq = None if self.v_seq is None else self.v_seq.detach()

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """One time step with explicit states, as the host defines it."""
        (spike_seq,), states = self._transition(inputs[0].unsqueeze(0), states)
        return (spike_seq.squeeze(0),), states

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """All time steps with explicit states, as the host defines it."""
        if overridden(self, QIFNode, "single_step_functional_forward"):
            return super().multi_step_functional_forward(inputs, states, **kwargs)
        return self._transition(inputs[0], states)

    def _transition(self, x_seq: Tensor, states: tuple[Any, ...]) -> tuple[tuple[Tensor], tuple[Any, ...]]:
        # The gradients chain through the membrane after its reset, which is the state.
        spike_seq, v = qif_multi_step(x_seq, states[0], *self._neuron(x_seq), self.detach_reset, backend=self.backend)
        return (spike_seq,), (v, *states[1:])

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One time step ``[N, *]``."""
        if overridden(self, QIFNode, "single_step_functional_forward"):
            return super().single_step_forward(x, *args, **kwargs)
        spike, self.v, _ = self._run(x, self._state(x, "s"), single=True)
        if self.store_v_seq:
            self._append_v_seq(self.v)
        return spike

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All time steps ``[T, N, *]``."""
        if overridden(self, QIFNode, "single_step_functional_forward") or (
            type(self).multi_step_functional_forward is not QIFNode.multi_step_functional_forward
        ):
            return super().multi_step_forward(x_seq, *args, **kwargs)
        spike_seq, self.v, self.v_seq = self._run(x_seq, self._state(x_seq, "m"), self.store_v_seq)
        return spike_seq

    def _state(self, x: Tensor, step_mode: str) -> Any:
        # The core starts from a number without a tensor of it.
        return self.v if isinstance(self.v, float) else self.materialize_states((x,), (self.v,), step_mode)[0]


class ParametricQIFNode(ParametricQIFNeuron, QIFNode):
    """QIF neuron that learns a, u1 and u2, in the place of SpikingJelly's ``ParametricLIFNode``.

    The parametrization keeps every optimizer step in the region where the resting point is stable and the threshold
    lies below the unstable point, see :mod:`qif_plugins.neuron.reparametrization`. ``v_threshold``,
    ``v_reset`` and ``input_gain`` are not learned; ``v_reset`` stays at the given number while u1 moves.
    The windows "isometric", "unbiased" and "paper" follow the parameters: they are a function of the current values, in
    training and in evaluation, however often forward ran, see :mod:`qif_plugins.neuron.following`; ``moments`` are
    those they are derived from.

    The first arguments are ParametricLIFNode's, in its order; those not named here are :class:`QIFNode`'s.

    Args:
        init_tau: LIF's time constant to match at the start. Left out: 2, with an input gain of 1.
        channels: ``None`` (default) learns one value a layer; a number learns one a channel of ``[N, channels, *]``.

    Raises:
        ValueError: As :class:`QIFNode`, or parameters outside the region at the start.
    """

    @show_options
    def __init__(
        self, init_tau: float | None = None, decay_input: bool | None = None, v_threshold: float = 1.0,
        v_reset: float | None = 0.0, surrogate_function: Any = None, detach_reset: bool = False,
        step_mode: StepMode = "s", store_v_seq: bool = False, *, backend: BackendName = "auto",
        channels: int | None = None, **options: Unpack[NodeOptions],
    ) -> None:  # fmt: skip
        super().__init__(
            init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq,
            backend=backend, **options,
        )  # fmt: skip
        self._learn(channels)
