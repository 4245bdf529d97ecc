"""The derived surrogates as surrogate modules, for the surrogate base classes of every SpikingJelly version.

SpikingJelly hands its surrogates h - θ, so a window's ends are relative to the threshold here, unlike in
:class:`qif_plugins.neuron.surrogate.Window`. The mathematics is the core's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from spikingjelly.activation_based import surrogate as host
from torch import Tensor

from qif_plugins.neuron.names import WindowName
from qif_plugins.neuron.parameters import Number, QIFParameters, holds_everywhere
from qif_plugins.neuron.surrogate import ATan, Gaussian, Sigmoid, Surrogate, Window, spike
from qif_plugins.support.numbers import number

Self = TypeVar("Self", bound="AnalyticBase")


class AnalyticBase:
    """A surrogate module with a derived surrogate; mixed in before the host's surrogate base class."""

    core: ClassVar[type[Window] | type[Gaussian]]
    """The core's surrogate."""
    default: ClassVar[WindowName]
    """Name of the window that a constructor without arguments derives."""
    names: ClassVar[tuple[str, ...]]
    """Its numbers, by the constructor's names."""
    spiking: bool
    own = False
    """Whether a node made it for itself, and may change it."""
    primitive_function: ClassVar[Any]

    @classmethod
    def spiking_function(cls, x: Tensor, *numbers: Number, **by_name: Number) -> Tensor:
        """Θ(x) forward, the surrogate of these numbers backward."""
        return spike(x, 0.0, cls.core.unchecked(*numbers, **by_name))

    @classmethod
    def relative(cls, surrogate: Any, v_threshold: Number) -> dict[str, Number]:
        """The constructor's numbers for a surrogate in units of the membrane."""
        placed = surrogate.shifted(-v_threshold)
        return {name: getattr(placed, name) for name in cls.names}

    def window(self, v_threshold: Number) -> Any:
        """This surrogate as the core's, in units of the membrane of a neuron with threshold ``v_threshold``."""
        return self.core.unchecked(*self._numbers()).shifted(v_threshold)

    def _numbers(self) -> list[Any]:
        return [getattr(self, name) for name in self.names]

    def _construct(self, spiking: bool, **numbers: Any) -> None:
        """Construct the module with these numbers; where none was passed, with those of the paper's parameters.

        Raises:
            ValueError: Some are missing (the height alone is 1 by default), or as the core's surrogate.
        """
        passed = [name for name, value in numbers.items() if value is not None]
        missing = [name for name, value in numbers.items() if value is None and name != "height"]
        if not passed:
            params = QIFParameters()
            numbers = self.relative(Window.named(self.default, params), params.v_threshold)
        elif missing:
            raise ValueError(
                f"{' and '.join(missing)} must be passed with {', '.join(passed)}; leave all of them out for the "
                "surrogate that is derived for the paper's parameters"
            )
        numbers["height"] = 1.0 if numbers["height"] is None else numbers["height"]
        self.core(**numbers)
        super().__init__(spiking, **numbers)  # type: ignore[call-arg]
        for name, value in numbers.items():  # which 0.0.0.0.14 leaves out
            setattr(self, name, value)

    @classmethod
    def from_window(cls: type[Self], window: Window | Gaussian, v_threshold: Number) -> Self:
        """Make the module of a surrogate of the core.

        Args:
            window: A surrogate in units of the membrane.
            v_threshold: Threshold θ of the neuron that will use it.
        """
        return cls(**cls.relative(window, v_threshold))

    def follow(self, window: Window | Gaussian, v_threshold: Number) -> None:
        """Take over the numbers of a surrogate in units of the membrane; the spiking mode stays as it is."""
        for name, value in self.relative(window, v_threshold).items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        numbers = ", ".join(f"{name}={number(getattr(self, name), '.4g')}" for name in self.names)
        return f"{numbers}, spiking={self.spiking}"

    def forward(self, x: Tensor) -> Tensor:
        function = self.spiking_function if self.spiking else self.primitive_function
        spikes: Tensor = function(x, *self._numbers())
        return spikes


