"""Surrogate derivatives of the spike, and the analytically derived window.

The spike s = Θ(h - θ) has no useful derivative, so the backward pass uses w(h) in its place. Four surrogates have
names. The first three are derived from the stationary membrane h ~ N(μ, σ²) (:mod:`qif_plugins.neuron.moments`):

* ``"isometric"``, this package's and the default: a :class:`Gaussian` centred on the threshold. Its height makes
  the mean surrogate E[w(h)] equal to p_h(θ), the true sensitivity of the firing probability. Its width makes gradients
  keep their size from layer to layer (:mod:`qif_plugins.neuron.isometry`). It has tails, so that a membrane far from
  the threshold receives some gradient, too.
* ``"paper"``: [μ - σ, μ + σ], height 1, as in arXiv 2510.05168.
* ``"unbiased"``, this package's: [θ - κσ, θ + κσ], with the height that makes E[w(h)] equal to p_h(θ).
* ``"heuristic"``: |h - θ| <= α/2, height 1/α, as in LIF code.

The last three are rectangular windows w(h) = height · 1[lo <= h <= hi], inclusive at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from ..ops.contract import Shape
from ..support.names import check_known
from ..support.numbers import checked_number, positive_number
from .isometry import gaussian_width, rectangle_width, relative_mean_square
from .moments import membrane_moments
from .names import WINDOWS, ClosureName, WindowName
from .parameters import Number, QIFParameters, holds_everywhere, is_finite, same_number

Fused = TypeVar("Fused", bound="FusedSurrogate")


class FusedSurrogate:
    """A surrogate that the kernels implement.

    Attributes:
        shape: Name of the formula.
        strict: Whether the spike needs h > θ instead of h >= θ. This package's surrogates fire at equality; those of
            snnTorch do not, and keep this.
        coefficient_names: Names of the numbers in :meth:`coefficients` that may be tensors, for messages.
    """

    shape: ClassVar[Shape]
    coefficient_names: ClassVar[tuple[str, ...]] = ()
    strict: bool = False
    __match_args__: ClassVar[tuple[str, ...]]

    @classmethod
    def unchecked(cls: type[Fused], *numbers: Number, **by_name: Number) -> Fused:
        """Construct without the checks, hence without reading a tensor back from its device."""
        self = object.__new__(cls)
        for name, value in {**dict(zip(cls.__match_args__, numbers, strict=False)), **by_name}.items():
            object.__setattr__(self, name, value)
        return self

    def coefficients(self) -> tuple[Number, Number, Number]:
        """Return the numbers of the kernels' formula.

        Returns:
            s0, s1 and s2 of :mod:`qif_plugins.ops.contract`, unused ones 0.
        """
        raise NotImplementedError

    def derivative(self, h: Tensor, v_threshold: Number) -> Tensor:
        """Compute w(h), elementwise.

        Args:
            h: Pre-reset membrane.
            v_threshold: Threshold θ, broadcastable to ``h``.

        Returns:
            A tensor of ``h``'s shape and dtype.
        """
        raise NotImplementedError

    def shifted(self, distance: Number) -> Any:
        """Return this surrogate with a window's ends moved; other surrogates are relative to the threshold, and stay.

        Args:
            distance: Distance of the move, such as -θ, which makes a window's ends relative to the threshold.
        """
        return self

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Return a copy with ``function`` applied to each number that is a tensor, unchecked.

        Args:
            function: Function of a tensor, such as one that moves it to another device.
        """
        copy = object.__new__(type(self))
        for name, value in vars(self).items():
            object.__setattr__(copy, name, function(value) if isinstance(value, Tensor) else value)
        return copy

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FusedSurrogate):
            return NotImplemented
        return (self.shape, self.strict) == (other.shape, other.strict) and all(
            same_number(*pair) for pair in zip(self.coefficients(), other.coefficients(), strict=True)
        )

    def __hash__(self) -> int:
        numbers = (value for value in self.coefficients() if not isinstance(value, Tensor))
        return hash((self.shape, self.strict, *numbers))


