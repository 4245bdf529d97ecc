"""Register the operators ``qif::multi_step`` and ``qif::multi_step_backward`` with torch.library.

One forward pass and one backward pass whatever T. Saved for backward: h, one float32 tensor of the
input's size (and references to tensors the caller already holds: the coefficients, the initial
membrane, and the input where the gain is learned).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import batching
from .autograd import make_differentiable
from .backends import choose_backend, implementation
from .contract import Coefficient, Coefficients, Kind, Shape
from .layout import coefficient, coefficient_gradient, empty_like, flatten, give_back, make_room, memory_order
from .shortcuts.memory import on_huge_pages

_NUMBERS = "Tensor? a, Tensor? u1, Tensor? u2, Tensor? v_threshold, Tensor? v_reset, Tensor? input_gain"
_SURROGATE = "Tensor? s0, Tensor? s1, Tensor? s2"
_KIND = "bool soft, bool detach_reset, bool strict, int shape, bool pre_reset, bool rebound"

# Defined through Library: torch.library.custom_op takes several times as long a call, which is most of what a
# small input costs.
library = torch.library.Library("qif", "DEF")
# Inductor takes convolutions to channels-last on a GPU; without the second tag it would copy their outputs back for us.
_tags = [getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "flexible_layout") if hasattr(torch.Tag, name)]
SIGNATURE = (
    f"(Tensor x_seq, Tensor? v, {_NUMBERS}, {_SURROGATE}, float[] numbers, ScalarType v_dtype, {_KIND}, "
    "bool store_v_seq, bool save_h, str backend) -> (Tensor, Tensor, Tensor)"
)
"""Arguments and results of ``qif::multi_step``."""
library.define(f"multi_step{SIGNATURE}", tags=_tags)
library.define(
    "multi_step_backward(Tensor? grad_spike, Tensor? grad_v, Tensor? grad_h, Tensor h_seq, Tensor? v, Tensor? x_seq, "
    f"{_NUMBERS}, {_SURROGATE}, float[] numbers, ScalarType x_dtype, {_KIND}, bool needs_v, bool[] needs, str backend)"
    " -> Tensor[]",
    tags=_tags,
)
multi_step = torch.ops.qif.multi_step.default
multi_step_backward = torch.ops.qif.multi_step_backward.default


def _hidden_from_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hide ``function`` from TorchDynamo, which would trace into it, without importing TorchDynamo."""
    disabled: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args)

    return call


