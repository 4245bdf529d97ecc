"""The discrete QIF neuron as an snnTorch neuron, and the analytic window as an snnTorch surrogate.

:class:`QIF` stands where ``snn.Leaky`` stands. snnTorch's ``mem`` is the membrane before its reset, and
the reset, taken from the step before, never passes a gradient::

    mem[t] = (1 - reset) f(mem[t-1]) + x[t],   reset = 1 where mem[t-1] fired    "zero" (default)
    spk[t] = 1 if mem[t] >= θ else 0

with f(v) = a (v - u1)(v - u2), the gate of arXiv 2510.05168: a reset to u1, where f is 0.
"""

from __future__ import annotations

import gc
import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

try:
    import snntorch as snn
except ImportError as error:
    raise ImportError("qif_plugins.adapters.snntorch needs snnTorch: pip install 'snntorch>=1.0'") from error

from qif_plugins.neuron.arguments import MAP, MapArguments, limited_threshold
from qif_plugins.neuron.following import WindowMemory, has_storage, same_versions, versions
from qif_plugins.neuron.functional import check_spread, qif_multi_step, qif_step
from qif_plugins.neuron.module import NO_NIR, QIFLayer, on_device
from qif_plugins.neuron.parameters import Number, QIFParameters
from qif_plugins.neuron.surrogate import (
    DEFAULT_WINDOW,
    WINDOWS,
    ATan,
    FastSigmoid,
    FusedSurrogate,
    Gaussian,
    Sigmoid,
    Surrogate,
    Window,
    spike,
)
from qif_plugins.ops.backends import BACKENDS
from qif_plugins.support.names import checked_number, unknown

__all__ = ["QIF", "SpikeGradient", "analytic_window"]

_CURVATURE = 0.5
_ASSIGNED = frozenset({"beta", "threshold", *MAP, "dynamics", "curvature", "backend"})
"""What may be assigned after construction, is checked then, and has no property."""

_MAX_BETA = 0.9999
"""Upper limit of a learned beta, and of the one that a window is derived for: the matched map needs beta < 1, its
float32 gradient and its moments some distance from it.
"""

_NEVER = ATan(strict=True)
"""A surrogate for neurons without reset, whose kernel has no threshold: not even an infinite h exceeds it."""