Surrogate = FusedSurrogate | Callable[[Tensor], Tensor]
"""A fused surrogate, or any callable that takes h - θ and returns the spike with a surrogate backward."""


@dataclass(frozen=True, eq=False)
class Window(FusedSurrogate):
    """The rectangular surrogate w(h) = height · 1[lo <= h <= hi].

    Args:
        lo: Lower end, in units of the membrane (not relative to the threshold).
        hi: Upper end, above ``lo``.
        height: Value inside, > 0. Default 1.

    Each may be a float or a tensor that broadcasts to one time step.

    Raises:
        ValueError: An end is not finite, ``lo >= hi``, or ``height <= 0``.
        TypeError: An end or the height is neither a number nor a tensor.
    """

    lo: Number
    hi: Number
    height: Number = 1.0

    shape = Shape.WINDOW
    coefficient_names = ("the window's lo", "the window's hi", "the window's height")

    def __post_init__(self) -> None:
        for name in ("lo", "hi", "height"):
            checked_number(name, getattr(self, name))
        finite = all(_holds(value, is_finite) for value in (self.lo, self.hi, self.height))
        if not (finite and _holds(self.hi - self.lo, lambda d: d > 0) and _holds(self.height, lambda h: h > 0)):
            raise ValueError(
                f"a window needs finite ends with lo < hi and a positive height, got lo={self.lo}, hi={self.hi}, "
                f"height={self.height}"
            )

    @classmethod
    def named(
        cls, name: WindowName, params: QIFParameters, input_std: Number | None = None, **options: Any
    ) -> Window | Gaussian:
        """Derive the surrogate called ``name``.

        Args:
            name: ``"isometric"``, ``"unbiased"``, ``"paper"`` or ``"heuristic"``.
            params: The neuron.
            input_std: Standard deviation of g·x; ``None`` means θ. The heuristic window does not use it.
            **options: Further arguments of :meth:`Gaussian.isometric`, :meth:`unbiased`, :meth:`paper` or
                :meth:`heuristic`.

        Returns:
            A :class:`Gaussian` for ``"isometric"``, else a window in units of the membrane.

        Raises:
            ValueError: The name is unknown; the message lists those that exist.
            TypeError: ``params`` is no :class:`~qif_plugins.QIFParameters`.
        """
        if not isinstance(params, QIFParameters):
            raise TypeError(f"params must be QIFParameters, got {params!r}")
        if name == "heuristic":
            return cls.heuristic(params, **options)
        check_known("window", WINDOWS, name, otherwise="pass a Window(lo, hi)")
        derive: Any = {"isometric": Gaussian.isometric, "unbiased": cls.unbiased, "paper": cls.paper}[name]
        window: Window | Gaussian = derive(params, input_std, **options)
        return window

    @classmethod
    def paper(
        cls,
        params: QIFParameters,
        input_std: Number | None = None,
        input_mean: Number = 0.0,
        closure: ClosureName = "reset",
    ) -> Window:
        """Derive the window [μ - σ, μ + σ] with height 1 of arXiv 2510.05168.

        Args:
            params: The neuron.
            input_std: Standard deviation of g·x. ``None`` (default) means θ, that of tdBN with α = 1.
            input_mean: Mean of g·x. Default 0.
            closure: Closure that gives μ and σ, see :func:`~qif_plugins.neuron.moments.membrane_moments`. The paper
                assumes ``"free"``, which diverges in cases in which ``"reset"`` (default) does not.

        Returns:
            The window, in units of the membrane.

        Raises:
            MomentClosureError: The closure does not converge.
        """
        _, mean, std = _moments(params, input_std, input_mean, closure)
        return cls(mean - std, mean + std)

    @classmethod
    def unbiased(
        cls,
        params: QIFParameters,
        input_std: Number | None = None,
        input_mean: Number = 0.0,
        kappa: float = 0.5,
        closure: ClosureName = "reset",
    ) -> Window:
        """Derive the window [θ - κσ, θ + κσ] with height p_h(θ) / P(lo <= h <= hi), for h ~ N(μ, σ²).

        The other arguments are those of :meth:`paper`.

        Args:
            kappa: Half-width in units of σ, > 0. Default 0.5.

        Raises:
            MomentClosureError: The closure does not converge.
            ValueError: ``kappa`` is not positive.
        """
        kappa = positive_number("kappa", kappa, 0.5)
        _, mean, std = _moments(params, input_std, input_mean, closure)
        return cls(*unbiased_window(params.v_threshold, mean, std, kappa))

    @classmethod
    def isometric(
        cls,
        params: QIFParameters,
        input_std: Number | None = None,
        input_mean: Number = 0.0,
        closure: ClosureName = "reset",
    ) -> Window:
        """Derive the unbiased window whose width keeps the size of gradients, see :mod:`qif_plugins.neuron.isometry`.

        It covers the share (σ_I p_h(θ))² / (r (1 - r) (1 - j)) of the membranes, at most 2/π.
        The arguments are those of :meth:`paper`.

        Raises:
            MomentClosureError: The closure does not converge.
        """
        input_std, mean, std = _moments(params, input_std, input_mean, closure)
        kappa = _alike(rectangle_width(*relative_mean_square(params, mean, std, input_std)), mean)
        return cls(*unbiased_window(params.v_threshold, mean, std, kappa))

    @classmethod
    def heuristic(cls, params: QIFParameters, alpha: float = 1.0) -> Window:
        """Return the window |h - θ| <= α/2 with height 1/α.

        Args:
            params: The neuron.
            alpha: Width of the window, > 0. Default 1.

        Returns:
            The window, in units of the membrane.

        Raises:
            ValueError: ``alpha`` is not positive.
        """
        alpha = positive_number("alpha", alpha, 1)
        return cls(params.v_threshold - alpha / 2, params.v_threshold + alpha / 2, 1 / alpha)

    def coefficients(self) -> tuple[Number, Number, Number]:
        return self.lo, self.hi, self.height

    def shifted(self, distance: Number) -> Window:
        return Window.unchecked(self.lo + distance, self.hi + distance, self.height)

    def span(self, v_threshold: Number) -> tuple[Number, Number]:
        """Return both ends of the window, in units of the membrane."""
        return self.lo, self.hi

    def derivative(self, h: Tensor, v_threshold: Number) -> Tensor:
        inside = (h >= _like(self.lo, h)) & (h <= _like(self.hi, h))
        return inside.to(h.dtype) * _like(self.height, h)


