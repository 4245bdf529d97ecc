"""The discrete QIF neuron as an snnTorch neuron, which stands where ``snn.Leaky`` stands.

snnTorch's ``mem`` is the membrane before its reset. The reset is taken from the step before, without gradient::

    mem[t] = (1 - reset) f(mem[t-1]) + x[t],   reset = 1 where mem[t-1] fired    "zero" (default)
    spk[t] = 1 if mem[t] >= θ else 0

with f(v) = a (v - u1)(v - u2), the gate of arXiv 2510.05168: a reset to u1, where f is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import snntorch as snn
import torch
from torch import Tensor

from qif_plugins.neuron.arguments import MapArguments, build_parameters
from qif_plugins.neuron.following import WindowMemory, version_of
from qif_plugins.neuron.functional import check_sequence, check_spread, qif_multi_step, uncopied_step
from qif_plugins.neuron.module import chosen_window
from qif_plugins.neuron.names import DEFAULT_BETA, DEFAULT_WINDOW, MAP, DynamicsName, WindowName
from qif_plugins.neuron.parameters import Number
from qif_plugins.neuron.surrogate import ATan, FusedSurrogate, Window, spike
from qif_plugins.ops.backends import BackendName
from qif_plugins.support.names import check_known
from qif_plugins.support.numbers import number

from .instances import enter
from .parameters import Neuron, Parameters, check_leak, checked_argument, detached, reset_of
from .surrogate import Heaviside

ResetMechanism = Literal["zero", "subtract", "none"]

_CURVATURE = 0.5
_NEVER = ATan(strict=True)
"""A surrogate for neurons without reset, whose kernel has no threshold: not even an infinite h exceeds it."""


Constructor = TypeVar("Constructor", bound=Callable[..., None])


def _hint_at_beta(constructor: Constructor) -> Constructor:
    """Make the error for ``tau``, SpikingJelly's argument, name the one that takes its place."""

    @wraps(constructor)
    def checked(self: Any, *arguments: Any, **options: Any) -> None:
        if "tau" in options:
            raise TypeError(
                f"{type(self).__name__}.__init__() got an unexpected keyword argument 'tau'; tau is SpikingJelly's: "
                "here beta is 1 - 1/tau"
            )
        constructor(self, *arguments, **options)

    return checked  # type: ignore[return-value]


