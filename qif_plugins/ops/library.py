"""The operators ``qif::multi_step`` and ``qif::multi_step_backward``, registered with torch.library.

One forward pass and one backward pass whatever T. Saved for backward: h, one float32 tensor of the
input's size (besides references to tensors the caller already holds: the coefficients, the initial
membrane, and the input where the gain is learned).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..surrogate import Shape
from .backends import implementation
from .contract import Coefficient, Coefficients, Kind
from .layout import coefficient, coefficient_gradient, empty_like_order, flatten, memory_order

__all__ = ["multi_step"]


@torch.library.custom_op("qif::multi_step", mutates_args=())
def multi_step(
    x_seq: Tensor,
    v: Tensor | None,
    a: Tensor | None,
    u1: Tensor | None,
    u2: Tensor | None,
    v_threshold: Tensor | None,
    v_reset: Tensor | None,
    input_gain: Tensor | None,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    numbers: Sequence[float],
    v_dtype: torch.dtype,
    soft: bool,
    detach_reset: bool,
    strict: bool,
    shape: int,
    pre_reset: bool,
    store_v_seq: bool,
    save_h: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(spike_seq, v_last or v_seq, h_seq)``; h_seq is float32 (float64 with float64), empty unless ``save_h``.

    ``numbers`` holds the nine coefficients and the initial membrane, used where the tensor is ``None``.
    """
    order = memory_order(x_seq)
    spike_seq, v_out, h_seq = _allocate(x_seq, order, v_dtype, store_v_seq, save_h)
    if x_seq.numel() == 0:
        return spike_seq, v_out, h_seq
    tensors = (a, u1, u2, v_threshold, v_reset, input_gain, s0, s1, s2)
    implementation(backend).forward(
        flatten(x_seq, order),
        numbers[9] if v is None else flatten(v, order, time=False),
        _coefficients(tensors, numbers, x_seq, order),
        Kind(soft, detach_reset, strict, Shape(shape), pre_reset),
        flatten(spike_seq, order),
        None if store_v_seq else flatten(v_out, order, time=False),
        flatten(v_out, order) if store_v_seq else None,
        flatten(h_seq, order) if save_h else None,
    )
    return spike_seq, v_out, h_seq