@dataclass(frozen=True, eq=False)
class Gaussian(FusedSurrogate):
    """Gaussian surrogate w(h) = height · exp(-(h - θ - offset)² / (2 width²)).

    Args:
        height: Value at the peak, > 0.
        width: Standard deviation, in units of the membrane, > 0.
        offset: Distance of the peak from the threshold, in units of the membrane. Default 0: the peak is at θ, and
            moves with it.
        strict: Fire at h > θ instead of h >= θ. Default False.

    Height, width and offset may be floats or tensors that broadcast to one time step. Where w(h) is below
    e⁻⁸⁰ · height it is exactly 0, and so it is for infinite h and for NaN.

    Raises:
        ValueError: ``height`` or ``width`` is not positive and finite, or ``offset`` is not finite.
        TypeError: One of them is neither a number nor a tensor.
    """

    height: Number
    width: Number
    offset: Number = field(default=0.0, kw_only=True)
    strict: bool = field(default=False, kw_only=True)

    shape = Shape.GAUSSIAN
    coefficient_names = ("the Gaussian's width", "the Gaussian's height", "the Gaussian's offset")

    def __post_init__(self) -> None:
        for name in ("height", "width", "offset"):
            checked_number(name, getattr(self, name))
        positive = all(_holds(value, lambda v: v > 0) for value in (self.height, self.width))
        if not (positive and all(_holds(value, is_finite) for value in (self.height, self.width, self.offset))):
            raise ValueError(
                "a Gaussian needs a positive, finite height and width and a finite offset, got "
                f"height={self.height}, width={self.width}, offset={self.offset}"
            )

    @classmethod
    def isometric(
        cls,
        params: QIFParameters,
        input_std: Number | None = None,
        input_mean: Number = 0.0,
        closure: ClosureName = "reset",
    ) -> Gaussian:
        """Derive the Gaussian whose mean is p_h(θ) and whose width keeps the size of gradients from layer to layer.

        See :mod:`qif_plugins.neuron.isometry`. The arguments are those of :meth:`Window.paper`.

        Raises:
            MomentClosureError: The closure does not converge.
        """
        input_std, mean, std = _moments(params, input_std, input_mean, closure)
        return cls(*isometric_gaussian(params, mean, std, input_std))

    def coefficients(self) -> tuple[Number, Number, Number]:
        return 1 / (math.sqrt(2) * self.width), self.height, self.offset

    def span(self, v_threshold: Number) -> tuple[Number, Number]:
        """Return the interval from one deviation below the peak to one above it, in units of the membrane."""
        peak = v_threshold + self.offset
        return peak - self.width, peak + self.width

    def derivative(self, h: Tensor, v_threshold: Number) -> Tensor:
        scale, height, offset = (_like(value, h) for value in self.coefficients())
        y = (scale * (h - _like(v_threshold, h) - offset)) ** 2
        return torch.where(y < 80, height * torch.exp(-y), 0.0)


