"""The analytic window as a surrogate module, for the surrogate base classes of every SpikingJelly version.

SpikingJelly hands its surrogates h - θ, so the window's ends are relative to the threshold here, unlike in
:class:`qif_plugins.neuron.surrogate.Window`. The mathematics is the core's.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from qif_plugins.neuron.parameters import Number, QIFParameters
from qif_plugins.neuron.surrogate import Window, spike
from qif_plugins.support.text import number

__all__ = ["AnalyticWindowBase", "CudaAnalyticWindowBase"]

Self = TypeVar("Self", bound="AnalyticWindowBase")


class AnalyticWindowBase:
    """Mixed in before the host's surrogate base class; see the class of the host version for the constructor."""

    lo: Number
    hi: Number
    height: Number
    spiking: bool
    own = False
    """Whether a node made it for itself, and may change it."""

    @classmethod
    def from_window(cls: type[Self], window: Window, v_threshold: Number) -> Self:
        """The same window, relative to the threshold.

        Args:
            window: A window in units of the membrane.
            v_threshold: Threshold θ of the neuron that will use it.
        """
        return cls(**_relative(window, v_threshold))

    @classmethod
    def unbiased(cls: type[Self], params: QIFParameters, input_std: Number | None = None, **options: Any) -> Self:
        """The window of :meth:`qif_plugins.neuron.surrogate.Window.unbiased`, with its arguments."""
        return cls.from_window(Window.unbiased(params, input_std, **options), params.v_threshold)

    @classmethod
    def paper(cls: type[Self], params: QIFParameters, input_std: Number | None = None, **options: Any) -> Self:
        """The window of :meth:`qif_plugins.neuron.surrogate.Window.paper`, with its arguments."""
        return cls.from_window(Window.paper(params, input_std, **options), params.v_threshold)

    @classmethod
    def heuristic(cls: type[Self], params: QIFParameters, alpha: float = 1.0) -> Self:
        """The window of :meth:`qif_plugins.neuron.surrogate.Window.heuristic`, with its arguments."""
        return cls.from_window(Window.heuristic(params, alpha), params.v_threshold)

    def follow(self, window: Window, v_threshold: Number) -> None:
        """Take over the ends and the height of ``window``; the spiking mode stays as it is.

        Args:
            window: A window in units of the membrane.
            v_threshold: Threshold θ of the neuron.
        """
        for name, value in _relative(window, v_threshold).items():
            setattr(self, name, value)

    def window(self, v_threshold: Number) -> Window:
        """This window in units of the membrane of a neuron with threshold ``v_threshold``."""
        return Window.unchecked(v_threshold + self.lo, v_threshold + self.hi, self.height)

    def extra_repr(self) -> str:
        numbers = ", ".join(f"{name}={number(getattr(self, name), '.4g')}" for name in ("lo", "hi", "height"))
        return f"{numbers}, spiking={self.spiking}"

    @staticmethod
    def spiking_function(x: Tensor, lo: Number, hi: Number, height: Number) -> Tensor:
        """Θ(x) forward, the window backward."""
        return spike(x, 0.0, Window.unchecked(lo, hi, height))

    @staticmethod
    def primitive_function(x: Tensor, lo: Any, hi: Any, height: Number) -> Tensor:
        """The integral of the window from -∞ to x."""
        return height * (torch.clamp(x, lo, hi) - lo)

    def forward(self, x: Tensor) -> Tensor:
        function = self.spiking_function if self.spiking else self.primitive_function
        return function(x, self.lo, self.hi, self.height)


class CudaAnalyticWindowBase(AnalyticWindowBase):
    """Adds the CUDA text that the CuPy kernels of SpikingJelly 0.0.0.0.14 paste into their backward pass."""

    def cuda_codes(self, y: str, x: str, dtype: str) -> str:
        """CUDA statement that assigns the window's value at ``x`` to ``y``.

        Args:
            y: What to assign to, such as ``const float grad_s_to_h``.
            x: CUDA expression of h - θ.
            dtype: ``"float"`` or ``"half2"``.

        Raises:
            NotImplementedError: Another dtype; the host's kernels know only these two.
        """
        lo, hi, height = (f"{float(number)!r}f" for number in (self.lo, self.hi, self.height))
        if dtype == "float":
            return f"{y} = (({x}) >= {lo} && ({x}) <= {hi}) ? {height} : 0.0f;"
        if dtype == "half2":
            lo, hi, height = (f"__float2half2_rn({number})" for number in (lo, hi, height))
            # The ordered comparisons are false for NaN, as in the float version.
            return f"{y} = __hmul2(__hmul2(__hge2({x}, {lo}), __hle2({x}, {hi})), {height});"
        raise NotImplementedError(f"no CUDA code for dtype {dtype!r}; there is one for 'float' and for 'half2'")

    def cuda_code(self, x: str, y: str, dtype: str = "fp32") -> str:
        """The same in ``clock_driven``'s form: it declares ``y`` itself, and dtype is ``"fp32"`` or ``"fp16"``."""
        kind = {"fp32": "float", "fp16": "half2"}.get(dtype, dtype)
        return self.cuda_codes(f"const {kind} {y}", x, kind)


def _relative(window: Window, v_threshold: Number) -> dict[str, Number]:
    return {"lo": window.lo - v_threshold, "hi": window.hi - v_threshold, "height": window.height}