_HOST_SURROGATES: dict[str, tuple[str, type[Any]]] = {
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


def analytic_window(
    params: QIFParameters | None = None,
    window: str | Window = DEFAULT_WINDOW,
    input_std: Number | None = None,
    **options: Any,
) -> SpikeGradient:
    """The analytic window as a ``spike_grad`` for snnTorch's own neurons.

    It fires at mem >= θ. The window is derived for ``params`` once and placed relative to the threshold
    of the neuron that uses it, which should be that of ``params``::

        snn.Leaky(beta=0.9, spike_grad=analytic_window(QIFParameters.matching_lif(0.9)))

    Args:
        params: The neuron whose membrane statistics give the window. ``None`` (default) means the paper's.
        window: ``"unbiased"`` (default), ``"isometric"``, ``"paper"``, ``"heuristic"``, or a
            :class:`~qif_plugins.neuron.surrogate.Window` in units of the membrane.
        input_std: Standard deviation of the input. ``None`` (default) means θ.
        **options: For the named window, see :meth:`~qif_plugins.neuron.surrogate.Window.unbiased`.

    Raises:
        ValueError: Unknown window.
        TypeError: ``params`` are none.
        MomentClosureError: The moments do not converge.
    """
    params = QIFParameters() if params is None else params
    if not isinstance(params, QIFParameters):
        raise TypeError(f"params must be QIFParameters, got {params!r}; a window by name is window=")
    _check_window(window)
    derived = window if isinstance(window, Window) else Window.named(window, params, input_std, **options)
    return SpikeGradient(_shifted(derived, params.v_threshold, -1))


class QIF(QIFLayer, snn.Leaky):
    """Discretized quadratic integrate-and-fire neuron with ``snn.Leaky``'s arguments, states and returns.

    Arguments not listed are Leaky's, in Leaky's order, with Leaky's meaning and defaults. It is a
    ``snn.Leaky``, so that ``utils.reset``, ``backprop`` and the hidden-state functions find it.

    What Leaky lets one assign after construction, and our own arguments, may be assigned: the neuron is then the one
    that the constructor would have made. What it would refuse is refused, and the neuron stays as it was. An
    ``nn.Parameter``, or another tensor with gradient, assigned to ``beta`` or ``threshold`` is learned as under
    ``learn_beta`` and ``learn_threshold``. Which argument decides where several could, see
    :mod:`qif_plugins.neuron.arguments`.

    Wherever a number or a tensor is taken, an array or a list of numbers is, too, as by ``Leaky``.

    Args:
        beta: Leak that the neuron matches near rest, see :meth:`~qif_plugins.QIFParameters.matching_lif`: a
            float or a tensor (per neuron), 0 <= beta < 1. Left out, the neuron has the paper's a, u1, u2,
            and the entry ``beta`` of its ``state_dict``, there for Leaky's sake, holds the map's slope at rest.
        threshold: Threshold θ, a float or a tensor (per neuron), below the map's unstable fixed point. Default 1.
        spike_grad: ``None`` (default) means the analytic window. A function that takes mem - θ is used as
            passed; snnTorch's ``atan``, ``fast_sigmoid`` and ``sigmoid`` through the kernels, firing at
            mem > θ as they do. A surrogate of :mod:`qif_plugins.neuron.surrogate` fires at mem >= θ.
        surrogate_disable: No gradient through the spike; fires at mem >= θ. Plain PyTorch operations.
        learn_beta: Learn beta, clamped to [0, 0.9999]. Needs ``dynamics="lif"``.
        learn_threshold: Learn θ. It is clamped where it would leave the region in which the membrane is
            stable: to at least 1e-6 for a matched neuron, whose unstable point moves with it, and
            otherwise to 99 % of the way from the resting to the unstable point.
        reset_mechanism: ``"zero"`` (default). ``"subtract"`` subtracts θ from the membrane before f (Leaky
            does it after its leak), ``"none"`` never resets: under both a large membrane stays large, f
            squares it and the potential explodes. They exist because Leaky has them. Setting the attribute
            changes the neuron; loading a ``state_dict`` does not.
        a: Curvature of f, see :class:`~qif_plugins.QIFParameters`; float or tensor.
        u1: First root of f.
        u2: Second root of f. Any of a, u1, u2 passed decides the dynamics, the others default to the paper's.
        dynamics: ``"paper"`` or ``"lif"`` (matched to beta); default by what else is passed. A beta that does not
            decide is set aside.
        curvature: For the matched neuron, where θ lies between the resting (0) and the unstable point (1).
            Left out: 0.5.
        window: ``"unbiased"`` (left out), ``"isometric"``, ``"paper"``, ``"heuristic"``, or a
            :class:`~qif_plugins.neuron.surrogate.Window` in units of the membrane; the derivative where
            ``spike_grad`` is left out. A named window follows beta and θ when they are learned.
        backend: See :func:`~qif_plugins.qif_multi_step`. Default ``"auto"``.

    Raises:
        ValueError: Parameters outside their range, contradicting arguments, an unknown window.

    Edits of beta or threshold are noticed through assignment, in-place operations and ``load_state_dict``, and where
    they are learned through ``.data``, too, at the latest when the next sequence begins; the beta of a neuron that
    matches no leak decides nothing when it is written to in place or loaded. A copy and an unpickled neuron join
    ``SpikingNeuron.instances`` without being kept alive by it, as a constructed one is.
    ``snntorch.export_nir`` refuses it: NIR has no QIF.
    """

    reset_mechanism_val: Tensor
    _varying: frozenset[str] = frozenset()
    """Of beta and threshold, what is no constant although it requires no gradient: one that is parametrized, where no
    gradient is taken, and one that torch.vmap has batched, which cannot be read.
    """
    _settled = False
    """Whether an assignment is one of the user's, neither the constructor's nor that of a state that is loaded."""

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
        reset_mechanism: str = "zero",
        state_quant: Any = False,
        output: bool = False,
        graded_spikes_factor: Number = 1.0,
        learn_graded_spikes_factor: bool = False,
        reset_delay: bool = True,
        *,
        a: Number | None = None,
        u1: Number | None = None,
        u2: Number | None = None,
        dynamics: str | None = None,
        curvature: float | None = None,
        window: str | Window | None = None,
        backend: str = "auto",
    ) -> None:
        numbers = {"beta": beta, "curvature": curvature, "a": a, "u1": u1, "u2": u2}
        given = {name: _number(name, value) for name, value in numbers.items() if value is not None}
        beta, threshold = given.get("beta"), _number("threshold", threshold)
        graded_spikes_factor = _number("graded_spikes_factor", graded_spikes_factor)
        chosen = MapArguments(
            dynamics,
            {name: value for name, value in given.items() if name in MAP},
            {name: value for name, value in given.items() if name not in MAP},
        )
        _check_leak(chosen, learn_beta)
        roots = chosen.roots
        # Everything is checked before the host's constructor enters the neuron in SpikingNeuron.instances.
        if reset_mechanism not in snn.SpikingNeuron.reset_dict:
            raise ValueError(unknown("reset_mechanism", reset_mechanism, snn.SpikingNeuron.reset_dict))
        if window is not None and (spike_grad is not None or surrogate_disable):
            other = "surrogate_disable" if surrogate_disable else "spike_grad"
            raise ValueError(f"{other} and window both decide the surrogate gradient; pass one of them")
        window = DEFAULT_WINDOW if window is None else window
        _check_window(window)
        _check_backend(backend)
        curvature = given.get("curvature", _CURVATURE)
        params = _Derivation(chosen.decided, curvature, reset_mechanism)(roots, _detached(beta), _detached(threshold))
        if beta is None:
            beta = params.map_derivative(params.fixed_points()[0])
        _check_spike_grad(spike_grad)
        super().__init__(
            beta, threshold, spike_grad, surrogate_disable, init_hidden, inhibition, learn_beta, learn_threshold,
            reset_mechanism, state_quant, output, graded_spikes_factor, learn_graded_spikes_factor, reset_delay,
        )  # fmt: skip
        del self.state_function  # Leaky's, for its own forward
        self._given = {"beta": beta, "threshold": threshold}
        self.curvature, self.backend = curvature, backend
        self._choose(chosen)
        self._window = window
        self._window_memory = WindowMemory()
        self._seen: list[tuple[Any, Any]] | None = None
        self._mem_before: tuple[Tensor, Any, _Neuron] | None = None
        self.spike_grad = _Heaviside() if surrogate_disable else spike_grad
        try:
            self._window_changed()
        except ValueError:
            snn.SpikingNeuron.instances.remove(self)
            raise
        self._settled = True

    # -- assignment ------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ASSIGNED or not self._settled:
            super().__setattr__(name, value)
            return
        before = dict(self.__dict__)
        before |= {key: before[key].copy() for key in ("_parameters", "_buffers", "_non_persistent_buffers_set")}
        try:
            self._assign(name, value)
        except (TypeError, ValueError):
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _assign(self, name: str, value: Any) -> None:
        """Take over a value as the constructor would have; what goes wrong is undone by the caller."""
        if name == "backend":
            _check_backend(value)
            super().__setattr__(name, value)
            return
        chosen = self._chosen()
        if name == "dynamics" or name in MAP:
            self._open_to_leak = False
        if name == "dynamics":
            chosen = chosen.with_dynamics(value, self._map())
        elif name in MAP:
            chosen = chosen.with_map(self._map(), **{name: _number(name, value)})
        else:
            value = _number(name, value)
            if name != "threshold":
                chosen = chosen.with_leak(self._open_to_leak, **{name: value})
            _check_leak(chosen, name == "beta" and isinstance(value, nn.Parameter))
            if name != "curvature" and not isinstance(value, Tensor) and name not in {**self.__dict__, **self._buffers}:
                self.register_buffer(name, torch.tensor(value, dtype=torch.float32))  # after a del
            else:
                super().__setattr__(name, value)  # the host refuses a number for a buffer
        self._choose(chosen)
        self._params(_detached(self.beta), _detached(self.threshold), checked=True)
        self._window_changed()

    def _chosen(self) -> MapArguments:
        """What was passed, or assigned since, that could decide the map."""
        dynamics, given, leak = self._choice
        return MapArguments(
            dynamics,
            {name: getattr(self, name) for name in given},
            {name: getattr(self, name, None) for name in leak},  # None: deleted, and about to be assigned
        )

    def _choose(self, chosen: MapArguments) -> None:
        self._choice = chosen.dynamics, tuple(chosen.given), tuple(chosen.leak)
        self._decided = chosen.decided
        self._root_names = tuple(chosen.roots)
        for name in MAP:
            self._buffers.pop(name, None)
            self.__dict__.pop(name, None)
        for name, value in chosen.roots.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                self.__dict__[name] = value

    def _map(self) -> dict[str, Any]:
        """The present a, u1 and u2."""
        params = self.qif_parameters
        return {name: _one(getattr(params, name)) for name in MAP}

    @property
    def dynamics(self) -> str:
        """What decided the map: ``"paper"``, ``"lif"`` (beta is matched) or ``"explicit"`` (a, u1, u2 were given)."""
        return self._decided

    # -- the neuron ------------------------------------------------------------------------------

    @property
    def qif_parameters(self) -> QIFParameters:
        """The neuron's current parameters, without gradient."""
        with torch.no_grad():
            return self._neuron().params

    @property
    def surrogate(self) -> Surrogate:
        """The derivative of the spike as the kernels take it; a window's ends are in units of the membrane."""
        return self._neuron().surrogate

    @property
    def spike_grad(self) -> Callable[[Tensor], Tensor]:
        """The function of mem - θ that fires: the one passed, or the current window's."""
        if callable(self._spike_grad):
            return self._spike_grad
        neuron = self._neuron()
        return SpikeGradient(_shifted(neuron.surrogate, neuron.params.v_threshold, -1))

    @spike_grad.setter
    def spike_grad(self, value: Any) -> None:
        _check_spike_grad(value)
        self._spike_grad = _recognised(value)
        self._seen = None

    @property
    def window(self) -> str | Window:
        """The window's name, or the window given; set, it takes the place of a ``spike_grad`` that was passed."""
        return self._window

    @window.setter
    def window(self, value: str | Window) -> None:
        _check_window(value)
        if self.surrogate_disable:
            raise ValueError(
                "surrogate_disable and window both decide the surrogate gradient; construct another neuron"
            )
        before = self._window, self._spike_grad
        self._window, self._spike_grad = value, None
        try:
            self._window_changed()
        except ValueError:
            self._window, self._spike_grad = before
            raise

    @property
    def derived_window(self) -> str | None:
        """Name of the window that the neuron derives for itself; ``None`` where its surrogate was given."""
        return self._window if self._spike_grad is None and isinstance(self._window, str) else None

    @property
    def learns_window(self) -> bool:
        """Whether the window follows learned parameters, which needs the moments of the input."""
        return self._learns("beta") or self._learns("threshold")

    @property
    def _follows(self) -> bool:
        """Whether the surrogate moves with learned parameters, as a window given as ``spike_grad`` does with θ."""
        given = self._spike_grad
        placed = isinstance(given, SpikeGradient) and isinstance(given.surrogate, Window)
        return self.learns_window and (placed or self.derived_window is not None)

    @property
    def resets(self) -> bool:
        """Whether the membrane is reset after a spike; without, there is no stationary membrane to measure."""
        return self._reset_mechanism != "none"

    @property
    def fires_in_operator(self) -> bool:
        """Whether the spikes are the operator's own, so that their gradient passes through it."""
        return not self.state_quant

    def _window_changed(self) -> None:
        if self.learns_window and self.derived_window not in (None, "heuristic") and not self.beta.is_meta:
            self.window_moments()  # raises where nothing converges, which training only falls back for
        self._window_memory.clear()
        self._refresh()

    def _neuron(self) -> _Neuron:
        """Parameters and surrogate as of the current tensors, derived anew only when one of them has changed."""
        if not torch.compiler.is_compiling() or self._seen is None:
            seen = versions([getattr(self, name) for name in self._sources()])
            if not same_versions(seen, self._seen):
                self._current = self._derive()
                self._seen = seen
        current = self._current
        if self.learns_window:
            used = zip(current.constants, self._limited(), strict=True)
            beta, threshold = (learned if number is None else number for number, learned in used)
            current = current._replace(params=self._params(beta, threshold))
        if self._follows:
            current = current._replace(surrogate=self._followed())
        return current

    def _sources(self) -> tuple[str, ...]:
        return ("beta", "threshold", "graded_spikes_factor", "_reset_mechanism", *self._root_names)

    def _followed(self) -> Window | Gaussian:
        """The window of the current parameters, kept until one changes."""
        return self._window_memory([getattr(self, name) for name in self._sources()], self._follow)

    @torch.no_grad()
    def _follow(self) -> Window | Gaussian:
        params = self._params(*self._limited())
        if self.derived_window is None:
            return _shifted(self._spike_grad.surrogate, params.v_threshold, 1)
        return self.followed_window(self.derived_window, params)

    def _refresh(self) -> None:
        self._seen = None
        self._window_memory.clear()
        if not self.beta.is_meta:
            self._neuron()  # now rather than in the first forward, which torch.compile may be tracing

    @torch.no_grad()
    def _derive(self) -> _Neuron:
        beta: Any
        threshold: Any
        self._varying = frozenset(
            name
            for name in ("beta", "threshold")
            if is_parametrized(self, name) or not has_storage(getattr(self, name))
        )
        beta, threshold = self._limited()
        # Constants become floats, which the kernels take as such; learned parameters stay on their device.
        if not self._learns("beta") and beta.numel() == 1:
            beta = self._constant("beta", beta)
        if not self._learns("threshold") and threshold.numel() == 1:
            threshold = self._constant("threshold", threshold)
        params = self._params(beta, threshold, checked=not self.learns_window)
        factor = self.graded_spikes_factor
        graded = isinstance(factor, nn.Parameter) or not has_storage(factor) or bool((factor != 1).any())
        given = self._spike_grad
        if isinstance(given, SpikeGradient):
            given = _shifted(given.surrogate, params.v_threshold, 1)
        elif given is None:
            given = self._window
        if isinstance(given, str) and not self.learns_window:
            given = self._placed(given, self._params(_window_beta(beta), threshold))
        constants = tuple(
            None if self._learns(name) else number for name, number in (("beta", beta), ("threshold", threshold))
        )
        used = ("threshold", "beta") if self._decided == "lif" else ("threshold", *self._root_names)
        spread = tuple(
            name for name in used if isinstance(getattr(self, name), Tensor) and getattr(self, name).numel() > 1
        )
        return _Neuron(params, given, graded, constants, spread)

    def _params(self, beta: Number, threshold: Number, checked: bool = False) -> QIFParameters:
        derive = _Derivation(self._decided, self.curvature, self._reset_mechanism)
        return derive({name: getattr(self, name) for name in self._root_names}, beta, threshold, checked)

    def _constant(self, name: str, limited: Tensor) -> float:
        """The number; as it was passed, in float32, where the buffer holds its rounding to half precision."""
        buffer, given = getattr(self, name), self._given[name]
        value: float = limited.item()
        if buffer.dtype in (torch.float16, torch.bfloat16) and isinstance(given, float):
            passed = torch.tensor(given, dtype=torch.float32, device="cpu")
            if passed.to(buffer.dtype).item() == value:
                return passed.item()
        return value

    def _learns(self, name: str) -> bool:
        # Among the parameters functional_call puts its tensors, too.
        return name in self._parameters or name in self._varying or bool(getattr(self, name).requires_grad)

    def _limited(self) -> tuple[Tensor, Tensor]:
        """beta and threshold, kept where the neuron is stable if they are learned."""
        beta, threshold = _real(self.beta), _real(self.threshold)
        if self._learns("beta"):
            beta = beta.clamp(0, _MAX_BETA)
        if self._learns("threshold") and self._decided == "lif":
            threshold = limited_threshold(threshold, 0.0)
        elif self._learns("threshold"):
            threshold = limited_threshold(threshold, *self._params(beta, threshold).fixed_points())
        return beta, threshold

    def _placed(self, name: str, params: QIFParameters) -> Window | Gaussian:
        return on_device(self.derive_window(name, params), self.beta.device)

    # -- running ---------------------------------------------------------------------------------

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
        neuron = self._neuron()
        self._check_spread(neuron, input_)
        self._forget_reset()
        # Without the graph behind the membrane; a compiler traces no versions.
        traced = torch.compiler.is_compiling()
        self._mem_before = None if traced else (before.detach(), *versions([before])[0][1:], neuron)
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
        if not self.reset_delay and self._reset_mechanism != "none":
            at_once = fired - self._fire(before, neuron).detach()
            mem = mem - at_once * (
                mem - neuron.params.u1 if self._reset_mechanism == "zero" else neuron.params.v_threshold
            )
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
        if x_seq.dim() == 0 or len(x_seq) == 0:
            raise ValueError(f"x_seq needs at least one time step in dimension 0, got shape {list(x_seq.shape)}")
        before = self._before(x_seq[0], mem)
        if self.inhibition or self.state_quant or not self.reset_delay:
            self.mem, steps = before, []
            for x in x_seq.unbind(0):
                out = self.forward(x)
                steps.append((out if isinstance(out, Tensor) else out[0], self.mem))
            spikes, mems = zip(*steps, strict=True)
            return torch.stack(spikes), torch.stack(mems)
        neuron = self._neuron()
        self._check_spread(neuron, x_seq[0])
        self._forget_reset()
        self._mem_before = None
        spk_seq, mem_seq = self._charge(x_seq, before, neuron)
        self.mem = mem_seq[-1].clone()
        return self._graded(spk_seq, neuron), mem_seq

    def _check_spread(self, neuron: _Neuron, x: Tensor) -> None:
        """Name what the user passed, of which the core knows the map alone, where it does not fit the input."""
        for name in neuron.spread:
            check_spread(name, getattr(self, name), x, x.shape)

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

    def _forget_reset(self) -> None:
        if "reset" in self.__dict__:  # TorchDynamo traces this, and no pop
            del self.reset

    @cached_property
    def reset(self) -> Tensor:
        """Where the membrane was reset before the last step of :meth:`forward`, 1 and 0, as Leaky keeps it."""
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

    def _charge(self, x_seq: Tensor, mem: Tensor, neuron: _Neuron) -> tuple[Tensor, Tensor]:
        """Spikes and membranes of a sequence, graded_spikes_factor aside."""
        if self._reset_mechanism == "none":
            unlimited = QIFParameters.unchecked(**neuron.params.numbers() | {"v_threshold": math.inf})
            *_, h_seq = qif_multi_step(x_seq, mem, unlimited, _NEVER, True, backend=self.backend, store_h_seq=True)
            return self._fire(h_seq, neuron), h_seq
        spk_seq, _, h_seq = qif_multi_step(
            x_seq, mem, neuron.params, neuron.surrogate, True, backend=self.backend, store_h_seq=True, pre_reset=True
        )
        return spk_seq, h_seq

    def _charge_step(self, x: Tensor, mem: Tensor, neuron: _Neuron) -> tuple[Tensor, Tensor]:
        """Spikes and membrane of one time step."""
        if self._reset_mechanism == "none":
            spk_seq, h_seq = self._charge(x.unsqueeze(0), mem, neuron)
            # A copy: the host detaches mem in place, which a view does not allow.
            return spk_seq.squeeze(0), h_seq.squeeze(0).clone()
        spk, _, h = qif_step(
            x, mem, neuron.params, neuron.surrogate, True, backend=self.backend, store_h=True, pre_reset=True
        )
        return spk, h

    def _fire(self, h: Tensor, neuron: _Neuron) -> Tensor:
        threshold = neuron.params.v_threshold
        if isinstance(neuron.surrogate, FusedSurrogate):
            return spike(h, threshold, neuron.surrogate)
        return neuron.surrogate(h - threshold).to(h.dtype)

    def _graded(self, spk: Tensor, neuron: _Neuron) -> Tensor:
        return (spk * self.graded_spikes_factor).to(spk.dtype) if neuron.graded else spk

    # -- copies and checkpoints ------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_seen": None, "_current": None, "_mem_before": None}
        state["_buffers"] = self._buffers | {"mem": self.mem.detach()}  # a copy does not share the graph
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _enter(self)

    def _apply(self, fn: Any, recurse: bool = True) -> QIF:
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mine = (self.beta, self.threshold)
        loaded = [state_dict.get(prefix + name, value) for name, value in zip(("beta", "threshold"), mine, strict=True)]
        fits = all(new.shape == old.shape for new, old in zip(loaded, mine, strict=True))
        try:
            if fits and not (self._learns("beta") or self._learns("threshold")):
                self._params(_detached(loaded[0]), _detached(loaded[1]), checked=True)
            # Leaky's checkpoints say "subtract", its default; the mechanism stays the one constructed.
            mechanism: Tensor = self.reset_mechanism_val.clone()
            self._settled = False
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.reset_mechanism_val = mechanism
            self._refresh()
        except ValueError as error:
            args[-1].append(f"{prefix.rstrip('.') or 'QIF'}: {error}")
        finally:
            self._settled = True

    def extra_repr(self) -> str:
        params = self.qif_parameters
        numbers = ", ".join(f"{name}={_brief(getattr(params, name))}" for name in ("a", "u1", "u2", "v_threshold"))
        leak = f", beta={_brief(self.beta)}" if self._decided == "lif" else ""
        window = self._window if self._spike_grad is None else self._spike_grad
        return (
            f"dynamics={self.dynamics}{leak}, {numbers}, reset_mechanism={self._reset_mechanism}, "
            f"{'window' if self._spike_grad is None else 'spike_grad'}={window}, backend={self.backend}"
            f"{self._chosen().describe_set_aside()}"
        )


