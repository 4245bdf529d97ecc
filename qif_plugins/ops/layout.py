"""Memory order: how tensors of any dense layout become [T, N] without a copy.

The kernels are elementwise over neurons, so the order of the neurons does not matter as long as every
tensor has the same one. Taking them in the input's memory order lets contiguous and channels-last
inputs through uncopied, and gives the outputs the input's layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Coefficient

__all__ = ["coefficient", "coefficient_gradient", "empty_like_order", "flatten", "memory_order", "wider"]


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The floating-point dtype that holds the values of both, unseen by what watches PyTorch's operators."""
    if a == b:
        return a
    if a.itemsize == b.itemsize:  # float16 and bfloat16
        return torch.float32
    return a if a.itemsize > b.itemsize else b


def memory_order(x_seq: Tensor) -> tuple[int, ...]:
    """The dimensions of one time step, outermost in memory first, counted without the time dimension."""
    if x_seq.is_contiguous():
        return _plain(x_seq.dim() - 1)
    strides = x_seq.stride()[1:]
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))


def flatten(x: Tensor, order: Sequence[int], time: bool = True) -> Tensor:
    """``x`` as [T, N] (or [N] if not ``time``) in ``order``; a view where the memory already is in that order."""
    if tuple(order) == _plain(len(order)) and x.is_contiguous():
        return x.view(x.shape[0], -1) if time else x.view(-1)
    if time:
        return x.permute(0, *(d + 1 for d in order)).reshape(x.shape[0], -1).contiguous()
    return x.permute(tuple(order)).reshape(-1).contiguous()


def empty_like_order(x_seq: Tensor, order: Sequence[int], dtype: torch.dtype, time: bool = True) -> Tensor:
    """An uninitialised tensor of ``x_seq``'s shape, or of one time step's, whose memory is in ``order``, time first."""
    shape = x_seq.shape if time else x_seq.shape[1:]
    if tuple(order) == _plain(len(order)):
        return torch.empty(shape, dtype=dtype, device=x_seq.device)
    # Strided rather than permuted: an operator's output that is a view refuses in-place use, such as `out += identity`.
    strides, step = [1] * len(shape), 1
    for d in reversed((0, *(d + 1 for d in order)) if time else tuple(order)):
        strides[d] = step
        step = step * shape[d]
    return torch.empty_strided(shape, strides, dtype=dtype, device=x_seq.device)


def _plain(dims: int) -> tuple[int, ...]:
    return tuple(range(dims))


def coefficient(value: Tensor, step_shape: Sequence[int], order: Sequence[int], dtype: torch.dtype) -> Coefficient:
    """A tensor that broadcasts to one time step, as a kernel coefficient.

    Dimensions of size 1 outside the varying block become period and ``inner``; those inside it are expanded,
    which costs at most one time step's memory.
    """
    block, inner = _block(value, step_shape, order)
    values = _permuted(value, step_shape, order)
    values = values.expand([step_shape[order[i]] if i in block else 1 for i in range(len(order))])
    return Coefficient(values.reshape(-1).to(dtype).contiguous(), inner)


def coefficient_gradient(grad: Tensor, value: Tensor, step_shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """The gradient [count] of a :func:`coefficient`, back in ``value``'s shape and dtype."""
    block, _ = _block(value, step_shape, order)
    grad = grad.reshape([step_shape[order[i]] if i in block else 1 for i in range(len(order))])
    grad = grad.permute([list(order).index(d) for d in range(len(order))])
    if grad.dim() < value.dim():
        grad = grad.reshape([1] * (value.dim() - grad.dim()) + list(grad.shape))
    return grad.sum_to_size(value.shape).to(value.dtype)


def _permuted(value: Tensor, step_shape: Sequence[int], order: Sequence[int]) -> Tensor:
    missing = len(step_shape) - value.dim()
    value = value.reshape([1] * missing + list(value.shape)) if missing >= 0 else value.reshape([1] * len(step_shape))
    return value.permute(tuple(order))


def _block(value: Tensor, step_shape: Sequence[int], order: Sequence[int]) -> tuple[range, int]:
    """The positions in ``order`` from the first to the last along which ``value`` varies, and the size after it."""
    varying = [i for i, size in enumerate(_permuted(value, step_shape, order).shape) if size != 1]
    if not varying:
        return range(0), math.prod(step_shape)
    block = range(varying[0], varying[-1] + 1)
    return block, math.prod(step_shape[order[i]] for i in range(block.stop, len(order)))
