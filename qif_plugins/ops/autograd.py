"""Register the derivatives of the operators of :mod:`.library`.

PyTorch's public function for this, ``torch.library.register_autograd``, refuses the transforms of ``torch.func`` and
takes several times as long for a small input. An autograd function of a kind that serves one level of the transforms at
a time accepts them. That kind is not public. In a version of PyTorch that lacks it, the public function is used: the
results are the same, and the transforms are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from . import composed

try:
    from torch._functorch.utils import enable_single_level_autograd_function as single_level
    from torch.autograd.function import _SingleLevelFunction

    TAKES_TRANSFORMS = all(
        hasattr(_C, name) for name in ("_AutoDispatchBelowAutograd", "_are_functorch_transforms_active")
    )
    TAKES_TRANSFORMS &= all(hasattr(forward_ad, name) for name in ("_current_level", "_set_fwd_grad_enabled"))
except ImportError:
    TAKES_TRANSFORMS = False

INPUTS = 22
"""Number of inputs of ``qif::multi_step``."""
SAVE_H = 20
"""Index of the input that says whether h is kept."""
TENSORS = 15
"""Number of inputs of ``qif::multi_step_backward`` that are tensors; they come first."""


def make_differentiable(library: torch.library.Library) -> None:
    """Register the derivatives of both operators of ``library``."""
    if not TAKES_TRANSFORMS:
        torch.library.register_autograd("qif::multi_step", _differentiate, setup_context=_save, lib=library)
        torch.library.register_autograd(
            "qif::multi_step_backward", _differentiate_again, setup_context=_save_again, lib=library
        )
        return

    first, second = torch.ops.qif.multi_step.default, torch.ops.qif.multi_step_backward.default

    class MultiStep(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = _one_level_down(first, inputs)
            _save(ctx, inputs, output)
            return output

        backward = staticmethod(_differentiate)

    class MultiStepBackward(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = tuple(_one_level_down(second, inputs))
            _save_again(ctx, inputs, output)
            return output

        backward = staticmethod(_differentiate_again)

    library.impl("multi_step", _differentiable(first, MultiStep, tuple), "Autograd")
    library.impl("multi_step_backward", _differentiable(second, MultiStepBackward, list), "Autograd")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_seq, v, *tensors = inputs[:11]
    needs_v, *needs = ctx.needs_input_grad[1:8]
    ctx.set_materialize_grads(False)
    ctx.has_h = inputs[SAVE_H]
    if ctx.has_h:
        x_seq, v = x_seq if needs[5] else None, v if needs_v or any(needs) else None
    ctx.save_for_backward(output[2] if ctx.has_h else None, v, x_seq, *tensors)
    ctx.needs_v, ctx.needs, ctx.x_dtype, ctx.others = needs_v, needs, inputs[0].dtype, inputs[11:]


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    if all(gradient is None for gradient in gradients):
        return (None,) * INPUTS
    h_seq, v, x_seq, *tensors = ctx.saved_tensors
    numbers, _, *kind, _, _, backend = ctx.others
    if not ctx.has_h:
        # The call was captured where no gradient could be asked for, but is being trained.
        others = list(ctx.others)
        others[SAVE_H - INPUTS] = True
        h_seq = torch.ops.qif.multi_step(x_seq, v, *tensors, *others)[2]
        x_seq = x_seq if ctx.needs[5] else None
    results = iter(
        torch.ops.qif.multi_step_backward(
            *gradients, h_seq, v, x_seq, *tensors, numbers, ctx.x_dtype, *kind, ctx.needs_v, ctx.needs, backend
        )
    )
    to_x = next(results)
    to_others = [next(results) if needed else None for needed in (ctx.needs_v, *ctx.needs)]
    return (to_x, *to_others, *[None] * (INPUTS - 8))


def _save_again(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.others = inputs[TENSORS:]


def _differentiate_again(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """Differentiate the backward pass, by means of :mod:`.composed`."""
    if len(gradients) == 1 and isinstance(gradients[0], list):  # as register_autograd hands on those of a list
        gradients = tuple(gradients[0])
    tensors = list(ctx.saved_tensors)
    wanted = [index for index in range(TENSORS) if ctx.needs_input_grad[index]]

    def compose(*chosen: Tensor) -> tuple[Tensor, ...]:
        for index, tensor in zip(wanted, chosen, strict=True):
            tensors[index] = tensor
        return tuple(composed.multi_step_backward(*tensors, *ctx.others))

    # Not autograd.grad: saved tensors may belong to a transform that has ended, and then carry no graph.
    outputs, differentiate, *_ = torch.func.vjp(compose, *(tensors[index] for index in wanted))
    found = differentiate(
        tuple(
            torch.zeros_like(output) if gradient is None else gradient
            for output, gradient in zip(outputs, gradients, strict=True)
        )
    )
    results = dict(zip(wanted, found, strict=True))
    return tuple(results.get(index) for index in range(TENSORS + len(ctx.others)))


def _below_autograd(op: Any, inputs: tuple[Any, ...]) -> Any:
    with _C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _one_level_down(op: Any, inputs: tuple[Any, ...]) -> Any:
    """Call ``op`` below autograd inside a forward pass, where PyTorch has turned off what the next transform needs."""
    if not _C._are_functorch_transforms_active():
        return _below_autograd(op, inputs)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(op, inputs)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _differentiable(op: Any, function: Any, kind: type) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(value) for value in inputs):
            raise NotImplementedError(
                "the surrogate gradient of a QIF neuron has no forward mode (jvp, jacfwd, hessian); use reverse mode: "
                "backward, torch.func.grad, vjp or jacrev, and torch.func.jacrev(torch.func.jacrev(f)) for a Hessian."
            )
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            with single_level() if _C._are_functorch_transforms_active() else nullcontext():
                return kind(function.apply(*inputs))
        return _below_autograd(op, inputs)

    return call
