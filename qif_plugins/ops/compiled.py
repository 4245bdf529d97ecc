"""The operator in graphs of ``torch.compile``: on CPUs taken apart into PyTorch's own operators.

Inductor fuses those with each other and with what surrounds them, which is faster than calling a kernel between two
fused parts; ``docs/benchmarks.md`` has the measurement. The results have the same bits. The operator of
:mod:`.library` stays in the graph on other devices, with a backend that was chosen by name, for many or a varying
number of time steps, which the graph would repeat one by one, and for numbers that are tensors.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from typing import Any

import torch
from torch import _C, Tensor

from . import torch_backend
from .autograd import TAKES_TRANSFORMS
from .contract import Coefficient, Coefficients, Kind, Shape
from .layout import in_layout_of
from .library import SIGNATURE, library, multi_step, multi_step_backward

MOST_STEPS = 32
"""Number of time steps up to which a call is taken apart: the time to compile grows with it."""


def _revision() -> str:
    """Tell this state of the equations from others: PyTorch keeps graphs on disk, by operator and arguments."""
    digest = 0
    for name in (__name__, torch_backend.__name__):
        spec: Any = sys.modules[name].__spec__
        with contextlib.suppress(OSError, AttributeError):  # a frozen program may have no such file
            digest = zlib.crc32(spec.loader.get_data(spec.origin), digest)
    return f"{digest:08x}"


REVISION = _revision()


def _multi_step(x_seq: Tensor, v: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``qif::multi_step`` by PyTorch's operators, or by the operator where that is faster or the only way."""
    tensors, (numbers, v_dtype, soft, detach_reset, strict, shape) = others[:9], others[9:15]
    pre_reset, rebound, store_v_seq, save_h, backend, _ = others[15:]
    steps = x_seq.shape[0]
    if (
        not TAKES_TRANSFORMS
        or _C._are_functorch_transforms_active()
        or backend != "auto"
        or x_seq.device.type != "cpu"
        or not isinstance(steps, int)  # a symbol
        or steps > MOST_STEPS
        or any(tensor is not None for tensor in tensors)
    ):
        outputs: tuple[Tensor, Tensor, Tensor] = multi_step(x_seq, v, *others[:-1])
        return outputs
    kind = Kind(soft, detach_reset, strict, Shape(shape), pre_reset, rebound)
    spike_seq, v_out, h_seq = _Composed.apply(x_seq, v, tuple(numbers), v_dtype, kind, store_v_seq)
    return spike_seq, v_out, h_seq if save_h else h_seq.new_empty(0)


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_seq: Tensor, v: Tensor | None, numbers: tuple[float, ...], v_dtype: torch.dtype, kind: Kind,
        store_v_seq: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        steps = len(x_seq)
        results: Any = [[None] * steps for _ in range(3)]
        spikes, membranes, h = results
        c = Coefficients(*map(Coefficient, numbers[:9]))
        torch_backend.forward(x_seq, numbers[9] if v is None else v, c, kind, spikes, None, membranes, h)
        h_seq = in_layout_of(x_seq, torch.stack(h))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h_seq, v if ctx.needs_input_grad[1] else None)
        ctx.others = numbers, x_seq.dtype, kind
        # Not spike.to(dtype): Inductor would write the bool tensors to memory first, at some 30 ns an entry.
        zero, one = (torch.full((), value, dtype=x_seq.dtype, device=x_seq.device) for value in (0, 1))
        spike_seq = in_layout_of(x_seq, torch.stack([torch.where(spike, one, zero) for spike in spikes]))
        if store_v_seq:
            v_out = in_layout_of(x_seq, torch.stack(membranes))
        else:
            v_out = in_layout_of(x_seq[0], membranes[-1])
        return spike_seq, v_out.to(v_dtype), h_seq

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        h_seq, v = ctx.saved_tensors
        numbers, x_dtype, kind = ctx.others
        if all(gradient is None for gradient in gradients):
            return (None,) * 6
        if torch.is_grad_enabled():  # to be differentiated again
            tensors, others = (None,) * 9, (list(numbers), x_dtype, *kind, v is not None, [False] * 6, "auto")
            to_x, *to_v = multi_step_backward(*gradients, h_seq, v, None, *tensors, *others)
            return to_x, to_v[0] if to_v else None, None, None, None, None
        grads: Any = [None] * len(h_seq)
        c = Coefficients(*map(Coefficient, numbers[:9]))
        grad_v0 = None if v is None else torch.empty_like(v)
        grad_spike, grad_v, grad_h = gradients
        start = numbers[9] if v is None else v
        torch_backend.backward(grad_spike, grad_v, grad_h, h_seq, start, None, c, kind, grads, grad_v0, (False,) * 6)
        grad_x = in_layout_of(h_seq, torch.stack([grad.to(x_dtype) for grad in grads]))
        return grad_x, grad_v0, None, None, None, None


library.define(f"compiled_multi_step{SIGNATURE.replace('str backend', 'str backend, str revision')}")
library.impl("compiled_multi_step", _multi_step, "CompositeImplicitAutograd")


def compiled_multi_step(*inputs: Any) -> Any:
    """Call ``qif::multi_step`` in a graph of ``torch.compile``; the inputs are the operator's."""
    return torch.ops.qif.compiled_multi_step.default(*inputs, REVISION)