class AnalyticWindowBase(AnalyticBase):
    """The rectangular window."""

    core = Window
    default = "unbiased"
    names = Window.__match_args__
    lo: Number
    hi: Number
    height: Number

    def __init__(
        self, lo: Number | None = None, hi: Number | None = None, height: Number | None = None, spiking: bool = True
    ) -> None:
        self._construct(spiking, lo=lo, hi=hi, height=height)

    @classmethod
    def unbiased(cls: type[Self], params: QIFParameters, input_std: Number | None = None, **options: Any) -> Self:
        """The window of :meth:`qif_plugins.neuron.surrogate.Window.unbiased`, with its arguments."""
        return cls.from_window(Window.unbiased(params, input_std, **options), params.v_threshold)

    @classmethod
    def isometric(cls: type[Self], params: QIFParameters, input_std: Number | None = None, **options: Any) -> Self:
        """The window of :meth:`qif_plugins.neuron.surrogate.Window.isometric`, with its arguments."""
        return cls.from_window(Window.isometric(params, input_std, **options), params.v_threshold)

    @classmethod
    def paper(cls: type[Self], params: QIFParameters, input_std: Number | None = None, **options: Any) -> Self:
        """The window of :meth:`qif_plugins.neuron.surrogate.Window.paper`, with its arguments."""
        return cls.from_window(Window.paper(params, input_std, **options), params.v_threshold)

    @classmethod
    def heuristic(cls: type[Self], params: QIFParameters, alpha: float = 1.0) -> Self:
        """The window of :meth:`qif_plugins.neuron.surrogate.Window.heuristic`, with its arguments."""
        return cls.from_window(Window.heuristic(params, alpha), params.v_threshold)

    @staticmethod
    def primitive_function(x: Tensor, lo: Any, hi: Any, height: Number) -> Tensor:
        """The integral of the window from -∞ to x."""
        return height * (torch.clamp(x, lo, hi) - lo)


class AnalyticGaussianBase(AnalyticBase):
    """The Gaussian centred on the threshold."""

    core = Gaussian
    default = "isometric"
    names = Gaussian.__match_args__
    height: Number
    width: Number

    def __init__(self, height: Number | None = None, width: Number | None = None, spiking: bool = True) -> None:
        self._construct(spiking, height=height, width=width)

    @classmethod
    def isometric(cls: type[Self], params: QIFParameters, input_std: Number | None = None, **options: Any) -> Self:
        """The surrogate of :meth:`qif_plugins.Gaussian.isometric`, with its arguments."""
        return cls.from_window(Gaussian.isometric(params, input_std, **options), params.v_threshold)

    @classmethod
    def relative(cls, surrogate: Any, v_threshold: Number) -> dict[str, Number]:
        if surrogate.strict or not holds_everywhere(surrogate.offset, lambda offset: offset == 0):
            raise ValueError(
                "an AnalyticGaussian has its peak at the threshold and fires there, got "
                f"offset={surrogate.offset}, strict={surrogate.strict}; a QIFNode takes the Gaussian itself, "
                "surrogate_function=Gaussian(...)"
            )
        return super().relative(surrogate, v_threshold)

    @staticmethod
    def primitive_function(x: Tensor, height: Number, width: Number) -> Tensor:
        """The integral of the Gaussian from -∞ to x."""
        return height * width * math.sqrt(math.pi / 2) * torch.special.erfc(-x / (math.sqrt(2) * width))


