"""What the nodes of every SpikingJelly version share: arguments to parameters, surrogates, and running the core."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from qif_plugins.functional import qif_multi_step, qif_step
from qif_plugins.layer import NO_NIR, QIFLayer, on_device
from qif_plugins.ops.backends import BACKENDS
from qif_plugins.ops.layout import wider
from qif_plugins.parameters import QIFParameters
from qif_plugins.surrogate import WINDOWS, ATan, FusedSurrogate, Sigmoid, Surrogate, Window

from .surrogate import AnalyticWindowBase

__all__ = ["QIFNeuron", "resolve_parameters"]

DYNAMICS = ("lif", "paper")
DEFAULT_TAU = 2.0
LOW_PRECISION = (torch.float16, torch.bfloat16)


def resolve_parameters(
    tau: float | None,
    decay_input: bool | None,
    v_threshold: float,
    v_reset: float | None,
    *,
    a: float | None = None,
    u1: float | None = None,
    u2: float | None = None,
    input_gain: float | None = None,
    dynamics: str | None = None,
) -> QIFParameters:
    """The neuron that LIFNode's arguments and ours describe together.

    Explicit ``a``, ``u1``, ``u2`` decide first (those left out have the paper's values), then ``dynamics``; else a
    leak that was passed is matched, and without one the parameters are the paper's.

    Args:
        tau: LIFNode's time constant in steps, > 1; ``None`` if left out.
        decay_input: Whether LIFNode scales its input by 1/tau; ``None`` if left out.
        v_threshold: Threshold θ.
        v_reset: Membrane after a spike, and the potential that LIFNode leaks to; ``None`` for the soft reset.
        a: Curvature, ``None`` if left out; ``u1``, ``u2`` and ``input_gain`` likewise.
        u1: First root.
        u2: Second root.
        input_gain: Factor on the input. Left out it is 1/tau where a leak with ``decay_input`` is matched, else 1.
        dynamics: ``"lif"``, ``"paper"`` or ``None``.

    Raises:
        ValueError: Unknown ``dynamics``, ``dynamics`` together with a, u1 or u2, a ``tau`` not above 1, or
            parameters that :class:`~qif_plugins.QIFParameters` refuses.
    """
    explicit = {name: float(value) for name, value in (("a", a), ("u1", u1), ("u2", u2)) if value is not None}
    if dynamics is not None and dynamics not in DYNAMICS:
        raise ValueError(f"unknown dynamics {dynamics!r}; the dynamics are {', '.join(DYNAMICS)}")
    if dynamics is not None and explicit:
        raise ValueError(
            f"dynamics={dynamics!r} and {', '.join(f'{k}={v:g}' for k, v in explicit.items())} both decide the map; "
            "pass one of them"
        )
    common: dict[str, Any] = {
        "v_threshold": float(v_threshold),
        "v_reset": None if v_reset is None else float(v_reset),
        "reset": "soft" if v_reset is None else "hard",
    }
    if tau is not None and not float(tau) > 1:
        raise ValueError(f"tau must be above 1, got {tau}: SpikingJelly's LIF leaks with 1 - 1/tau a step")
    leak_passed = tau is not None or decay_input is not None
    if explicit or dynamics == "paper" or (dynamics is None and not leak_passed):
        return QIFParameters(**{**common, **explicit, "input_gain": 1.0 if input_gain is None else float(input_gain)})
    tau = DEFAULT_TAU if tau is None else float(tau)
    gain = 1 / tau if decay_input is None or decay_input else 1.0
    return QIFParameters.matching_lif(
        1 - 1 / tau,
        v_rest=0.0 if v_reset is None else float(v_reset),
        input_gain=gain if input_gain is None else float(input_gain),
        **common,
    )


class _Link(NamedTuple):
    """The membrane that the last call left in ``v``, and what the next call starts from while it still is there.

    ``state`` is the membrane before its reset with the graph behind it, or after it in float32 where ``v`` is rounded.
    """

    v: Tensor
    version: int | None
    state: Tensor
    pre_reset: bool

    def belongs_to(self, v: Any) -> bool:
        return v is self.v and _version(v) == self.version


def _number(name: str, doc: str) -> Any:
    def get(self: QIFNeuron) -> Any:
        return getattr(self._params, name)

    def assign(self: QIFNeuron, value: float | Tensor) -> None:
        # A tensor as it is: functional.set_threshold_margin assigns one a class and then writes into it.
        self._replace(**{name: value if isinstance(value, Tensor) and value.numel() > 1 else float(value)})

    return property(get, assign, doc=doc)


class QIFNeuron(QIFLayer):
    """Mixed in before the host's ``BaseNode``.

    The numbers of the neuron may be assigned after construction, as hosts' users do with ``v_threshold``; they
    are checked as in the constructor, and a window that was derived from them is derived anew.

    Attributes:
        window: How the surrogate was chosen: a name, a given :class:`~qif_plugins.surrogate.Window`, or ``None``
            where ``surrogate_function`` was passed.
        tau: As passed, ``None`` if left out; read by code written for LIFNode.
        decay_input: As passed, ``None`` if left out.
    """

    analytic_window: ClassVar[Any]
    """The AnalyticWindow of the host version."""
    fused_surrogates: ClassVar[dict[Any, Any]]
    """Surrogates of the host that have a fused kernel: host class -> core class, both taking ``alpha``."""

    _params: QIFParameters
    _memories: dict[str, Any]
    _link: _Link | None
    _backend: str
    window: str | Window | None
    surrogate_function: Any
    detach_reset: bool
    v: Any

    a = _number("a", "Curvature of the map.")
    u1 = _number("u1", "First root of the map.")
    u2 = _number("u2", "Second root of the map.")
    v_threshold = _number("v_threshold", "Firing threshold θ.")
    input_gain = _number("input_gain", "Factor on the input.")

    @property
    def v_reset(self) -> Any:
        """Membrane after a spike; ``None`` means the soft reset."""
        return None if self._params.reset == "soft" else self._params.v_reset

    @v_reset.setter
    def v_reset(self, value: float | None) -> None:
        if value is None:
            self._replace(reset="soft")
        else:
            self._replace(v_reset=float(value), reset="hard")

    @property
    def params(self) -> QIFParameters:
        """The neuron as the core describes it."""
        return self._params

    @property
    def qif_parameters(self) -> QIFParameters:
        """The same under the name that every host's QIF module has."""
        return self.params

    @property
    def derived_window(self) -> str | None:
        """Name of the window that the node derives for itself; ``None`` where its surrogate was given."""
        analytic = isinstance(self.window, str) and isinstance(self.surrogate_function, AnalyticWindowBase)
        return self.window if analytic else None  # type: ignore[return-value]

    def _window_changed(self) -> None:
        if self.derived_window is not None:
            window = self.derive_window(self.derived_window, self._params)
            self.surrogate_function.follow(window, self._params.v_threshold)

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
            raise ValueError(
                f"unknown backend {value!r}; the backends are {', '.join(map(repr, self.supported_backends))}"
            )
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
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._link = None

    def detach(self) -> None:
        # Not in place, as the hosts do it: behind a surrogate without kernel the membrane is a view, which refuses.
        self._memories = {name: _detached(value) for name, value in self._memories.items()}
        self._link = None

    def extra_repr(self) -> str:
        names = ("a", "u1", "u2", "v_threshold", "v_reset", "input_gain")
        numbers = ", ".join(f"{name}={show(getattr(self, name))}" for name in names)
        window = "" if self.derived_window is None else f", window={self.derived_window}"
        step_mode = f", step_mode={self.step_mode}" if hasattr(self, "step_mode") else ""
        return f"{numbers}, detach_reset={self.detach_reset}{window}{step_mode}, backend={self.backend}"

    def __getstate__(self) -> dict[str, Any]:
        """A used node copies and pickles: the graph behind its membrane stays with the original."""
        state = self.__dict__.copy()
        state["_link"] = None
        state["_memories"] = {name: _detached(value) for name, value in state["_memories"].items()}
        if "v_seq" in state:
            state["v_seq"] = _detached(state["v_seq"])
        return state

    # -- construction ----------------------------------------------------------------------------

    def _configure(
        self,
        params: QIFParameters,
        surrogate_function: Any,
        window: str | Window | None,
        tau: float | None,
        decay_input: bool | None,
    ) -> dict[str, Any]:
        """Set what the host's constructor does not; returns the arguments to call it with."""
        if surrogate_function is None:
            window = "unbiased" if window is None else window
            surrogate_function = self.analytic_window.from_window(derive_window(window, params), params.v_threshold)
        elif window is not None:
            raise ValueError("surrogate_function and window both decide the surrogate gradient; pass one of them")
        elif isinstance(surrogate_function, type) or not callable(surrogate_function):
            raise TypeError(
                "surrogate_function must be a surrogate of SpikingJelly or a function of h - θ, got "
                f"{surrogate_function!r}; a class has to be called, surrogate.ATan(), and a window by name is window="
            )
        self._params = params
        self._link = None
        self.window = window
        self.tau = tau
        self.decay_input = decay_input
        return {
            "v_threshold": params.v_threshold,
            "v_reset": self.v_reset,
            "surrogate_function": surrogate_function,
        }

    def _replace(self, **changes: Any) -> None:
        params = dataclasses.replace(self._params, **changes)
        if params == self._params:
            return  # the host's constructor assigns what it was given
        if self.derived_window is not None:
            window = self.derive_window(self.derived_window, params)
            self.surrogate_function.follow(window, params.v_threshold)
        self._params = params
        self._link = None

    # -- running ---------------------------------------------------------------------------------

    def _neuron(self, x_seq: Tensor, single: bool = False) -> tuple[QIFParameters, Surrogate]:
        """The parameters and the surrogate for this input (one step of it if ``single``) as the core takes them."""
        params = self._params
        surrogate = self._surrogate(params.v_threshold)
        if isinstance(surrogate, Window):
            placed = on_device(surrogate, x_seq.device)
            if placed is not surrogate:  # one window a channel, on its first input on this device
                self.surrogate_function.follow(placed, params.v_threshold)
                surrogate = placed
        return params, surrogate

    def _surrogate(self, v_threshold: Any) -> Surrogate:
        chosen = self.surrogate_function
        if isinstance(chosen, FusedSurrogate):
            return chosen
        if not getattr(chosen, "spiking", False):
            return chosen
        if type(chosen) is self.analytic_window:
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
        chained = link is not None and link.belongs_to(v)
        dtype = wider(x.dtype, v.dtype) if isinstance(v, Tensor) else x.dtype
        start: Tensor | float
        if link is not None and chained:
            start = link.state
        elif low:
            start = v.float() if isinstance(v, Tensor) else torch.full_like(x if single else x[0], v, dtype=torch.float)
        else:
            start = v
        keep = torch.is_grad_enabled() and not self.detach_reset and params.reset == "hard"
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
        if h and h[0].requires_grad:
            # A copy of the last step: the kernels write over the rest in the backward pass if nobody holds it.
            state = h[0] if single else h[0][-1].clone()
            self._link = _Link(v_last, _version(v_last), state, True)
        elif low:
            self._link = _Link(v_last, _version(v_last), exact[-1].clone() if store_v_seq else exact, False)
        return spikes, v_last, v_seq


FUSED_TYPES = (("ATan", ATan), ("Sigmoid", Sigmoid))


def fused_surrogates(host_surrogate: Any) -> dict[Any, Any]:
    """The table of :attr:`QIFNeuron.fused_surrogates` for a host's surrogate module."""
    return {getattr(host_surrogate, name): core for name, core in FUSED_TYPES}


def derive_window(window: str | Window, params: QIFParameters) -> Window:
    """The window called or given by ``window``.

    Raises:
        TypeError: Neither a name nor a Window.
        ValueError: Unknown name.
    """
    if isinstance(window, Window):
        return window
    if isinstance(window, str):
        return Window.named(window, params)
    raise TypeError(f"window must be one of {', '.join(map(repr, WINDOWS))} or a Window, got {window!r}")


def show(value: Any) -> str:
    """A number, or the range of a tensor of them, for messages."""
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"[{value.min().item():g} .. {value.max().item():g}]"
    return str(value) if value is None else f"{value.item() if isinstance(value, Tensor) else value:g}"


def _version(v: Any) -> int | None:
    # Inference tensors count no versions, and a compiler cannot trace the question.
    return None if torch.compiler.is_compiling() or v.is_inference() else v._version


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