class _Neuron(NamedTuple):
    params: QIFParameters
    surrogate: Any
    graded: bool
    constants: tuple[Number | None, ...]
    """beta and threshold, ``None`` for one that is learned."""
    spread: tuple[str, ...]
    """The arguments that have more than one value."""


class _Derivation(NamedTuple):
    """From what the module stores to the core's parameters."""

    dynamics: str
    curvature: float
    reset_mechanism: str

    def __call__(self, roots: dict[str, Any], beta: Any, threshold: Any, checked: bool = True) -> QIFParameters:
        reset: Any = "soft" if self.reset_mechanism == "subtract" else "hard"
        if self.dynamics == "lif":
            return QIFParameters.matching_lif(beta, threshold, self.curvature, reset=reset, checked=checked)
        make = QIFParameters if checked else QIFParameters.unchecked
        # v_reset is u1, where the map is 0: the paper's gate (1 - reset) f(mem).
        return make(**roots, v_threshold=threshold, reset=reset)


class _Heaviside:
    """The spike without a gradient."""

    def __call__(self, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)

    def __repr__(self) -> str:
        return "disabled"


def _check_leak(chosen: MapArguments, learn_beta: bool) -> None:
    """Refuse a leak to match, or to learn, that is not there."""
    if chosen.decided == "lif" and "beta" not in chosen.leak:
        what = "dynamics='lif' matches a leak" if chosen.dynamics else "curvature shapes the map that beta matches"
        raise ValueError(f"{what}: pass beta")
    if learn_beta and chosen.decided != "lif":
        raise ValueError(
            "learn_beta learns the leak that the neuron matches, and this neuron has "
            f"{'the paper' if chosen.decided == 'paper' else 'given'} parameters instead: pass beta and neither "
            "dynamics='paper' nor a, u1, u2, or leave learn_beta False"
        )