class CudaText:
    """The text that the CuPy kernels of SpikingJelly 0.0.0.0.14 paste into their backward pass."""

    def cuda_codes(self: Any, y: str, x: str, dtype: str) -> str:
        """CUDA statement that assigns the surrogate's value at ``x`` to ``y``.

        Args:
            y: The target, such as ``const float grad_s_to_h``.
            x: CUDA expression of h - θ.
            dtype: ``"float"`` or ``"half2"``.

        Raises:
            NotImplementedError: Another dtype; the host's kernels know only these two.
        """
        if dtype not in ("float", "half2"):
            raise NotImplementedError(f"no CUDA code for dtype {dtype!r}; there is one for 'float' and for 'half2'")
        half = dtype == "half2"
        numbers = self._numbers()
        if self.core is Window:
            lo, hi, height = (_literal(value, half) for value in numbers)
            value = f"(({x}) >= {lo} && ({x}) <= {hi}) ? {height} : 0.0f"
            if half:  # the ordered comparisons are false for NaN, as in the float version
                value = f"__hmul2(__hmul2(__hge2({x}, {lo}), __hle2({x}, {hi})), {height})"
        else:
            height, scale = (_literal(value, half) for value in (numbers[0], math.sqrt(0.5) / numbers[1]))
            scaled = f"__hmul2({x}, {scale})" if half else f"(({x}) * {scale})"
            value = f"{height} * expf(-{scaled} * {scaled})"
            if half:
                value = f"__hmul2({height}, h2exp(__hneg2(__hmul2({scaled}, {scaled}))))"
        return f"{y} = {value};"

    def cuda_code(self: Any, x: str, y: str, dtype: str = "fp32") -> str:
        """The same in ``clock_driven``'s form: it declares ``y`` itself, and dtype is ``"fp32"`` or ``"fp16"``."""
        kind = {"fp32": "float", "fp16": "half2"}.get(dtype, dtype)
        text: str = self.cuda_codes(f"const {kind} {y}", x, kind)
        return text


MULTI = getattr(host, "MultiArgsSurrogateFunctionBase", None)
BASE: Any = type("Base", (CudaText, MULTI), {}) if MULTI else host.SurrogateFunctionBase
"""The host's base class of surrogates, in 0.0.0.0.14 that of surrogates of several numbers."""


class AnalyticWindow(AnalyticWindowBase, BASE):
    """The rectangular window as a SpikingJelly surrogate, for our nodes and the host's alike.

    Build it from a neuron with :meth:`unbiased`, :meth:`paper` or :meth:`heuristic`.

    Args:
        lo: Lower end relative to the threshold. Left out together with ``hi`` and ``height``: the unbiased window of
            the paper's parameters.
        hi: Upper end relative to the threshold, above ``lo``.
        height: Value inside, > 0. Default 1 where the ends are given.
        spiking: As in the host: spikes with the window as gradient, or the integral of the window. Default True.

    Raises:
        ValueError: One end without the other, a height without ends, or as :class:`qif_plugins.Window`.
    """


class AnalyticGaussian(AnalyticGaussianBase, BASE):
    """The Gaussian as a SpikingJelly surrogate, for our nodes and the host's alike; see :class:`qif_plugins.Gaussian`.

    Build it from a neuron with :meth:`isometric`.

    Args:
        height: Value at the threshold, > 0. Default 1. Left out together with ``width``: the isometric Gaussian of the
            paper's parameters.
        width: Standard deviation, in units of the membrane, > 0.
        spiking: As in the host: spikes with the Gaussian as gradient, or its integral. Default True.

    Raises:
        ValueError: A height without a width, or as :class:`qif_plugins.Gaussian`.
    """


def fused(surrogate: Any) -> Surrogate:
    """Return the core's version of one of the host's surrogates, for which there are kernels, or any other as it is."""
    kind = type(surrogate)
    if kind.__name__ not in FUSED or kind.__module__ not in HOST_MODULES or not surrogate.spiking:
        return surrogate
    # The host's own surrogate runs with an alpha that is learned or that the kernels do not accept.
    if not isinstance(surrogate.alpha, int | float) or not surrogate.alpha > 0:
        return surrogate
    return FUSED[kind.__name__](float(surrogate.alpha))


HOST_MODULES = ("spikingjelly.activation_based.surrogate", "spikingjelly.clock_driven.surrogate")
FUSED: dict[str, Callable[[float], Surrogate]] = {
    "ATan": ATan,
    "Sigmoid": Sigmoid,
    # The derivative of Erf is α/√π · exp(-α² (h - θ)²).
    "Erf": lambda alpha: Gaussian(alpha / math.sqrt(math.pi), 1 / (math.sqrt(2) * alpha)),
}


def _literal(value: Number, half: bool) -> str:
    text = f"{float(value)!r}f"
    return f"__float2half2_rn({text})" if half else text
