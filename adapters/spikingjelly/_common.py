"""What the nodes of every SpikingJelly version share: arguments to parameters, surrogates, and running the core."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qif_plugins.neuron.arguments import MAP, MapArguments, limited_threshold
from qif_plugins.neuron.following import WindowMemory, has_storage
from qif_plugins.neuron.functional import check_spread, qif_multi_step, qif_step
from qif_plugins.neuron.module import NO_NIR, QIFLayer, on_device
from qif_plugins.neuron.parameters import QIFParameters, holds_everywhere, is_finite
from qif_plugins.neuron.surrogate import (
    DEFAULT_WINDOW,
    WINDOWS,
    ATan,
    FusedSurrogate,
    Gaussian,
    Sigmoid,
    Surrogate,
    Window,
)
from qif_plugins.ops.backends import BACKENDS
from qif_plugins.ops.layout import wider
from qif_plugins.support.names import checked_number, unknown
from qif_plugins.support.text import number

from .surrogate import AnalyticBase

__all__ = ["Arguments", "QIFNeuron", "resolve"]

DEFAULT_TAU = 2.0
LOW_PRECISION = (torch.float16, torch.bfloat16)
NUMBERS = ("v_threshold", "v_reset", "input_gain", "tau", "decay_input", "a", "u1", "u2")
ASSIGNED = frozenset({*NUMBERS, "dynamics", "window", "surrogate_function"})
"""What may be assigned after construction and is not simply looked up when the node runs."""
RESOLVED = frozenset({*MAP, "input_gain", "dynamics"})
"""Those of them that are read as what came of all arguments together."""
LEARNS_A_MAP = "ParametricQIFNode learns a, u1 and u2, and keeps them where the neuron is stable"
WAYS_OUT = {
    **dict.fromkeys(MAP, f"{LEARNS_A_MAP}. An attribute of a subclass's own needs another name than a, u1 or u2"),
    "tau": f"{LEARNS_A_MAP}; a ParametricLIFNode that swap() converts goes on learning its leak",
    "input_gain": "a layer or a norm before the node can scale its input; of the node, v_threshold learns",
    "v_reset": "of the node, v_threshold learns",
}
"""What to do instead of learning a number that a node does not learn."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a node was given, by LIFNode's names and ours, the threshold aside.

    Attributes:
        map: What decides the map.
        v_reset: Membrane after a spike, and the potential that a matched leak decays to; ``None`` for the soft reset.
        input_gain: Factor on the input; ``None`` where it was left out.
        kept_gain: The gain of the leak that was matched before a, u1 or u2 was assigned.
    """

    map: MapArguments = field(default_factory=MapArguments)
    v_reset: Any = 0.0
    input_gain: Any = None
    kept_gain: Any = 1.0

    def assigned(self, name: str, value: Any, current: QIFParameters, open_to_leak: bool) -> Arguments:
        """After an assignment; ``current`` is the neuron before it.

        Raises:
            TypeError: The value is no number.
            ValueError: The value is out of range, or would have no effect.
        """
        if name == "v_threshold":
            return self
        if name in ("v_reset", "input_gain"):
            return dataclasses.replace(self, **{name: value})
        if name in ("tau", "decay_input"):
            return dataclasses.replace(self, map=self.map.with_leak(open_to_leak, **{name: value}))
        present = {root: getattr(current, root) for root in MAP}
        if name == "dynamics":
            changed = self.map.with_dynamics(value, present)
        else:
            changed = self.map.with_map(present, **{name: value})
        if changed.decided == "explicit" and self.map.decided == "lif":
            return dataclasses.replace(self, map=changed, kept_gain=current.input_gain)
        return dataclasses.replace(self, map=changed)

    def used(self, v_threshold: Any) -> dict[str, Any]:
        """The numbers that the neuron is made of, with the threshold, by the names that they were passed by."""
        leak = {"tau": self.map.leak.get("tau")} if self.map.decided == "lif" else dict(self.map.given)
        return {"v_threshold": v_threshold, "v_reset": self.v_reset, "input_gain": self.input_gain, **leak}

    def parameters(self, v_threshold: Any, checked: bool = True) -> QIFParameters:
        """The neuron that all of them describe together.

        Args:
            v_threshold: Threshold θ.
            checked: Whether to check the numbers. Default True; ``False`` keeps the threshold, a tensor, where the
                membrane is stable instead, and reads nothing back from its device.

        Raises:
            ValueError: A ``tau`` that is not finite and above 1, or parameters that
                :class:`~qif_plugins.QIFParameters` refuses.
        """
        rest: Any = 0.0 if self.v_reset is None else _plain(self.v_reset)
        if checked:
            v_threshold = _plain(v_threshold)
        else:  # a half module's, too
            v_threshold = v_threshold.to(torch.promote_types(v_threshold.dtype, torch.float32))
        common: dict[str, Any] = {"v_reset": rest, "reset": "soft" if self.v_reset is None else "hard"}
        if checked:
            for name, value in (("v_threshold", v_threshold), ("v_reset", rest)):
                if not (isinstance(value, Tensor) and value.is_meta) and not holds_everywhere(value, is_finite):
                    raise ValueError(f"{name} must be finite, got {number(value)}")
        if self.map.decided != "lif":
            roots = {name: _plain(value) for name, value in self.map.roots.items()}
            kept = self.kept_gain if self.map.decided == "explicit" else 1.0
            common["input_gain"] = kept if self.input_gain is None else _plain(self.input_gain)
            if checked:
                return QIFParameters(**roots, v_threshold=v_threshold, **common)
            points = QIFParameters.unchecked(**roots).fixed_points()
            return QIFParameters.unchecked(**roots, v_threshold=limited_threshold(v_threshold, *points), **common)
        tau = _plain(self.map.leak.get("tau", DEFAULT_TAU))
        if not (holds_everywhere(tau, lambda t: t > 1) and holds_everywhere(tau, lambda t: 1 - 1 / t < 1)):
            raise ValueError(
                f"tau must be above 1 and finite, got {number(tau)}: SpikingJelly's LIF leaks with 1 - 1/tau a step"
            )
        if checked and not holds_everywhere(v_threshold - rest, lambda reach: reach > 0):
            raise ValueError(
                f"v_threshold={number(v_threshold)} must lie above v_reset={number(rest)}, which a matched leak "
                "decays to"
            )
        gain = 1 / tau if self.map.leak.get("decay_input", True) else 1.0
        common["input_gain"] = gain if self.input_gain is None else _plain(self.input_gain)
        if not checked:
            return QIFParameters.matching_lif(
                1 - 1 / tau, limited_threshold(v_threshold, rest), v_rest=rest, checked=False, **common
            )
        try:
            return QIFParameters.matching_lif(1 - 1 / tau, v_threshold, v_rest=rest, **common)
        except ValueError as error:
            raise ValueError(
                f"tau={number(tau)} with v_reset={number(self.v_reset)} cannot be matched: {error}"
            ) from None


def resolve(
    tau: Any,
    decay_input: Any,
    v_threshold: Any,
    v_reset: Any,
    *,
    a: Any = None,
    u1: Any = None,
    u2: Any = None,
    input_gain: Any = None,
    dynamics: str | None = None,
) -> tuple[QIFParameters, Arguments]:
    """The neuron that a constructor's arguments describe, ``None`` where left out, and the arguments for later.

    Raises:
        TypeError: An argument that is no number.
        ValueError: Contradictory arguments, or parameters that :class:`~qif_plugins.QIFParameters` refuses.
    """
    given = {name: _constant(name, value) for name, value in (("a", a), ("u1", u1), ("u2", u2)) if value is not None}
    leak: dict[str, Any] = {} if tau is None else {"tau": _constant("tau", tau)}
    if decay_input is not None:
        leak["decay_input"] = _flag(decay_input)
    arguments = Arguments(
        MapArguments(dynamics, given, leak),
        None if v_reset is None else _constant("v_reset", v_reset),
        None if input_gain is None else _constant("input_gain", input_gain),
    )
    return arguments.parameters(_constant("v_threshold", v_threshold)), arguments


class _Link(NamedTuple):
    """The membrane that the last call left in ``v``, and what the next call starts from while it still is there.

    ``state`` is the membrane before its reset with the graph behind it, or after it in float32 where ``v`` is rounded.
    """

    v: Tensor
    version: int | None
    tracked: bool
    place: Any
    state: Tensor
    pre_reset: bool
    threshold: tuple[Any, int | None] | None
    """A threshold that is a tensor, and its version: another one would reset the membrane otherwise."""

    def belongs_to(self, v: Any, threshold: Any) -> bool:
        if v is not self.v or v.requires_grad != self.tracked or _version(v) != self.version:
            return False
        if not torch.compiler.is_compiling() and _place(v) != self.place:
            return False
        return self.threshold is None or (threshold is self.threshold[0] and _version(threshold) == self.threshold[1])


class QIFNeuron(QIFLayer):
    """Mixed in before the host's ``BaseNode``.

    What LIFNode's users assign after construction, and our own arguments, may be assigned: the node is then the one
    that the constructor would have made, and a window that was derived is derived anew. A value that the constructor
    would refuse is refused, and the node stays as it was. ``v_threshold`` may be a tensor that broadcasts to one time
    step, and an ``nn.Parameter`` or another tensor with gradient: the threshold is then learned, kept where the
    membrane is stable, see :func:`qif_plugins.neuron.arguments.limited_threshold`.

    Attributes:
        v_threshold: Firing threshold θ.
        v_reset: Membrane after a spike; ``None`` means the soft reset.
        window: How the surrogate was chosen: a name, a given :class:`~qif_plugins.neuron.surrogate.Window`, or ``None``
            where ``surrogate_function`` was passed.
        tau: As passed, ``None`` if left out; read by code written for LIFNode.
        decay_input: As passed, ``None`` if left out.
    """

    analytic_window: ClassVar[Any]
    """The AnalyticWindow of the host version."""
    analytic_gaussian: ClassVar[Any]
    """Its AnalyticGaussian."""
    fused_surrogates: ClassVar[dict[Any, Any]]
    """Surrogates of the host that have a fused kernel: host class -> core class, both taking ``alpha``."""

    _arguments: Arguments
    _params: QIFParameters
    _seen: list[tuple[Tensor, int | None]]
    _memories: dict[str, Any]
    _modules: dict[str, Any]
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    _link: _Link | None
    _window_memory: WindowMemory
    _backend: str
    window: str | Window | None
    surrogate_function: Any
    detach_reset: bool
    tau: Any
    decay_input: bool | None
    v_threshold: Any
    v_reset: Any
    v: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("v_threshold", "v_reset", "tau", "decay_input"):
            if isinstance(vars(cls).get(name), property):
                raise TypeError(
                    f"{cls.__name__}.{name} is a property, which a QIF node would not read; assign {name} to the node "
                    "instead, before each forward if it is computed"
                )

    # -- assignment ------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ASSIGNED or "_arguments" not in vars(self):
            super().__setattr__(name, value)
        elif name == "window":
            self._choose_window(value)
        elif name == "surrogate_function":
            self._choose_surrogate(value)
        elif name in vars(self) and _is_number(value) and _is_number(vars(self)[name]) and value == vars(self)[name]:
            super().__setattr__(name, value)  # as the host's constructor does with what it was given
        else:
            value = self._checked(name, value)
            self._assign(name, value, lambda: super(QIFNeuron, self).__setattr__(name, value))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._register(name, param, partial(super().register_parameter, name, param))  # type: ignore[misc]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        self._register(name, tensor, partial(super().register_buffer, name, tensor, persistent))  # type: ignore[misc]

    def _register(self, name: str, tensor: Tensor | None, store: Callable[[], None]) -> None:
        if name in ASSIGNED and "_arguments" in vars(self):
            self._assign(name, self._checked(name, tensor), store)
        else:
            store()

    def _checked(self, name: str, value: Any) -> Any:
        """``value`` as the node keeps it.

        Raises:
            TypeError: Not what ``name`` may be.
            ValueError: A number to learn that the node does not learn.
        """
        if name == "dynamics":
            return value
        if name == "decay_input":
            return _flag(value)
        if value is None and name != "v_threshold":
            return None
        value = checked_number(name, value)
        if _learns(value) and name != "v_threshold":
            raise ValueError(f"{type(self).__name__} does not learn {name}: {WAYS_OUT[name]}")
        return value

    def _assign(self, name: str, value: Any, store: Callable[[], None]) -> None:
        """Take over a value that is checked by itself; ``store`` puts it among the module's attributes."""
        present = self._present() if name in RESOLVED else self._params
        arguments = self._arguments.assigned(name, value, present, self._open_to_leak)
        threshold = value if name == "v_threshold" else self._threshold()
        params = arguments.parameters(_detached(threshold))
        window = self._derived(params)
        if name not in RESOLVED:
            store()
        elif name != "input_gain":
            self._open_to_leak = False
        self._adopt(arguments, threshold, params, window)

    def _adopt(
        self, arguments: Arguments, threshold: Any, params: QIFParameters, window: Window | Gaussian | None
    ) -> None:
        changed = params != self._params
        self._arguments, self._params = arguments, params
        self._seen = _tensors(arguments, threshold)
        self._window_memory.clear()
        if changed:
            self._link = None
            if window is not None:
                self._show_window(window, params.v_threshold)

    def _derived(self, params: QIFParameters) -> Window | Gaussian | None:
        """The window for ``params`` where the node derives one by name."""
        return None if self.derived_window is None else self.settled_window(self.derived_window, params)

    def _threshold(self) -> Any:
        for place in (vars(self), self._parameters, self._buffers):
            if place.get("v_threshold") is not None:
                return place["v_threshold"]
        raise RuntimeError(f"{type(self).__name__} has no v_threshold since it was deleted; assign one")

    def _choose_window(self, window: Any) -> None:
        window = self._chosen_window(window)
        before = self.window, self.surrogate_function
        if self.window is None or not _is_own(self.surrogate_function):  # others may have the one that was given
            surrogate = self.analytic_window()
            surrogate.own = True
            super().__setattr__("surrogate_function", surrogate)
        super().__setattr__("window", window)
        try:
            if isinstance(window, Window):
                self._show_window(window, self._present().v_threshold)
            else:
                self._window_changed()
        except ValueError:
            for name, value in zip(("window", "surrogate_function"), before, strict=True):
                super().__setattr__(name, value)
            raise

    @staticmethod
    def _chosen_window(window: Any) -> str | Window:
        if not isinstance(window, str | Window):
            raise TypeError(f"window must be one of {', '.join(map(repr, WINDOWS))} or a Window, got {window!r}")
        if isinstance(window, str) and window not in WINDOWS:
            raise ValueError(unknown("window", window, WINDOWS, "pass a Window(lo, hi)"))
        return window

    def _choose_surrogate(self, surrogate: Any) -> None:
        before = self._modules.get("surrogate_function", vars(self).get("surrogate_function"))
        _check_surrogate(surrogate)
        super().__setattr__("surrogate_function", surrogate)
        constructed = before is None and _is_own(surrogate)
        if surrogate is not before and not constructed:
            vars(self)["window"] = None

    @property
    def a(self) -> Any:
        """Curvature of the map."""
        return self.params.a

    @property
    def u1(self) -> Any:
        """First root of the map."""
        return self.params.u1

    @property
    def u2(self) -> Any:
        """Second root of the map."""
        return self.params.u2

    @property
    def input_gain(self) -> Any:
        """Factor on the input."""
        return self.params.input_gain

    @property
    def dynamics(self) -> str:
        """What decided the map: ``"paper"``, ``"lif"`` (a leak is matched) or ``"explicit"`` (a, u1, u2 were given)."""
        return self._arguments.map.decided

    @property
    def params(self) -> QIFParameters:
        """The neuron as the core describes it; a learned threshold, and what follows it, with gradient."""
        if type(vars(self).get("v_threshold")) is float and not self._seen:
            return self._params
        threshold = self._threshold()
        if _learns(threshold):
            return self._arguments.parameters(threshold, checked=False)
        seen = _tensors(self._arguments, threshold)
        if not torch.compiler.is_compiling() and not _same(seen, self._seen):
            params = self._arguments.parameters(threshold)
            self._adopt(self._arguments, threshold, params, self._derived(params))
        return self._params

    def _present(self) -> QIFParameters:
        """The neuron as it is now, without gradient."""
        params = self.params
        if not _learns(params.v_threshold):
            return params
        numbers = {name: _plain(_detached(value)) for name, value in params.numbers().items()}
        return QIFParameters.unchecked(**numbers, reset=params.reset)

    @property
    def qif_parameters(self) -> QIFParameters:
        """The same under the name that every host's QIF module has."""
        return self.params

    @property
    def derived_window(self) -> str | None:
        """Name of the window that the node derives for itself; ``None`` where its surrogate was given."""
        return self.window if isinstance(self.window, str) and _is_own(self.surrogate_function) else None

    @property
    def learns_window(self) -> bool:
        """Whether the window follows a learned threshold."""
        threshold = vars(self).get("v_threshold")
        return type(threshold) is not float and self.derived_window is not None and _learns(self._threshold())

    def _followed(self) -> Window | Gaussian:
        """The window of the threshold as it is learned now, shown in ``surrogate_function`` as well."""
        assert self.derived_window is not None
        name = self.derived_window
        before = self._window_memory.window
        window = self._window_memory([self._threshold()], lambda: self.followed_window(name, self.params))
        if window is self._window_memory.window and window is not before:
            self._show_window(window, _detached(self.params.v_threshold))
        return window

    def _window_changed(self) -> None:
        self._window_memory.clear()
        params = self._present()
        window = self._derived(params)
        if window is not None:
            self._show_window(window, params.v_threshold)

    def _shown(self, window: Window | Gaussian, v_threshold: Any) -> Any:
        """A surrogate of the host for a derived window."""
        kind = self.analytic_window if isinstance(window, Window) else self.analytic_gaussian
        shown = kind.from_window(window, v_threshold)
        shown.own = True
        return shown

    def _show_window(self, window: Window | Gaussian, v_threshold: Any) -> None:
        """Show a window in ``surrogate_function``, where the host's own time step and the user find it."""
        kind = self.analytic_window if isinstance(window, Window) else self.analytic_gaussian
        if isinstance(self.surrogate_function, kind):
            self.surrogate_function.follow(window, v_threshold)
        else:
            super().__setattr__("surrogate_function", self._shown(window, v_threshold))

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """What ``backend`` may be: ``"auto"`` and the implementations of :mod:`qif_plugins.ops`."""
        return ("auto", *BACKENDS)

    @property
    def backend(self) -> str:
        """Which implementation runs; ``"auto"`` takes the best one for the input's device."""
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in self.supported_backends:
            raise ValueError(unknown("backend", value, self.supported_backends))
        self._backend = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One time step or all of them, as ``step_mode`` says.

        Raises:
            NotImplementedError: torch.fx traces into the node, as NIR's exporter does.
        """
        if args and isinstance(args[0], torch.fx.Proxy):
            raise NotImplementedError(
                f"torch.fx cannot trace into {type(self).__name__}; make it a leaf of the tracer. If this is an export "
                f"to NIR: {NO_NIR}"
            )
        self._before_forward()
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _before_forward(self) -> None:
        """What a neuron with learned numbers does before each pass."""

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._link = None
        self._window_memory.doubt()

    def detach(self) -> None:
        # Not in place, as the hosts do it: behind a surrogate without kernel the membrane is a view, which refuses.
        self._memories = {name: _detached(value) for name, value in self._memories.items()}
        self._link = None
        self._window_memory.doubt()

    def extra_repr(self) -> str:
        names = ("a", "u1", "u2", "v_threshold", "v_reset", "input_gain")
        numbers = ", ".join(f"{name}={number(getattr(self, name, None))}" for name in names)
        leak = "" if self.dynamics != "lif" else f", tau={number(self._leak_tau())}"
        window = "" if self.derived_window is None else f", window={self.derived_window}"
        step_mode = f", step_mode={self.step_mode}" if hasattr(self, "step_mode") else ""
        return (
            f"dynamics={self.dynamics}{leak}, {numbers}, detach_reset={self.detach_reset}{window}{step_mode}, "
            f"backend={self.backend}{self._arguments.map.describe_set_aside()}"
        )

    def _leak_tau(self) -> Any:
        """The time constant that is matched."""
        return self._arguments.map.leak.get("tau", DEFAULT_TAU)

    def __getstate__(self) -> dict[str, Any]:
        """A used node copies and pickles: the graph behind its membrane stays with the original."""
        state = self.__dict__.copy()
        state["_link"] = None
        state["_seen"] = [(None, None)] * len(self._seen)  # whatever is a tensor is looked at anew
        state["_memories"] = {name: _detached(value) for name, value in state["_memories"].items()}
        if "v_seq" in state:
            state["v_seq"] = _detached(state["v_seq"])
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + "v_threshold")
        if loaded is not None and self._buffers.get("v_threshold") is not None:
            try:
                self._arguments.parameters(loaded)
            except ValueError as error:
                args[-1].append(f"{prefix}v_threshold: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- construction ----------------------------------------------------------------------------

    def _configure(
        self, params: QIFParameters, arguments: Arguments, surrogate_function: Any, window: str | Window | None
    ) -> dict[str, Any]:
        """Set what the host's constructor does not; returns the arguments to call it with."""
        if surrogate_function is None:
            window = self._chosen_window(DEFAULT_WINDOW if window is None else window)
            derived = Window.named(window, params) if isinstance(window, str) else window
            surrogate_function = self._shown(derived, params.v_threshold)
        elif window is not None:
            raise ValueError("surrogate_function and window both decide the surrogate gradient; pass one of them")
        else:
            _check_surrogate(surrogate_function)
        leak = arguments.map.leak
        vars(self).update(
            _params=params, _seen=[], _link=None, _window_memory=WindowMemory(), window=window, tau=leak.get("tau"),
            decay_input=leak.get("decay_input"), v_threshold=params.v_threshold, v_reset=arguments.v_reset,
            _arguments=arguments,
        )  # fmt: skip
        return {
            "v_threshold": params.v_threshold,
            "v_reset": self.v_reset,
            "surrogate_function": surrogate_function,
        }

    # -- running ---------------------------------------------------------------------------------

    def _broadcast(self, x: Tensor, single: bool = False) -> tuple[Tensor, Any]:
        """The input and the membrane, as the host adds them: either may broadcast, and the membrane be of integers."""
        v = self.v
        if not isinstance(v, Tensor):
            return x, v
        if not v.is_floating_point():
            v = v.to(x.dtype)
        step = x.shape if single else x.shape[1:]
        if v.shape == step:
            return x, v
        try:
            shape = torch.broadcast_shapes(v.shape, step)
        except RuntimeError:
            raise ValueError(
                f"v has shape {list(v.shape)} and one time step of the input {list(step)}; they do not broadcast. Call "
                "reset() between inputs of different shapes"
            ) from None
        if single:
            return x.expand(shape), v.expand(shape)
        return x.reshape(len(x), *[1] * (len(shape) - len(step)), *step).expand(len(x), *shape), v.expand(shape)

    def _neuron(self, x_seq: Tensor, single: bool = False) -> tuple[QIFParameters, Surrogate]:
        """The parameters and the surrogate for this input (one step of it if ``single``) as the core takes them."""
        params = self.params
        if self._seen:  # the core knows the map alone, and the user what was passed
            for name, value in self._arguments.used(self._threshold()).items():
                check_spread(name, value, x_seq, x_seq.shape if single else x_seq.shape[1:])
        threshold = _detached(params.v_threshold)
        if self.learns_window:
            return params, self._followed()
        surrogate = self._surrogate(threshold)
        if isinstance(surrogate, Window | Gaussian):
            placed = on_device(surrogate, x_seq.device)
            if placed is not surrogate:  # one window a channel, on its first input on this device
                self._show_window(placed, threshold)
                surrogate = placed
        return params, surrogate

    def _surrogate(self, v_threshold: Any) -> Surrogate:
        chosen = self.surrogate_function
        if isinstance(chosen, FusedSurrogate):
            return chosen
        if not getattr(chosen, "spiking", False):
            return chosen
        if type(chosen) in (self.analytic_window, self.analytic_gaussian):
            return chosen.window(v_threshold)
        fused = self.fused_surrogates.get(type(chosen))
        # A sharpness that is learned, or none that the kernels accept, is left to the host's own surrogate.
        if fused is not None and isinstance(chosen.alpha, (int, float)) and chosen.alpha > 0:
            return fused(float(chosen.alpha))
        return chosen

    def _implementation(self, x_seq: Tensor) -> str:
        return self.backend

    def _transition(self, x_seq: Tensor, v: Tensor | float) -> tuple[Tensor, Tensor]:
        """Explicit states: the spikes and the last membrane; gradients chain through the membrane after its reset."""
        params, surrogate = self._neuron(x_seq)
        spike_seq, v_next = qif_multi_step(
            x_seq, v, params, surrogate, self.detach_reset, backend=self._implementation(x_seq)
        )
        return spike_seq, v_next

    def _run(
        self, x: Tensor, v: Tensor | float, store_v_seq: bool = False, single: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The spikes, the last membrane and, on demand, every membrane; gradients as in one call over all steps.

        Without ``detach_reset`` the gradient of a sequence folds the reset into the charge, which a chain of
        calls through the membrane after its reset cannot give. So the membrane before its reset is kept
        beside ``v`` and the next call starts from it, as long as ``v`` is what this call left there. In half
        precision, where ``v`` is rounded, it starts from the float32 membrane, as a call over all steps does.

        Args:
            x: All time steps, or one if ``single``.
            v: The node's membrane.
            store_v_seq: Whether to return every membrane.
            single: Whether ``x`` has no dimension for time.
        """
        params, surrogate = self._neuron(x, single)
        low = x.dtype in LOW_PRECISION
        link = self._link
        threshold = vars(self).get("v_threshold")
        if type(threshold) is not float:
            threshold = self._threshold()
        chained = link is not None and link.belongs_to(v, threshold)
        dtype = wider(x.dtype, v.dtype) if isinstance(v, Tensor) else x.dtype
        start: Tensor | float
        if link is not None and chained:
            start = link.state
        elif low:
            start = v.float() if isinstance(v, Tensor) else torch.full_like(x if single else x[0], v, dtype=torch.float)
        else:
            start = v
        keep = _may_be_trained() and not self.detach_reset and params.reset == "hard"
        pre_reset = chained and link is not None and link.pre_reset
        backend = self._implementation(x)
        if single:
            spikes, exact, *h = qif_step(
                x, start, params, surrogate, self.detach_reset, backend=backend, store_h=keep, pre_reset=pre_reset
            )
        else:
            spikes, exact, *h = qif_multi_step(
                x, start, params, surrogate, self.detach_reset, store_v_seq, backend, store_h_seq=keep,
                pre_reset=pre_reset,
            )  # fmt: skip
        v_out = exact if exact.dtype == dtype else exact.to(dtype)
        v_seq = v_out if store_v_seq else None
        v_last = v_out[-1].clone() if store_v_seq else v_out
        self._link = None
        if h:
            # A copy of the last step, which does not keep the others in memory.
            state = h[0] if single else h[0][-1].clone()
            self._link = _Link(*_as_left(v_last), state, True, _kept(threshold))
        elif low:
            state = exact[-1].clone() if store_v_seq else exact
            self._link = _Link(*_as_left(v_last), state, False, _kept(threshold))
        return spikes, v_last, v_seq


def _may_be_trained() -> bool:
    """Whether a gradient may be asked for: of what is captured (exported, traced) even where none is possible now."""
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    if torch.compiler.is_compiling():
        return getattr(
            torch.compiler, "is_exporting", torch.compiler.is_compiling
        )()  # older versions have no such name
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return getattr(proxies, "get_proxy_mode", lambda: None)() is not None


def _erf(alpha: float) -> Gaussian:
    """SpikingJelly's Erf, whose derivative is α/√π · exp(-α² (h - θ)²)."""
    return Gaussian(alpha / math.sqrt(math.pi), 1 / (math.sqrt(2) * alpha))


FUSED_TYPES = (("ATan", ATan), ("Sigmoid", Sigmoid), ("Erf", _erf))


def fused_surrogates(host_surrogate: Any) -> dict[Any, Any]:
    """The table of :attr:`QIFNeuron.fused_surrogates` for a host's surrogate module."""
    return {getattr(host_surrogate, name): core for name, core in FUSED_TYPES}


def _constant(name: str, value: Any) -> float:
    """A constructor's number.

    Raises:
        TypeError: None.
        ValueError: A tensor that is none, or one to learn.
    """
    value = checked_number(name, value, "a number")
    if _learns(value):
        way_out = WAYS_OUT.get(name, "assign it to the node, node.v_threshold = nn.Parameter(...), and it is learned")
        raise ValueError(f"{name} is a tensor with gradient, which the constructor does not take: {way_out}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, and the constructor takes one number; assign it to the node "
            f"afterwards, node.{name} = ..."
        )
    return float(value)


def _flag(value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool | int):
        raise TypeError(f"decay_input must be True or False, got {value!r}")
    return None if value is None else bool(value)


def _plain(value: Any) -> Any:
    """A tensor of one number as that number, one of integers as floats."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    if value.numel() == 1:
        return float(value)
    return value if value.is_floating_point() else value.float()


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.requires_grad or isinstance(value, nn.Parameter))


def _check_surrogate(surrogate: Any) -> None:
    if isinstance(surrogate, type) or not (callable(surrogate) or isinstance(surrogate, FusedSurrogate)):
        raise TypeError(
            f"surrogate_function must be a surrogate of SpikingJelly or qif_plugins or a function of h - θ, got "
            f"{surrogate!r}; a class has to be called, surrogate.ATan(), and a window by name is window="
        )


def _is_own(surrogate: Any) -> bool:
    return isinstance(surrogate, AnalyticBase) and surrogate.own


def _tensors(arguments: Arguments, threshold: Any) -> list[tuple[Tensor, int | None]]:
    """The tensors among the numbers of a node, with their versions."""
    values = (*arguments.map.given.values(), *arguments.map.leak.values(), arguments.v_reset, arguments.input_gain)
    return [(value, _version(value)) for value in (threshold, *values) if isinstance(value, Tensor)]


def _same(seen: list[tuple[Tensor, int | None]], before: list[tuple[Tensor, int | None]]) -> bool:
    return len(seen) == len(before) and all(
        now is then and version == last for (now, version), (then, last) in zip(seen, before, strict=True)
    )


def _kept(threshold: Any) -> tuple[Any, int | None] | None:
    return (threshold, _version(threshold)) if isinstance(threshold, Tensor) else None


def _version(v: Any) -> int | None:
    # Inference tensors count no versions, and a compiler cannot trace the question.
    return None if torch.compiler.is_compiling() or v.is_inference() else v._version


def _place(v: Tensor) -> Any:
    """What ``detach_()`` and an assigned ``.data`` change, which counts as no new version: graph and memory."""
    return v.grad_fn, v.data_ptr() if has_storage(v) else None


def _as_left(v: Tensor) -> tuple[Tensor, int | None, bool, Any]:
    return v, _version(v), v.requires_grad, None if torch.compiler.is_compiling() else _place(v)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