def _check_window(window: Any) -> None:
    if not isinstance(window, Window) and window not in WINDOWS:
        raise ValueError(unknown("window", window, WINDOWS, "pass a Window(lo, hi)"))


def _check_backend(backend: Any) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(unknown("backend", backend, ("auto", *BACKENDS)))


def _check_spike_grad(spike_grad: Any) -> None:
    usable = not isinstance(spike_grad, type) and (callable(spike_grad) or isinstance(spike_grad, FusedSurrogate))
    if spike_grad is not None and not usable:
        raise TypeError(
            f"spike_grad must be a function of mem - θ, as snntorch.surrogate.atan() returns, got {spike_grad!r}; "
            "a window by name is window="
        )


def _number(name: str, value: Any) -> Any:
    """A number, or a tensor of what else ``torch.as_tensor`` takes, as the host makes it of an array or a list.

    Raises:
        TypeError: Neither.
        ValueError: A tensor with gradient for what is not learned, or a curvature that is not one number.
    """
    if not isinstance(value, Tensor | str | bytes) and (isinstance(value, Sequence) or np.ndim(value)):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name} must be a number, a tensor, or an array or list of numbers, got {value!r}"
            ) from None
    value = value if type(value) is int else checked_number(name, value)  # the host keeps an integer as one
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{name} must be real, got {value!r}")
    if isinstance(value, Tensor) and name in MAP and not value.is_floating_point():
        value = value.to(torch.get_default_dtype())
    if name == "curvature":
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"curvature must be one number, got a tensor of shape {list(value.shape)}")
        value = float(value)
    if isinstance(value, Tensor) and value.requires_grad and name in MAP:
        raise ValueError(
            f"QIF does not learn {name}: learn_beta and learn_threshold, or a parameter assigned to beta or threshold, "
            "learn what shapes its map. (In SpikingJelly, ParametricQIFNode learns a, u1 and u2.)"
        )
    return value


