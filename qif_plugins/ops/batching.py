"""Rules by which ``torch.vmap`` batches the operators of :mod:`.library`.

A batch dimension becomes one more dimension of neurons, in front of the others. Tensors without a batch dimension are
expanded. The neuron's numbers broadcast as they are, except in the backward pass, where each sample of the batch has a
gradient of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import composed


def register(library: torch.library.Library) -> None:
    """Register the rules of both operators of ``library``."""
    add: Callable[..., None] | None = getattr(torch.library, "register_vmap", None)
    # autograd.grad(is_grads_batched=True) has a vmap of its own, whose tensors no public function takes apart. PyTorch
    # 2.4 has none for either; there it batches the forward pass by itself, one sample after another.
    for key in ("Batched",) if add is not None else ("Batched", "FuncTorchBatched"):
        with contextlib.suppress(RuntimeError):  # a version that has no such key
            library.impl("multi_step_backward", composed.multi_step_backward, key)
    if add is None:
        return
    add("qif::multi_step", _multi_step, lib=library)
    add("qif::multi_step_backward", _multi_step_backward, lib=library)


def _multi_step(info: Any, in_dims: Sequence[Any], x_seq: Tensor, *rest: Any) -> tuple[Any, Any]:
    size, dims = info.batch_size, in_dims
    v, numbers, others = rest[0], rest[1:10], rest[10:]
    steps = _logical_dim(x_seq, dims[0]) - 1
    spike_seq, v_out, h_seq = torch.ops.qif.multi_step(
        _batched(x_seq, dims[0], size, 1),
        _batched(v, dims[1], size, 0),
        *(_number(value, dim, size, steps) for value, dim in zip(numbers, dims[2:11], strict=True)),
        *others,
    )
    in_time = 1 if v_out.dim() == spike_seq.dim() else 0
    return (spike_seq, v_out, h_seq), (1, in_time, 1 if h_seq.dim() == spike_seq.dim() else None)


def _multi_step_backward(info: Any, in_dims: Sequence[Any], *operands: Any) -> tuple[Any, Any]:
    size, dims = info.batch_size, in_dims
    grad_spike, grad_v, grad_h, h_seq, v, x_seq, *numbers = operands[:15]
    others = operands[15:]
    needs_v, needs = others[-3], others[-2]
    steps = _logical_dim(h_seq, dims[3]) - 1
    v_in_time = grad_v is not None and _logical_dim(grad_v, dims[1]) == steps + 1
    batched = [
        _number(value, dim, size, steps, each=index < 6 and needs[index])
        for index, (value, dim) in enumerate(zip(numbers, dims[6:15], strict=True))
    ]
    results = torch.ops.qif.multi_step_backward(
        _batched(grad_spike, dims[0], size, 1),
        _batched(grad_v, dims[1], size, 1 if v_in_time else 0),
        _batched(grad_h, dims[2], size, 1),
        _batched(h_seq, dims[3], size, 1),
        _batched(v, dims[4], size, 0),
        _batched(x_seq, dims[5], size, 1),
        *batched,
        *others,
    )
    out_dims = [1, *([0] if needs_v and v is not None else [])]
    # The numbers' gradients, without the dimensions of size 1 that made their batch dimension broadcast.
    for value, dim, need in zip(numbers[:6], dims[6:12], needs, strict=True):
        if need and value is not None:
            shape = list(value.shape)
            if dim is not None:
                del shape[dim]
            results[len(out_dims)] = results[len(out_dims)].reshape(size, *shape)
            out_dims.append(0)
    return results, out_dims


def _logical_dim(value: Tensor, dim: int | None) -> int:
    return value.dim() - (dim is not None)


def _batched(value: Tensor | None, dim: int | None, size: int, at: int) -> Tensor | None:
    """Move the batch dimension of ``value`` to ``at``, and expand ``value`` if it has none."""
    if value is None:
        return None
    if dim is None:
        return value.unsqueeze(at).expand(*value.shape[:at], size, *value.shape[at:])
    return value.movedim(dim, at)


def _number(value: Tensor | None, dim: int | None, size: int, dims: int, each: bool = False) -> Tensor | None:
    """Reshape a number so that it broadcasts to a batched time step, whose samples have ``dims`` dimensions.

    Args:
        value: The number.
        dim: Its batch dimension.
        size: Size of the batch.
        dims: Number of dimensions of a time step of one sample.
        each: Whether to give every sample a copy of a value that they share.
    """
    if value is None or (dim is None and not each):
        return value
    batched = _batched(value, dim, size, 0)
    assert batched is not None
    shape = list(batched.shape[1:])
    # A single element of more dimensions than a time step broadcasts, too.
    shape = [1] * (dims - len(shape)) + shape if len(shape) <= dims else [1] * dims
    return batched.reshape(size, *shape)
