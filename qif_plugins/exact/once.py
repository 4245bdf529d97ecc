"""Refuse second derivatives, which the layers' hand-written gradients do not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    """Identity of the first argument, whose derivative by the others is an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "qif_plugins.exact has no second derivatives: differentiate once; for the product of the Hessian with a "
            "vector, take the difference of two gradients at parameters moved along it"
        )


def refuse_twice(grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Make gradients raise NotImplementedError where they are differentiated again.

    PyTorch's ``once_differentiable`` does so only if the incoming gradients are differentiable; otherwise second
    derivatives would lack what the layer contributes, without an error.

    Args:
        grads: Result of a backward pass.
        sources: All tensors that it depends on, the incoming gradients included.

    Returns:
        ``grads``, connected to those ``sources`` that are differentiable if the caller asked for ``create_graph``.
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    tracked = [x for x in sources if x is not None and x.requires_grad]
    return tuple(_Refuse.apply(grad, *tracked) if grad is not None and tracked else grad for grad in grads)