class _Collector:
    """Whether the garbage collector is running, which it may do in the middle of a loop of the host's."""

    running = False

    def __call__(self, phase: str, info: Any) -> None:
        self.running = phase == "start"


_collector = _Collector()
gc.callbacks.append(_collector)


def _enter(neuron: QIF) -> None:
    """Let the host's functions for hidden states find a copy, without keeping it alive as they do what they construct.

    The host does not find its own copies, so that ``utils.reset`` leaves them as they are.
    """
    entered = snn.SpikingNeuron.instances
    entered[:] = [neuron for neuron in entered if neuron is not None]
    proxy = weakref.proxy(neuron)
    entered.append(proxy)
    weakref.finalize(neuron, _leave, entered, proxy).atexit = False


def _leave(entered: list[Any], proxy: Any) -> None:
    """Take a copy that is gone out of the list, through which the host may be going by index at that moment."""
    for index, other in enumerate(entered):
        if other is proxy:
            if _collector.running:
                entered[index] = None  # the host passes by what is none of its neurons
            else:
                del entered[index]
            return


def _recognised(spike_grad: Any) -> Any:
    """snnTorch's closures as the surrogates that the kernels have, which can be pickled besides."""
    name = getattr(spike_grad, "__qualname__", None)
    if getattr(spike_grad, "__module__", None) == "snntorch.surrogate" and name in _HOST_SURROGATES:
        variable, kind = _HOST_SURROGATES[name]
        value = inspect.getclosurevars(spike_grad).nonlocals.get(variable)
        if isinstance(value, (int, float)) and value > 0:
            return SpikeGradient(kind(value, strict=True))
    return spike_grad