@_hidden_from_dynamo
def _forward(
    x_seq: Tensor, v: Tensor | None, a: Tensor | None, u1: Tensor | None, u2: Tensor | None, v_threshold: Tensor | None,
    v_reset: Tensor | None, input_gain: Tensor | None, s0: Tensor | None, s1: Tensor | None, s2: Tensor | None,
    numbers: Sequence[float], v_dtype: torch.dtype, soft: bool, detach_reset: bool, strict: bool, shape: int,
    pre_reset: bool, rebound: bool, store_v_seq: bool, save_h: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``(spike_seq, v_last or v_seq, h_seq)``; h_seq is float32 (float64 with float64), empty unless ``save_h``.

    ``numbers`` holds the nine coefficients and the initial membrane, used where the tensor is ``None``.
    """
    spike_seq, v_out, h_seq = map(on_huge_pages, _allocate(x_seq, v_dtype, store_v_seq, save_h))
    if x_seq.numel() == 0:
        return spike_seq, v_out, h_seq
    order = memory_order(spike_seq)
    spike, v_flat, h = make_room(spike_seq, order), make_room(v_out, order, store_v_seq), None
    if save_h:
        h = make_room(h_seq, order)
    tensors = (a, u1, u2, v_threshold, v_reset, input_gain, s0, s1, s2)
    _implementation(backend, x_seq).forward(
        flatten(x_seq, order),
        numbers[9] if v is None else flatten(v, order, time=False),
        _coefficients(tensors, numbers, x_seq, order),
        Kind(soft, detach_reset, strict, Shape(shape), pre_reset, rebound),
        spike,
        None if store_v_seq else v_flat,
        v_flat if store_v_seq else None,
        h,
    )
    give_back(spike, spike_seq, order)
    give_back(v_flat, v_out, order, store_v_seq)
    if h is not None:
        give_back(h, h_seq, order)
    return spike_seq, v_out, h_seq


def _forward_fake(
    x_seq: Tensor, v: Any, a: Any, u1: Any, u2: Any, v_threshold: Any, v_reset: Any, input_gain: Any, s0: Any, s1: Any,
    s2: Any, numbers: Any, v_dtype: torch.dtype, soft: bool, detach_reset: bool, strict: bool, shape: int,
    pre_reset: bool, rebound: bool, store_v_seq: bool, save_h: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _implementation(backend, x_seq)  # a backend that cannot run is refused where the call is traced
    return _allocate(x_seq, v_dtype, store_v_seq, save_h)


@_hidden_from_dynamo
def _backward(
    grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None, h_seq: Tensor, v: Tensor | None,
    x_seq: Tensor | None, a: Tensor | None, u1: Tensor | None, u2: Tensor | None, v_threshold: Tensor | None,
    v_reset: Tensor | None, input_gain: Tensor | None, s0: Tensor | None, s1: Tensor | None, s2: Tensor | None,
    numbers: Sequence[float], x_dtype: torch.dtype, soft: bool, detach_reset: bool, strict: bool, shape: int,
    pre_reset: bool, rebound: bool, needs_v: bool, needs: Sequence[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of x_seq, of v if ``needs_v``, and of each number in ``needs``, in that order."""
    _check_h(h_seq)
    grad_x = on_huge_pages(empty_like(h_seq, x_dtype))
    learnable = (a, u1, u2, v_threshold, v_reset, input_gain)
    grad_v0 = empty_like(v, v.dtype) if needs_v and v is not None else None
    if h_seq.numel() == 0:
        sums: list[Tensor | None] = [torch.zeros_like(t) if t is not None else None for t in learnable]
    else:
        order = memory_order(h_seq)
        to_x, to_v = make_room(grad_x, order), None if grad_v0 is None else make_room(grad_v0, order, time=False)
        c = _coefficients((*learnable, s0, s1, s2), numbers, h_seq, order)
        flat = _implementation(backend, h_seq).backward(
            None if grad_spike is None else flatten(grad_spike, order),
            None if grad_v is None else flatten(grad_v, order, time=grad_v.dim() == h_seq.dim()),
            None if grad_h is None else flatten(grad_h, order),
            flatten(h_seq, order),
            numbers[9] if v is None else flatten(v, order, time=False),
            None if x_seq is None else flatten(x_seq, order),
            c,
            Kind(soft, detach_reset, strict, Shape(shape), pre_reset, rebound),
            to_x,
            to_v,
            tuple(needs),
        )
        give_back(to_x, grad_x, order)
        if to_v is not None and grad_v0 is not None:
            give_back(to_v, grad_v0, order, time=False)
        sums = [
            None if grad is None or value is None else coefficient_gradient(grad, value, h_seq.shape[1:], order)
            for grad, value in zip(flat, learnable, strict=True)
        ]
    chosen = [grad for grad, needed in zip(sums, needs, strict=True) if needed and grad is not None]
    return [grad_x, *([grad_v0] if grad_v0 is not None else []), *chosen]


def _backward_fake(
    grad_spike: Any, grad_v: Any, grad_h: Any, h_seq: Tensor, v: Any, x_seq: Any, a: Any, u1: Any, u2: Any,
    v_threshold: Any, v_reset: Any, input_gain: Any, s0: Any, s1: Any, s2: Any, numbers: Any, x_dtype: torch.dtype,
    soft: bool, detach_reset: bool, strict: bool, shape: int, pre_reset: bool, rebound: bool, needs_v: bool, needs: Any,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    _check_h(h_seq)
    grads = [empty_like(h_seq, x_dtype)]
    if needs_v and v is not None:
        grads.append(empty_like(v, v.dtype))
    learnable = (a, u1, u2, v_threshold, v_reset, input_gain)
    return grads + [
        torch.empty_like(value, memory_format=torch.contiguous_format)
        for value, needed in zip(learnable, needs, strict=True)
        if needed and value is not None
    ]


def _implementation(backend: str, tensor: Tensor) -> Any:
    """Choose the implementation on the machine where the call runs, perhaps not the one that traced it."""
    return implementation(choose_backend(backend, tensor.device, tensor.dtype))


def _check_h(h_seq: Tensor) -> None:
    if h_seq.shape == (0,):
        raise RuntimeError(
            "qif::multi_step_backward needs the h_seq of a qif::multi_step with save_h=True; this one is empty"
        )


def _allocate(x_seq: Tensor, v_dtype: torch.dtype, store_v_seq: bool, save_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results with the strides of an elementwise function of the input, or of one time step of it."""
    compute = torch.float64 if x_seq.dtype == torch.float64 else torch.float32
    return (
        empty_like(x_seq, x_seq.dtype),
        empty_like(x_seq if store_v_seq else x_seq[0], v_dtype),
        empty_like(x_seq, compute) if save_h else torch.empty(0, dtype=compute, device=x_seq.device),
    )


def _coefficients(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], x_seq: Tensor, order: Sequence[int]
) -> Coefficients:
    if all(tensor is None for tensor in tensors):
        return _uniform(*numbers[:9])
    compute = torch.float64 if x_seq.dtype == torch.float64 else torch.float32
    return Coefficients(
        *(
            Coefficient(number) if tensor is None else coefficient(tensor, x_seq.shape[1:], order, compute)
            for tensor, number in zip(tensors, numbers[:9], strict=True)
        )
    )


@lru_cache(maxsize=256)
def _uniform(*numbers: float) -> Coefficients:
    return Coefficients(*map(Coefficient, numbers))


for _name, _kernel, _fake in (
    ("multi_step", _forward, _forward_fake),
    ("multi_step_backward", _backward, _backward_fake),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qif::{_name}", _fake, lib=library)
make_differentiable(library)
batching.register(library)
