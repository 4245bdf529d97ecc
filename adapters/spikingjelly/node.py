"""The parts of the QIF node that all versions of SpikingJelly share: assignment, parameters, surrogate, copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qif_plugins.neuron.arguments import NodeArguments, one_number, warn_of_rebound
from qif_plugins.neuron.chaining import ChainedSteps
from qif_plugins.neuron.following import WindowMemory, has_storage, same_versions, versions
from qif_plugins.neuron.functional import check_spread
from qif_plugins.neuron.module import check_surrogate, checked_window, chosen_window, on_device
from qif_plugins.neuron.names import MAP, MATCHED, WindowName
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import Gaussian, Surrogate, Window
from qif_plugins.ops.backends import BACKENDS, BackendName
from qif_plugins.support.numbers import number

from .arguments import NodeOptions, checked_assignment, constructor_number, learns, node_arguments
from .surrogate import AnalyticBase, AnalyticGaussian, AnalyticWindow, fused

ASSIGNED = frozenset(
    {"v_threshold", "v_reset", "tau", "decay_input", "input_gain", *MAP, "dynamics", "window", "surrogate_function"}
)
"""The attributes whose assignment changes the neuron or its window."""
RESOLVED = frozenset({*MAP, "input_gain", "dynamics"})
"""Those of them that are not stored as assigned: reading one gives the result of all arguments together."""
HINT_AT_TAU = "; beta is snnTorch's: here tau (init_tau where it is learned) is 1/(1 - beta), with decay_input=False"


class QIFNeuron(ChainedSteps):
    """The QIF neuron with LIFNode's attributes, mixed in before the ``BaseNode`` of the host's version.

    The attributes in :data:`ASSIGNED` are checked when they are assigned, and the window is derived anew; a value that
    the constructor would refuse is refused, and the node stays as it was. ``v_threshold`` may be a number, a tensor, a
    buffer or a parameter. ``tau`` and ``decay_input`` are kept as passed, ``None`` if left out; ``window`` is ``None``
    where a ``surrogate_function`` was passed.
    """

    surrogates: ClassVar[tuple[Any, ...]] = AnalyticWindow, AnalyticGaussian
    """The surrogate modules of the host's kind that a node makes for itself."""

    _arguments: NodeArguments
    _params: QIFParameters
    _seen: list[tuple[Any, Any]]
    """The tensors that ``_params`` were made of, with their versions."""
    _memories: dict[str, Any]
    _modules: dict[str, Any]
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]
    window: WindowName | Window | None
    surrogate_function: Any
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

    def _construct(
        self,
        tau: float | None,
        decay_input: bool | None,
        v_threshold: float,
        v_reset: float | None,
        surrogate_function: Any,
        backend: BackendName,
        options: Mapping[str, Any],
        **of_host: Any,
    ) -> None:
        """Check the arguments, ``options`` being :class:`~.arguments.NodeOptions`, and construct the host's node."""
        unknown = sorted(options.keys() - NodeOptions.__annotations__.keys())
        if unknown:
            hint = HINT_AT_TAU if "beta" in unknown else ""
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {unknown[0]!r}{hint}")
        numbers = {name: value for name, value in options.items() if name != "window"}
        arguments = node_arguments(decay_input, tau=tau, v_reset=v_reset, **numbers)
        params = arguments.parameters(constructor_number("v_threshold", v_threshold))
        self._check_learnable(params)
        window: Any = chosen_window(options.get("window"), surrogate_function, "surrogate_function")
        vars(self).update(
            _arguments=arguments, _params=params, _seen=[], _link=None, _window_memory=WindowMemory(), window=window,
            tau=arguments.map.leak.get("tau"), decay_input=arguments.map.leak.get("decay_input"),
            v_threshold=params.v_threshold, v_reset=arguments.v_reset,
        )  # fmt: skip
        if window is not None:
            derived = window if isinstance(window, Window) else Window.named(window, params)
            surrogate_function = self._own_surrogate(derived, params.v_threshold)
        of_host |= {"v_threshold": self.v_threshold, "v_reset": self.v_reset, "surrogate_function": surrogate_function}
        super().__init__(**of_host)
        self.backend = backend
        self._settled = True

    def _check_learnable(self, params: QIFParameters) -> None:
        """Refuse parameters that a node which learns them cannot start from."""

    # -- assignment ------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ASSIGNED or not self._settled:
            super().__setattr__(name, value)
        elif name == "window":
            self._choose_window(value)
        elif name == "surrogate_function":
            check_surrogate(name, value)
            if value is not getattr(self, name, None):
                vars(self)["window"] = None
            super().__setattr__(name, value)
        else:
            self._assign(name, value, partial(super().__setattr__, name))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._register(name, param, partial(super().register_parameter, name))  # type: ignore[misc]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        self._register(name, tensor, partial(super().register_buffer, name, persistent=persistent))  # type: ignore[misc]

    def _register(self, name: str, tensor: Tensor | None, store: Callable[[Any], None]) -> None:
        if name in ASSIGNED and self._settled:
            self._assign(name, tensor, store)
        else:
            store(tensor)

    def _assign(self, name: str, value: Any, store: Callable[[Any], None]) -> None:
        """Take over a value; ``store`` puts it among the module's attributes."""
        value = checked_assignment(name, value, type(self).__name__)
        present = self._present() if name in RESOLVED else self._params
        before = self._arguments
        arguments = before.assigned(name, value, present, self._open_to_leak)
        threshold = value if name == "v_threshold" else self._threshold()
        self._adopt(arguments, threshold, partial(store, value) if name not in RESOLVED else None)
        if name in RESOLVED and name != "input_gain":
            self._open_to_leak = False
        warn_of_rebound(before.map, arguments.map, arguments.v_reset is None, "v_reset=0.0")

    def _adopt(self, arguments: NodeArguments, threshold: Any, store: Callable[[], None] | None = None) -> None:
        """Become the neuron that these arguments describe; an error leaves the node as it was."""
        params = arguments.parameters(_detached(threshold))
        window = None if self.derived_window is None else self.settled_window(self.derived_window, params)
        if store is not None:
            store()
        changed = params != self._params
        self._arguments, self._params = arguments, params
        self._seen = versions(arguments.tensors(threshold))
        self._window_memory.clear()
        if changed:
            self._link = None
            if window is not None:
                self._show(window, params.v_threshold)

    def _choose_window(self, window: Any) -> None:
        window = checked_window(window)
        derived, threshold = self._new_window(window), self._present().v_threshold
        if self.window is None:  # other nodes may share the surrogate that was given
            vars(self)["_modules"].pop("surrogate_function", None)
        vars(self)["window"] = window
        self._window_memory.clear()
        self._show(derived, threshold)

    def _own_surrogate(self, window: Window | Gaussian, v_threshold: Any) -> Any:
        kind = next(kind for kind in self.surrogates if isinstance(window, kind.core))
        surrogate = kind.from_window(window, v_threshold)
        surrogate.own = True
        return surrogate

    def _show(self, window: Window | Gaussian, v_threshold: Any) -> None:
        """Show a window in ``surrogate_function``, where users and the host's own time step find it."""
        shown: Any = getattr(self, "surrogate_function", None)
        if _is_own(shown) and isinstance(window, shown.core):
            shown.follow(window, v_threshold)
        else:
            super().__setattr__("surrogate_function", self._own_surrogate(window, v_threshold))

    # -- parameters ------------------------------------------------------------------------------

    a: Any = property(lambda self: self.params.a, doc="Curvature of the map.")
    u1: Any = property(lambda self: self.params.u1, doc="First root of the map.")
    u2: Any = property(lambda self: self.params.u2, doc="Second root of the map.")
    input_gain: Any = property(lambda self: self.params.input_gain, doc="Factor on the input.")

    @property
    def dynamics(self) -> str:
        """The rule that decided the map: ``"paper"``, ``"explicit"``, or one that matches tau."""
        return self._arguments.map.decided

    @property
    def params(self) -> QIFParameters:
        """The neuron as the core describes it; a learned threshold, and what follows it, with gradient."""
        if type(vars(self).get("v_threshold")) is float and not self._seen:
            return self._params
        threshold = self._threshold()
        if learns(threshold):
            return self._arguments.parameters(threshold, learned=True)
        seen = None if torch.compiler.is_compiling() else versions(self._arguments.tensors(threshold))
        if seen is not None and not same_versions(seen, self._seen):
            self._adopt(self._arguments, threshold)
        return self._params

    @property
    def qif_parameters(self) -> QIFParameters:
        """:attr:`params`, by the name that the modules of every host have."""
        return self.params

    def _present(self) -> QIFParameters:
        """The neuron as it is now, without gradient."""
        params = self.params
        if not learns(params.v_threshold):
            return params
        numbers = {name: one_number(_detached(value)) for name, value in params.numbers().items()}
        return params.with_numbers(**numbers)

    def _threshold(self) -> Any:
        for place in (vars(self), self._parameters, self._buffers):
            if place.get("v_threshold") is not None:
                return place["v_threshold"]
        raise RuntimeError(f"{type(self).__name__} has no v_threshold since it was deleted; assign one")

    # -- window and surrogate --------------------------------------------------------------------

    @property
    def derived_window(self) -> WindowName | None:
        return self.window if isinstance(self.window, str) and _is_own(self.surrogate_function) else None

    @property
    def learns_window(self) -> bool:
        threshold = vars(self).get("v_threshold")
        return type(threshold) is not float and self.derived_window is not None and learns(self._threshold())

    def _learned(self) -> Sequence[Any]:
        return [self._threshold()]

    def _new_window(self, window: WindowName | Window) -> Window | Gaussian:
        """The window of that name for the numbers as they are now, if the closure converges for them."""
        return self.settled_window(window, self._present()) if isinstance(window, str) else window

    def _window_changed(self) -> None:
        self._window_memory.clear()
        if self.derived_window is not None:
            self._show(self._new_window(self.derived_window), self._present().v_threshold)

    def _follow(self) -> Window | Gaussian:
        """The window of the learned numbers as they are now, which ``surrogate_function`` shows as well."""
        window = super()._follow()
        if not torch.compiler.is_compiling() and all(map(has_storage, window.coefficients())):
            threshold = self._threshold()
            self._show(window, _detached(self.params.v_threshold) if learns(threshold) else threshold)
        return window

    def _neuron(self, x: Tensor, single: bool = False) -> tuple[QIFParameters, Surrogate]:
        params = self.params
        if self._seen:  # an error names the arguments as they were passed; the core knows only the map
            for name, value in self._arguments.numbers(self._threshold()).items():
                check_spread(name, value, x, x.shape if single else x.shape[1:])
        if self.learns_window:
            return params, self._followed()
        threshold, chosen = _detached(params.v_threshold), self.surrogate_function
        analytic = type(chosen) in self.surrogates and chosen.spiking
        surrogate = chosen.window(threshold) if analytic else fused(chosen)
        if isinstance(surrogate, Window | Gaussian):
            placed = on_device(surrogate, x.device)
            if placed is not surrogate:  # one window a channel, on its first input on this device
                if isinstance(chosen, AnalyticBase):
                    chosen.follow(placed, threshold)
                else:
                    super().__setattr__("surrogate_function", placed)
                surrogate = placed
        return params, surrogate

    def _gain_arguments(self) -> dict[str, Any]:
        return {"decay_input": self.decay_input, "input_gain": self._arguments.input_gain}

    # -- the host's interface --------------------------------------------------------------------

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """The values that ``backend`` may have: ``"auto"`` and the implementations of :mod:`qif_plugins.ops`."""
        return ("auto", *BACKENDS)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._link = None
        self._window_memory.doubt()

    def detach(self) -> None:
        # Not in place as in the hosts: with a surrogate that has no kernel the membrane is a view, which refuses that.
        self._memories = {name: _detached(value) for name, value in self._memories.items()}
        self._link = None
        self._window_memory.doubt()

    def extra_repr(self) -> str:
        names = ("a", "u1", "u2", "v_threshold", "v_reset", "input_gain")
        numbers = ", ".join(f"{name}={number(getattr(self, name, None))}" for name in names)
        leak = "" if self.dynamics not in MATCHED else f", tau={number(self._matched_tau())}"
        leak += ", rebound=False" if self.dynamics == "explicit" and not self._arguments.map.rebound else ""
        window = "" if self.derived_window is None else f", window={self.derived_window}"
        step_mode = f", step_mode={self.step_mode}" if hasattr(self, "step_mode") else ""
        return (
            f"dynamics={self.dynamics}{leak}, {numbers}, detach_reset={self.detach_reset}{window}{step_mode}, "
            f"backend={self.backend}{self._arguments.map.describe_set_aside()}"
        )

    def _matched_tau(self) -> Any:
        return self._arguments.tau

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or a pickle, without the graph behind the membrane."""
        state = self.__dict__.copy()
        state["_link"] = None
        state["_seen"] = [(None, None)] * len(self._seen)  # so that every tensor is read again
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


def overridden(node: nn.Module, cls: type, *names: str) -> bool:
    """Return whether a subclass, or the node itself, overrides methods that the fused forward does not call."""
    mine = vars(node)
    return any(name in mine or getattr(type(node), name) is not getattr(cls, name) for name in names)


def broadcast(x: Tensor, v: Any, single: bool = False) -> tuple[Tensor, Any]:
    """Broadcast the input and the membrane against each other, as SpikingJelly 0.0.0.0.14 does when it adds them.

    A ``v`` of integers is converted to the type of ``x``.

    Raises:
        ValueError: They do not broadcast.
    """
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


def _is_own(surrogate: Any) -> bool:
    return isinstance(surrogate, AnalyticBase) and surrogate.own


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