class _Sharp(FusedSurrogate):
    """A surrogate whose first argument is its sharpness."""

    def __post_init__(self) -> None:
        name = self.__match_args__[0]
        sharpness = getattr(self, name)
        if not (isinstance(sharpness, (int, float)) and math.isfinite(sharpness) and sharpness > 0):
            raise ValueError(f"{type(self).__name__} needs a positive, finite {name}, got {sharpness!r}")

    def coefficients(self) -> tuple[Number, Number, Number]:
        return getattr(self, self.__match_args__[0]), 0.0, 0.0


@dataclass(frozen=True, eq=False)
class ATan(_Sharp):
    """ATan of SpikingJelly, atan of snnTorch (``strict=True``): w(h) = (α/2) / (1 + (π/2 · α · (h - θ))²).

    Args:
        alpha: Sharpness, > 0. Default 2.
        strict: Fire at h > θ instead of h >= θ. Default False.
    """

    alpha: float = 2.0
    strict: bool = False

    shape = Shape.ATAN

    def coefficients(self) -> tuple[Number, Number, Number]:
        return math.pi / 2 * self.alpha, self.alpha / 2, 0.0

    def derivative(self, h: Tensor, v_threshold: Number) -> Tensor:
        x = (math.pi / 2 * self.alpha) * (h - _like(v_threshold, h))
        return (self.alpha / 2) / (1 + x * x)


@dataclass(frozen=True, eq=False)
class Sigmoid(_Sharp):
    """Sigmoid of SpikingJelly: w(h) = α p (1 - p) with p = sigmoid(α (h - θ)).

    Args:
        alpha: Sharpness, > 0. Default 4.
        strict: Fire at h > θ instead of h >= θ. Default False.
    """

    alpha: float = 4.0
    strict: bool = False

    shape = Shape.SIGMOID

    def derivative(self, h: Tensor, v_threshold: Number) -> Tensor:
        p = torch.sigmoid(self.alpha * (h - _like(v_threshold, h)))
        return self.alpha * p * (1 - p)


@dataclass(frozen=True, eq=False)
class FastSigmoid(_Sharp):
    """fast_sigmoid of snnTorch (``strict=True``): w(h) = 1 / (slope · |h - θ| + 1)².

    Args:
        slope: Sharpness, > 0. Default 25.
        strict: Fire at h > θ instead of h >= θ. Default False.
    """

    slope: float = 25.0
    strict: bool = False

    shape = Shape.FAST_SIGMOID

    def derivative(self, h: Tensor, v_threshold: Number) -> Tensor:
        return 1 / (self.slope * (h - _like(v_threshold, h)).abs() + 1) ** 2