class QIF(Parameters, snn.Leaky):
    """Discretized quadratic integrate-and-fire neuron with ``snn.Leaky``'s arguments, states and returns.

    Arguments not listed are Leaky's, in Leaky's order, with Leaky's meaning and defaults. It is a
    ``snn.Leaky``, so that ``utils.reset``, ``backprop`` and the hidden-state functions find it.

    Whatever Leaky lets you assign after construction, and our own arguments, may be assigned: the neuron is then the
    one that the constructor would have made. A value that the constructor would refuse raises the same error, and the
    neuron stays as it was. An ``nn.Parameter``, or another tensor with gradient, assigned to ``beta`` or ``threshold``
    is learned as under ``learn_beta`` and ``learn_threshold``. :mod:`qif_plugins.neuron.arguments` says which argument
    decides where several could.

    Every argument that is a number or a tensor may also be an array or a list of numbers, as in ``Leaky``.

    Args:
        beta: Leak that the neuron matches near rest, see :meth:`~qif_plugins.QIFParameters.matching_lif`: a
            float or a tensor (per neuron), 0 <= beta < 1. Left out: 0.5.
            Where another argument decides the map, the entry ``beta`` of the ``state_dict``, which Leaky has too,
            holds the map's slope at rest.
        threshold: Threshold θ, a float or a tensor (per neuron), below the map's unstable fixed point. Default 1.
        spike_grad: ``None`` (default) means the surrogate that ``window`` names. A function that takes mem - θ is
            used as passed; snnTorch's ``atan``, ``fast_sigmoid`` and ``sigmoid`` through the kernels, firing at
            mem > θ as they do. A surrogate of :mod:`qif_plugins.neuron.surrogate` fires at mem >= θ.
        surrogate_disable: No gradient through the spike; fires at mem >= θ. Plain PyTorch operations.
        learn_beta: Learn beta, clamped to [0, 0.9999]. Needs ``dynamics="lif"``.
        learn_threshold: Learn θ. It is clamped where it would leave the region in which the membrane is
            stable: to at least 1e-6 for a matched neuron, whose unstable point moves with it, and
            otherwise to 99 % of the way from the resting to the unstable point.
        reset_mechanism: ``"zero"`` (default). ``"subtract"`` subtracts θ from the membrane before f (Leaky
            does it after its leak); ``"monotone"`` dynamics keep at most θ. ``"none"`` never resets. Under it, and
            under ``"subtract"`` with other dynamics, a large membrane stays large, f squares it and the potential
            explodes. They exist because Leaky has them. Setting the attribute changes the neuron; loading a
            ``state_dict`` does not.
        a: Curvature of f, see :class:`~qif_plugins.QIFParameters`; float or tensor.
        u1: First root of f.
        u2: Second root of f. Any of a, u1, u2 passed decides the dynamics, the others default to the paper's.
        dynamics: ``"paper"``, ``"lif"`` (matched to beta) or ``"monotone"`` (matched by a map that below rest is
            LIF's); default by what else is passed. A beta that does not decide is set aside.
        input_gain: Factor on the input, one number. Default 1, Leaky's.
        curvature: For the matched neuron, where θ lies between the resting (0) and the unstable point (1).
            Left out: 0.5.
        window: ``"isometric"`` (left out), ``"unbiased"``, ``"paper"``, ``"heuristic"``, or a
            :class:`~qif_plugins.neuron.surrogate.Window` in units of the membrane; the derivative where
            ``spike_grad`` is left out. A named window follows beta and θ when they are learned.
        backend: See :func:`~qif_plugins.qif_multi_step`. Default ``"auto"``.

    Raises:
        ValueError: Parameters outside their range, contradicting arguments, an unknown window.

    A change of beta or threshold is noticed when it is assigned, made in place or loaded by ``load_state_dict``; of
    learned ones also when it is made through ``.data``, at the latest when the next sequence begins. The beta of a
    neuron that matches no leak has no effect when it is changed in place or loaded. Copies and unpickled neurons are
    in ``SpikingNeuron.instances``, too, but are not kept alive by it, as constructed ones are.
    ``snntorch.export_nir`` refuses it: NIR has no QIF.
    """

    reset_mechanism_val: Tensor

    @_hint_at_beta
    def __init__(
        self,
        beta: Number | None = None,
        threshold: Number = 1.0,
        spike_grad: Any = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: ResetMechanism = "zero",
        state_quant: Any = False,
        output: bool = False,
        graded_spikes_factor: Number = 1.0,
        learn_graded_spikes_factor: bool = False,
        reset_delay: bool = True,
        *,
        a: Number | None = None,
        u1: Number | None = None,
        u2: Number | None = None,
        dynamics: DynamicsName | None = None,
        curvature: float | None = None,
        input_gain: float = 1.0,
        window: WindowName | Window | None = None,
        backend: BackendName = "auto",
    ) -> None:
        numbers = {"beta": beta, "curvature": curvature, "a": a, "u1": u1, "u2": u2}
        given = {name: checked_argument(name, value) for name, value in numbers.items() if value is not None}
        threshold = checked_argument("threshold", threshold)
        graded_spikes_factor = checked_argument("graded_spikes_factor", graded_spikes_factor)
        chosen = MapArguments(
            dynamics,
            {name: value for name, value in given.items() if name in MAP},
            {name: value for name, value in given.items() if name not in MAP},
        )
        check_leak(chosen, learn_beta)
        beta = given.get("beta", DEFAULT_BETA if chosen.left_open else None)
        # Everything is checked before the host's constructor enters the neuron in SpikingNeuron.instances.
        check_known("reset_mechanism", snn.SpikingNeuron.reset_dict, reset_mechanism)
        if surrogate_disable:
            chosen_window(window, Heaviside(), "surrogate_disable")
        window = chosen_window(window, spike_grad, "spike_grad") or DEFAULT_WINDOW
        self.backend = backend
        curvature = given.get("curvature", _CURVATURE)
        self._input_gain = checked_argument("input_gain", input_gain)
        params = build_parameters(
            chosen.roots,
            detached(threshold),
            beta=detached(beta),
            curvature=curvature,
            reset=reset_of(reset_mechanism),
            input_gain=self._input_gain,
            rebound=chosen.rebound,
        )
        if beta is None:
            beta = params.map_derivative(params.fixed_points()[0])
        super().__init__(
            beta, threshold, spike_grad, surrogate_disable, init_hidden, inhibition, learn_beta, learn_threshold,
            reset_mechanism, state_quant, output, graded_spikes_factor, learn_graded_spikes_factor, reset_delay,
        )  # fmt: skip
        del self.state_function  # Leaky's, for its own forward
        self._given = {"beta": beta, "threshold": threshold}
        self.curvature = curvature
        self._choose(chosen)
        self._window, self._window_memory, self._seen = window, WindowMemory(), None
        self._mem_before: tuple[Tensor, Any, Neuron] | None = None
        self._twin: tuple[Tensor, Any, Tensor] | None = None
        """The last membrane returned, its version, and what it is a copy of, which the backward pass reads."""
        self.spike_grad = Heaviside() if surrogate_disable else spike_grad
        try:
            self._window_changed()
        except ValueError:
            snn.SpikingNeuron.instances.remove(self)
            raise
        self._settled = True

    @property
    def fires_in_operator(self) -> bool:
        """Whether the spikes are the operator's own, so that their gradient passes through it."""
        return not self.state_quant

    # -- running ---------------------------------------------------------------------------------

    if TYPE_CHECKING:

        @overload
        def __call__(self, input_: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(self, input_: Tensor, mem: None = None) -> Any: ...
        def __call__(self, input_: Tensor, mem: Tensor | None = None) -> Any: ...

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One time step.

        Args:
            input_: Input current, any shape, floating point.
            mem: Membrane before its reset after the previous step, as returned; ``None`` (default) takes the
                neuron's own. One of another shape than ``input_`` is replaced by zeros.

        Returns:
            ``(spk, mem)``; with ``init_hidden`` and without ``output``, ``spk`` alone.

        Raises:
            TypeError: ``mem`` passed to a neuron with ``init_hidden``, or an input that is not floating point.
        """
        before = self._before(input_, mem)
        neuron = self._neuron_for(input_)
        # Without the graph behind the membrane; a compiler traces no versions.
        traced = torch.compiler.is_compiling()
        if traced:
            self._mem_before = None
        else:  # past the module's __setattr__, which takes a twentieth of a small step
            self.__dict__["_mem_before"] = before.detach(), version_of(before), neuron
        spk, mem = self._charge_step(input_, before, neuron)
        if self.state_quant:
            mem = self.state_quant(mem)
            spk = self._fire(mem if self.inhibition else self.state_quant(mem), neuron)
        if self.inhibition:
            winner = (mem - neuron.params.v_threshold).argmax(1, keepdim=True)
            spk = fired = spk * torch.zeros_like(spk).scatter_(1, winner, 1)
        else:
            fired = spk
            spk = self._graded(spk, neuron)
        if not self.reset_delay and self._reset_mechanism == "zero":
            reset = mem - (fired - self._fire(before, neuron).detach()) * (mem - neuron.params.u1)
            mem = reset.to(mem.dtype)  # a u1 or a threshold per neuron, in float32, widens half precision
        elif not self._resets_first():
            threshold: Any = neuron.params.v_threshold
            reset = mem - fired * threshold
            if not neuron.params.rebound:
                reset = torch.where((fired != 0) & (reset > threshold), threshold, reset)
            mem = reset.to(mem.dtype)
        self.mem = mem
        return (spk, mem) if self.output or not self.init_hidden else spk

    def forward_sequence(self, x_seq: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All time steps of a sequence, in one pass forward and one backward; the same as stepping.

        ``inhibition``, ``state_quant`` and ``reset_delay=False`` are stepped.

        Args:
            x_seq: Input current ``[T, ...]``, time first.
            mem: As in :meth:`forward`.

        Returns:
            ``(spk_seq, mem_seq)``, both ``[T, ...]``.

        Raises:
            TypeError: As :meth:`forward`.
            ValueError: As :meth:`forward`, and T = 0.
        """
        check_sequence(x_seq)
        before = self._before(x_seq[0], mem)
        if self.inhibition or self.state_quant or not self.reset_delay:
            self.mem = before
            return self._step_through(x_seq)
        neuron = self._neuron_for(x_seq[0])
        self._mem_before = None
        spk_seq, mem_seq = self._charge(x_seq, before, neuron)
        self.mem = mem_seq[-1].clone()
        return self._graded(spk_seq, neuron), mem_seq

    def _step_through(self, x_seq: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and membranes of all time steps, one after the other from the neuron's own membrane on."""
        steps = []
        for x in x_seq.unbind(0):
            out = self.forward(x)
            steps.append((out if isinstance(out, Tensor) else out[0], self.mem))
        spikes, mems = zip(*steps, strict=True)
        return torch.stack(spikes), torch.stack(mems)

    def _neuron_for(self, x: Tensor) -> Neuron:
        """Return the neuron for an input of one step. Checks its arguments by the names that the user knows."""
        neuron = self._neuron()
        for name in neuron.spread:
            check_spread(name, getattr(self, name), x, x.shape)
        if "reset" in self.__dict__:  # of the step before; TorchDynamo traces this, and no pop
            del self.reset
        return neuron

    def _before(self, x: Tensor, mem: Tensor | None) -> Tensor:
        if mem is None:
            mem = self.mem
        elif self.init_hidden:
            raise TypeError("mem cannot be passed to a neuron with init_hidden=True, which keeps its own")
        elif not isinstance(mem, Tensor):
            raise TypeError(f"mem must be a tensor, got {mem!r}")
        before = mem if mem.shape == x.shape else torch.zeros_like(x)
        if not before.is_floating_point() and x.is_floating_point():
            before = before.to(x.dtype)
        if not torch.compiler.is_compiling() and before.grad_fn is None:  # a sequence begins
            self._window_memory.doubt()
        return before

    @cached_property
    def reset(self) -> Tensor:
        """The resets before the last step of :meth:`forward`, 1 where the membrane was reset, as Leaky keeps them."""
        if self._mem_before is None:
            raise AttributeError  # as on a Leaky that has not run; the module names itself and the attribute
        mem, version, neuron = self._mem_before
        if not mem.is_inference() and mem._version != version:
            raise RuntimeError("the membrane before the last step was changed in place, so that its reset is not known")
        with torch.no_grad():
            return self._fire(mem, neuron)

    def state_function(self, input_: Tensor) -> Tensor:
        """The membrane one step after :attr:`mem` under ``input_``, as Leaky's; :attr:`mem` stays."""
        return self._charge_step(input_, self._before(input_, None), self._neuron())[1]

    def _charge(self, x_seq: Tensor, mem: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor]:
        """Spikes and membranes of a sequence, graded_spikes_factor aside."""
        if self._reset_mechanism == "none":
            unlimited = neuron.params.with_numbers(v_threshold=math.inf)
            *_, h_seq = qif_multi_step(x_seq, mem, unlimited, _NEVER, True, backend=self.backend, store_h_seq=True)
            return self._fire(h_seq, neuron), h_seq
        spk_seq, _, h_seq = qif_multi_step(
            x_seq, mem, neuron.params, neuron.surrogate, True, backend=self.backend, store_h_seq=True, pre_reset=True
        )
        return spk_seq, h_seq

    def _charge_step(self, x: Tensor, mem: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor]:
        """Spikes and membrane of one time step."""
        if self._reset_mechanism == "none":
            spk_seq, h_seq = self._charge(x.unsqueeze(0), mem, neuron)
            # A copy: the host detaches mem in place, which a view does not allow.
            return spk_seq.squeeze(0), h_seq.squeeze(0).clone()
        traced = torch.compiler.is_compiling()
        twin = None
        if self._twin is not None and not traced and mem is self._twin[0] and version_of(mem) == self._twin[1]:
            twin = self._twin[2]
        first = self._resets_first()
        spk, _, h = uncopied_step(x, mem, neuron.params, neuron.surrogate, True, self.backend, True, first, twin)
        mem = h.clone()  # which the user may change in place
        if not traced:
            self.__dict__["_twin"] = (mem, version_of(mem), h) if h.requires_grad else None
        return spk, mem

    def _resets_first(self) -> bool:
        """Whether a step resets the membrane that it gets; without ``reset_delay`` the step before has subtracted."""
        return self.reset_delay or self._reset_mechanism != "subtract"

    def _fire(self, h: Tensor, neuron: Neuron) -> Tensor:
        threshold = neuron.params.v_threshold
        if isinstance(neuron.surrogate, FusedSurrogate):
            return spike(h, threshold, neuron.surrogate)
        return neuron.surrogate(h - threshold).to(h.dtype)

    def _graded(self, spk: Tensor, neuron: Neuron) -> Tensor:
        return (spk * self.graded_spikes_factor).to(spk.dtype) if neuron.graded else spk

    # -- copies and checkpoints ------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_seen": None, "_current": None, "_mem_before": None, "_twin": None}
        state["_buffers"] = self._buffers | {"mem": self.mem.detach()}  # a copy does not share the graph
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        enter(self)

    def extra_repr(self) -> str:
        params = self.qif_parameters
        numbers = ", ".join(f"{name}={number(getattr(params, name), '.4g')}" for name in (*MAP, "v_threshold"))
        leak = f", beta={number(self._used('beta', self.beta), '.4g')}" if self._choice.matches_leak else ""
        leak += ", rebound=False" if self.dynamics == "explicit" and not params.rebound else ""
        gain = "" if self.input_gain == 1 else f", input_gain={number(self.input_gain, '.4g')}"
        window = self._window if self._spike_grad is None else self._spike_grad
        return (
            f"dynamics={self.dynamics}{leak}, {numbers}{gain}, reset_mechanism={self._reset_mechanism}, "
            f"{'window' if self._spike_grad is None else 'spike_grad'}={window}, backend={self.backend}"
            f"{self._chosen().describe_set_aside()}"
        )
