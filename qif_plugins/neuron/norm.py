"""Threshold-dependent batch normalization (tdBN), for hosts and networks that have none.

tdBN (Zheng et al., *Going Deeper With Directly-Trained Larger Spiking Neural Networks*, AAAI 2021,
arXiv 2011.05280) normalizes over time, batch and space together and scales to the threshold::

    y = λ α θ (x - E[x]) / sqrt(Var[x] + ε) + β,    λ = 1 and β = 0 at the start

The input of the next neuron is then close to N(0, (α θ)²), as the surrogate windows of this package assume. The factor
α θ is in the initial ``weight``. So the module is a batch norm with a batch norm's state_dict, and tools that fold or
convert batch norms work on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..support.numbers import positive_number

__all__ = ["TDBatchNorm1d", "TDBatchNorm2d", "TDBatchNorm3d"]


class _TDBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Threshold-dependent batch normalization.

    Args:
        num_features: Channels C.
        v_threshold: Threshold θ of the next neuron, > 0. Default 1.
        alpha: Factor α > 0: 1 on a single path, 1/√n if n paths add up before the neuron. Default 1.
        eps: As in :class:`torch.nn.BatchNorm2d`.
        momentum: As in :class:`torch.nn.BatchNorm2d`.
        affine: Must be True, since the weight contains α θ.
        track_running_stats: As in :class:`torch.nn.BatchNorm2d`.
        device: As in :class:`torch.nn.BatchNorm2d`.
        dtype: As in :class:`torch.nn.BatchNorm2d`.

    Shape:
        Input ``[N, C, *]`` or time first ``[T, N, C, *]``, statistics over all dimensions but C; output of the same
        shape.

    Raises:
        ValueError: ``alpha`` or ``v_threshold`` is not positive, ``affine`` is False, or the input has another rank.
    """

    _spatial_dims: int

    def __init__(
        self,
        num_features: int,
        v_threshold: float = 1.0,
        alpha: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("v_threshold", v_threshold), ("alpha", alpha)):
            positive_number(name, value)
        if not affine:
            raise ValueError("tdBN carries alpha * v_threshold in its weight and needs affine=True")
        self.v_threshold, self.alpha = float(v_threshold), float(alpha)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Running statistics to (0, 1), weight to α θ, bias to 0."""
        super().reset_parameters()
        nn.init.constant_(self.weight, self.alpha * self.v_threshold)

    def forward(self, input: Tensor) -> Tensor:
        sequence = input.dim() == self._spatial_dims + 3
        if not sequence:
            return super().forward(input)
        return super().forward(input.flatten(0, 1)).unflatten(0, input.shape[:2])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, v_threshold={self.v_threshold}, alpha={self.alpha}"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != self._spatial_dims + 2:
            expected = self._spatial_dims + 2
            raise ValueError(
                f"{type(self).__name__} takes {expected} dimensions, [N, C, *], or {expected + 1} with time first, "
                f"got shape {list(input.shape)}"
            )


class TDBatchNorm1d(_TDBatchNorm):
    __doc__ = _TDBatchNorm.__doc__
    _spatial_dims = 0


class TDBatchNorm2d(_TDBatchNorm):
    __doc__ = _TDBatchNorm.__doc__
    _spatial_dims = 2


class TDBatchNorm3d(_TDBatchNorm):
    __doc__ = _TDBatchNorm.__doc__
    _spatial_dims = 3