def _shifted(surrogate: Any, threshold: Any, sign: int) -> Any:
    """A window moved by the threshold; other surrogates are relative to it anyway."""
    if not isinstance(surrogate, Window):
        return surrogate
    return Window.unchecked(surrogate.lo + sign * threshold, surrogate.hi + sign * threshold, surrogate.height)


def _real(tensor: Tensor) -> Tensor:
    """In at least float32: the host keeps an integer threshold as an integer, and half() rounds beta."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _one(value: Number) -> Number:
    """A tensor of one number as that number."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _detached(value: Any) -> Any:
    return _real(value.detach()) if isinstance(value, Tensor) else value


def _window_beta(beta: Any) -> Any:
    return beta.clamp(max=_MAX_BETA) if isinstance(beta, Tensor) else min(beta, _MAX_BETA)


def _brief(value: Number) -> str:
    if isinstance(value, Tensor):
        return f"{value.item():.4g}" if value.numel() == 1 else f"tensor{tuple(value.shape)}"
    return f"{value:.4g}"


def _refuse_nir_export() -> None:
    """snnTorch would export a QIF as the LIF neuron that it inherits from, without a word; make it raise."""
    if find_spec("nir") is None or find_spec("nirtorch") is None:
        return
    from snntorch import export_nir

    host = getattr(export_nir, "_extract_snntorch_module", None)
    if host is None:  # private: a later snnTorch may call it something else, and the neurons do not depend on it
        return

    def extract(module: nn.Module) -> Any:
        if isinstance(module, QIF):
            raise NotImplementedError(NO_NIR)
        return host(module)

    export_nir._extract_snntorch_module = extract


_refuse_nir_export()