@multi_step.register_fake
def _(
    x_seq: Tensor, v: Any, a: Any, u1: Any, u2: Any, v_threshold: Any, v_reset: Any, input_gain: Any, s0: Any, s1: Any,
    s2: Any, numbers: Any, v_dtype: torch.dtype, soft: bool, detach_reset: bool, strict: bool, shape: int,
    pre_reset: bool, store_v_seq: bool, save_h: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate(x_seq, memory_order(x_seq), v_dtype, store_v_seq, save_h)


@torch.library.custom_op("qif::multi_step_backward", mutates_args=())
def multi_step_backward(
    grad_spike: Tensor | None,
    grad_v: Tensor | None,
    grad_h: Tensor | None,
    h_seq: Tensor,
    v: Tensor | None,
    x_seq: Tensor | None,
    a: Tensor | None,
    u1: Tensor | None,
    u2: Tensor | None,
    v_threshold: Tensor | None,
    v_reset: Tensor | None,
    input_gain: Tensor | None,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    numbers: Sequence[float],
    x_dtype: torch.dtype,
    soft: bool,
    detach_reset: bool,
    strict: bool,
    shape: int,
    pre_reset: bool,
    needs_v: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x_seq, of v if ``needs_v``, and of each number in ``needs``, in that order."""
    order = memory_order(h_seq)
    learnable = (a, u1, u2, v_threshold, v_reset, input_gain)
    grad_x = empty_like_order(h_seq, order, x_dtype)
    grad_v0 = empty_like_order(h_seq[0], order, v.dtype, time=False) if needs_v and v is not None else None
    if h_seq.numel() == 0:
        sums: list[Tensor | None] = [torch.zeros_like(t) if t is not None else None for t in learnable]
    else:
        c = _coefficients((*learnable, s0, s1, s2), numbers, h_seq, order)
        flat = implementation(backend).backward(
            None if grad_spike is None else flatten(grad_spike, order),
            None if grad_v is None else flatten(grad_v, order, time=grad_v.dim() == h_seq.dim()),
            None if grad_h is None else flatten(grad_h, order),
            flatten(h_seq, order),
            numbers[9] if v is None else flatten(v, order, time=False),
            None if x_seq is None else flatten(x_seq, order),
            c,
            Kind(soft, detach_reset, strict, Shape(shape), pre_reset),
            flatten(grad_x, order),
            None if grad_v0 is None else flatten(grad_v0, order, time=False),
            tuple(needs),
        )
        sums = [
            None if grad is None or value is None else coefficient_gradient(grad, value, h_seq.shape[1:], order)
            for grad, value in zip(flat, learnable, strict=True)
        ]
    chosen = [grad for grad, needed in zip(sums, needs, strict=True) if needed and grad is not None]
    return [grad_x, *([grad_v0] if grad_v0 is not None else []), *chosen]


@multi_step_backward.register_fake
def _(
    grad_spike: Any, grad_v: Any, grad_h: Any, h_seq: Tensor, v: Any, x_seq: Any, a: Any, u1: Any, u2: Any,
    v_threshold: Any, v_reset: Any, input_gain: Any, s0: Any, s1: Any, s2: Any, numbers: Any, x_dtype: torch.dtype,
    soft: bool, detach_reset: bool, strict: bool, shape: int, pre_reset: bool, needs_v: bool, needs: Any, backend: str,
) -> list[Tensor]:  # fmt: skip
    order = memory_order(h_seq)
    grads = [empty_like_order(h_seq, order, x_dtype)]
    if needs_v and v is not None:
        grads.append(empty_like_order(h_seq[0], order, v.dtype, time=False))
    learnable = (a, u1, u2, v_threshold, v_reset, input_gain)
    return grads + [
        torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, needed in zip(learnable, needs, strict=True)
        if needed and value is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_seq, v, *tensors = inputs[:11]
    needs = tuple(ctx.needs_input_grad[2:8])
    ctx.set_materialize_grads(False)
    needs_v0 = any(needs) or ctx.needs_input_grad[1]
    ctx.save_for_backward(output[2], v if needs_v0 else None, x_seq if needs[5] else None, *tensors)
    ctx.needs, ctx.needs_v = needs, ctx.needs_input_grad[1]
    ctx.numbers, ctx.x_dtype = inputs[11], x_seq.dtype
    ctx.kind, ctx.backend = inputs[13:18], inputs[20]


def _backward(ctx: Any, grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None) -> tuple[Any, ...]:
    h_seq, v, x_seq, *tensors = ctx.saved_tensors
    grads = iter(
        multi_step_backward(
            grad_spike, grad_v, grad_h, h_seq, v, x_seq, *tensors, ctx.numbers, ctx.x_dtype, *ctx.kind, ctx.needs_v,
            ctx.needs, ctx.backend,
        )
    )  # fmt: skip
    to_x = next(grads)
    to_v = next(grads) if ctx.needs_v else None
    to_numbers = [next(grads) if needed else None for needed in ctx.needs]
    return (to_x, to_v, *to_numbers, *[None] * 13)


multi_step.register_autograd(_backward, setup_context=_setup_context)


def _allocate(
    x_seq: Tensor, order: Sequence[int], v_dtype: torch.dtype, store_v_seq: bool, save_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.float64 if x_seq.dtype == torch.float64 else torch.float32
    return (
        empty_like_order(x_seq, order, x_seq.dtype),
        empty_like_order(x_seq, order, v_dtype)
        if store_v_seq
        else empty_like_order(x_seq[0], order, v_dtype, time=False),
        empty_like_order(x_seq, order, compute) if save_h else x_seq.new_empty(0, dtype=compute),
    )


def _coefficients(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], x_seq: Tensor, order: Sequence[int]
) -> Coefficients:
    compute = torch.float64 if x_seq.dtype == torch.float64 else torch.float32
    return Coefficients(
        *(
            Coefficient(number) if tensor is None else coefficient(tensor, x_seq.shape[1:], order, compute)
            for tensor, number in zip(tensors, numbers[:9], strict=True)
        )
    )
