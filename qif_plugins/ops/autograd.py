"""How the operators of :mod:`.library` are differentiated.

There are two ways to tell PyTorch. The public one, ``torch.library.register_autograd``, flattens the arguments of every
call into trees, several times what a small input costs otherwise; it serves where this version of PyTorch lacks
what the other one is made of. That one is what ``register_autograd`` itself comes down to, without the trees.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

try:
    # The single-level kind is what torch.func's transforms leave to the Autograd key, one of their levels at a time.
    from torch._functorch.utils import enable_single_level_autograd_function as single_level
    from torch.autograd.function import _SingleLevelFunction

    HAS_SHORT_WAY = all(
        hasattr(_C, name)
        for name in ("_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_are_functorch_transforms_active")
    ) and hasattr(forward_ad, "_current_level")
except ImportError:
    HAS_SHORT_WAY = False

__all__ = ["HAS_SHORT_WAY", "make_differentiable"]

INPUTS = 21
"""Of ``qif::multi_step``."""


def make_differentiable(library: torch.library.Library) -> None:
    """Register the derivatives of both operators of ``library``, where they are defined."""
    first, second = torch.ops.qif.multi_step.default, torch.ops.qif.multi_step_backward.default

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x_seq, v, *tensors = inputs[:11]
        needs_v, *needs = ctx.needs_input_grad[1:8]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[2], v if needs_v or any(needs) else None, x_seq if needs[5] else None, *tensors)
        ctx.needs_v, ctx.needs = needs_v, needs
        ctx.numbers, ctx.x_dtype = inputs[11], x_seq.dtype
        ctx.kind, ctx.backend = inputs[13:18], inputs[20]

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if all(gradient is None for gradient in gradients):
            return (None,) * INPUTS
        h_seq, v, x_seq, *tensors = ctx.saved_tensors
        results = iter(
            second(
                *gradients, h_seq, v, x_seq, *tensors, ctx.numbers, ctx.x_dtype, *ctx.kind, ctx.needs_v, ctx.needs,
                ctx.backend,
            )
        )  # fmt: skip
        to_x = next(results)
        to_others = [next(results) if needed else None for needed in (ctx.needs_v, *ctx.needs)]
        return (to_x, *to_others, *[None] * (INPUTS - 8))

    if not HAS_SHORT_WAY:
        torch.library.register_autograd("qif::multi_step", differentiate, setup_context=save, lib=library)
        torch.library.register_autograd("qif::multi_step_backward", _refuse, lib=library)
        return

    class MultiStep(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *inputs, keyset = inputs  # type: ignore[assignment]
            output = _below_autograd(first, keyset, inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
            return (*differentiate(ctx, *gradients), None)

    class MultiStepBackward(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            *inputs, keyset = inputs  # type: ignore[assignment]
            return tuple(_below_autograd(second, keyset, inputs))

        backward = staticmethod(_refuse)

    library.impl("multi_step", _differentiable(first, MultiStep, tuple), "Autograd", with_keyset=True)
    library.impl("multi_step_backward", _differentiable(second, MultiStepBackward, list), "Autograd", with_keyset=True)


def _refuse(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "the surrogate gradient of a QIF neuron is not differentiable a second time: w(h) stands in for a "
        "derivative and has none of its own that means anything. Use first derivatives (no create_graph=True), or "
        "pass a differentiable surrogate of your own, which PyTorch's autograd takes."
    )


def _below_autograd(op: Any, keyset: Any, inputs: tuple[Any, ...]) -> Any:
    with _C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _C._after_autograd_keyset, *inputs)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _differentiable(op: Any, function: Any, kind: type) -> Callable[..., Any]:
    def call(keyset: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(value) for value in inputs):
            raise NotImplementedError(
                "the surrogate gradient of a QIF neuron has no forward mode; use reverse mode (backward, "
                "torch.func.grad or vjp), or pass a surrogate of your own, which PyTorch's autograd takes."
            )
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            with single_level() if _C._are_functorch_transforms_active() else nullcontext():
                return kind(function.apply(*inputs, keyset))
        return _below_autograd(op, keyset, inputs)

    return call