def spike(h: Tensor, v_threshold: Number, surrogate: FusedSurrogate) -> Tensor:
    """Compute Θ(h - θ), with ``surrogate`` as its derivative by h and by a tensor θ.

    Args:
        h: Pre-reset membrane, any shape.
        v_threshold: Threshold, a float or a tensor broadcastable to ``h``.
        surrogate: The derivative used backward.

    Returns:
        0 and 1 in ``h``'s dtype. NaN does not spike.
    """
    threshold = v_threshold if isinstance(v_threshold, Tensor) else None
    return _Spike.apply(h, threshold, None if threshold is not None else v_threshold, surrogate)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, tensor: Tensor | None, number: float | None, surrogate: FusedSurrogate) -> Tensor:
        threshold: Any = tensor if tensor is not None else number
        ctx.save_for_backward(h, tensor)
        ctx.number, ctx.surrogate = number, surrogate
        return (h > threshold if surrogate.strict else h >= threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, tensor = ctx.saved_tensors
        threshold = tensor if tensor is not None else ctx.number
        through = grads[0] * ctx.surrogate.derivative(h, threshold)
        to_threshold = -through.sum_to_size(tensor.shape) if ctx.needs_input_grad[1] else None
        return through, to_threshold, None, None


def isometric_gaussian(
    params: QIFParameters, mean: Number, std: Number, input_std: Number | None = None
) -> tuple[Number, Number]:
    """Compute height and width of the isometric Gaussian for h ~ N(mean, std²) without reading back from a device.

    Args:
        params: The neuron.
        mean: Mean of the membrane.
        std: Standard deviation of the membrane.
        input_std: Standard deviation of g·x; ``None`` (default) if only the membrane was measured.
    """
    z, log_rho = relative_mean_square(params, mean, std, input_std)
    width = gaussian_width(z, log_rho)
    u = width * width
    height = torch.sqrt((1 + 1 / u) / (2 * math.pi)) * torch.exp(-0.5 * z * z * u / (1 + u))
    return _alike(height / std, mean), _alike(width * std, mean)


def unbiased_window(threshold: Number, mean: Number, std: Number, kappa: Number = 0.5) -> tuple[Number, Number, Number]:
    """Compute ``(lo, hi, height)`` of the unbiased window for h ~ N(mean, std²) without reading back from a device."""
    z = (threshold - mean) / std
    # The height p(θ)/P(lo <= h <= hi) with exp(-z²/2) divided out of both, so that it stays finite
    # where the threshold is so far in the tail that density and probability underflow:
    # ∫_{-κ}^{κ} exp(-z t - t²/2) dt, by Gauss-Legendre.
    ratio = sum(w * _exp(-z * (kappa * t) - 0.5 * (kappa * t) ** 2) for t, w in _LEGENDRE) * kappa
    return threshold - kappa * std, threshold + kappa * std, 1 / (std * ratio)


_LEGENDRE = tuple(zip(*(numbers.tolist() for numbers in leggauss(16)), strict=True))
"""Nodes and weights of the quadrature."""


def _moments(
    params: QIFParameters, input_std: Number | None, input_mean: Number, closure: ClosureName
) -> tuple[Number, Number, Number]:
    """Deviation of the input, mean and deviation of the membrane."""
    if input_std is None:
        input_std = params.v_threshold
        if not _holds(input_std, lambda theta: theta > 0):
            raise ValueError(
                "a window assumes an input whose standard deviation is v_threshold, which must then be positive, got "
                f"v_threshold={input_std}; pass a positive one, the input's own deviation (calibrate measures it), or "
                "a Window(lo, hi)"
            )
    return input_std, *membrane_moments(params, input_std, input_mean, closure)


def _alike(value: Tensor, other: Number) -> Number:
    """``value`` as a float where ``other`` is one."""
    return value if isinstance(other, Tensor) else value.item()


def _exp(value: Any) -> Any:
    return torch.exp(value) if isinstance(value, Tensor) else math.exp(value)


def _like(value: Number, h: Tensor) -> Any:
    return value.to(dtype=h.dtype, device=h.device) if isinstance(value, Tensor) else value


def _holds(value: Any, condition: Callable[[Any], Any]) -> bool:
    # On the meta device there are no values to check.
    return (isinstance(value, Tensor) and value.is_meta) or holds_everywhere(value, condition)
