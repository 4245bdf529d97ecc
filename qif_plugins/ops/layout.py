"""View tensors of any layout as the [T, N] of the kernels, and give results the input's layout.

The kernels are elementwise over neurons, so the order of the neurons does not matter as long as it is the same in
every tensor. In the input's memory order, no dense layout with time outermost in memory (contiguous, channels-last,
other permutations of a step) has to be copied. Where time is not outermost, as in the
batch-first view ``x.transpose(0, 1)``, or where memory has gaps, tensors are copied on the way in and out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Coefficient


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the floating-point dtype that holds the values of both, without calling an operator of PyTorch."""
    if a == b:
        return a
    if a.itemsize == b.itemsize:  # float16 and bfloat16
        return torch.float32
    return a if a.itemsize > b.itemsize else b


def memory_order(x_seq: Tensor) -> tuple[int, ...]:
    """List the dimensions of one time step, outermost in memory first, counted without the time dimension."""
    if x_seq.is_contiguous():
        return _plain(x_seq.dim() - 1)
    return _outermost_first(x_seq.stride()[1:])


def _outermost_first(strides: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))


def flatten(x: Tensor, order: Sequence[int], time: bool = True) -> Tensor:
    """Return ``x`` as [T, N] (or [N] if not ``time``) in ``order``; a view if its memory is in that order already."""
    if tuple(order) == _plain(len(order)) and x.is_contiguous():
        return x.view(x.shape[0], -1) if time else x.view(-1)
    ordered = _in_order(x, order, time)
    return ordered.reshape(x.shape[0], -1).contiguous() if time else ordered.reshape(-1).contiguous()


def make_room(result: Tensor, order: Sequence[int], time: bool = True) -> Tensor:
    """Return the tensor for a kernel to write ``result`` to, in the shape that :func:`flatten` would give it.

    It is the memory of ``result`` if that is in ``order``, else new memory, from which :func:`give_back` copies.
    """
    if _in_order(result, order, time).is_contiguous():
        return flatten(result, order, time)
    shape = (result.shape[0], result[0].numel()) if time else (result.numel(),)
    return torch.empty(shape, dtype=result.dtype, device=result.device)


def give_back(flat: Tensor, result: Tensor, order: Sequence[int], time: bool = True) -> None:
    """Copy into ``result`` what a kernel wrote to the tensor of :func:`make_room`, if that is other memory."""
    if flat.data_ptr() != result.data_ptr():
        ordered = _in_order(result, order, time)
        ordered.copy_(flat.view(ordered.shape))


def _in_order(x: Tensor, order: Sequence[int], time: bool) -> Tensor:
    return x.permute(0, *(d + 1 for d in order)) if time else x.permute(tuple(order))


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Call ``torch.empty_like``, with the same strides for fake tensors: PyTorch's differ in dimensions of size 1."""
    if x.is_contiguous() or _is_dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
    return torch.empty_like(x, dtype=dtype)


def _is_dense(x: Tensor) -> bool:
    """Whether the memory of ``x`` has no gaps, and no elements that share a place."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """Give ``result``, contiguous and of the shape of ``x``, the strides of an elementwise function of ``x``."""
    if x.is_contiguous():
        return result
    order = _outermost_first(torch.empty_like(x, device="meta").stride())
    back = sorted(range(len(order)), key=lambda d: order[d])
    return result.permute(order).contiguous().permute(back)


def _plain(dims: int) -> tuple[int, ...]:
    return tuple(range(dims))


def coefficient(value: Tensor, step_shape: Sequence[int], order: Sequence[int], dtype: torch.dtype) -> Coefficient:
    """Make a kernel coefficient of a tensor that broadcasts to one time step.

    Dimensions of size 1 outside the varying block become period and ``inner``; those inside it are expanded,
    which costs at most one time step's memory.
    """
    block, inner = _block(value, step_shape, order)
    values = _permuted(value, step_shape, order)
    values = values.expand([step_shape[order[i]] if i in block else 1 for i in range(len(order))])
    return Coefficient(values.reshape(-1).to(dtype).contiguous(), inner)


def coefficient_gradient(grad: Tensor, value: Tensor, step_shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Return the gradient [count] of a :func:`coefficient` in the shape and dtype of ``value``."""
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
    """Return the positions in ``order`` from first to last along which ``value`` varies, and the size after them."""
    varying = [i for i, size in enumerate(_permuted(value, step_shape, order).shape) if size != 1]
    if not varying:
        return range(0), math.prod(step_shape)
    block = range(varying[0], varying[-1] + 1)
    return block, math.prod(step_shape[order[i]] for i in range(block.stop, len(order)))
