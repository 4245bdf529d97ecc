"""Call the kernels without PyTorch's dispatcher, for a plain call on a CPU.

On a small layer the operator of :mod:`..library` spends its time in the dispatcher, through which each of its passes
enters Python twice, with 23 arguments. A plain call, which nothing but autograd observes, calls the same kernels
directly, with the same results. All other calls use the operator: under tracing, modes, transforms and the profiler,
with tensors of other kinds and layouts, with numbers that are tensors, and on other backends.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad, profiler

from .. import numba_backend
from ..contract import Coefficient, Coefficients, Kind, Shape
from ..library import multi_step_backward
from . import ENABLED
from .memory import on_huge_pages

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NONE_NEEDED = (False,) * 6
_TYPES = (Tensor, nn.Parameter)


def _bits(*names: str) -> int:
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return int(keys.raw_repr())


# None of this is public. In a version that lacks a name no call counts as plain, and the operator serves them all.
try:
    _AUTOGRAD = _bits("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
    _KEYS = frozenset((_AUTOGRAD, _bits("CPU", "AutocastCPU")))
    """Dispatch keys of an ordinary tensor on the CPU and of one made in inference mode; any other kind has more."""
    _STATES = frozenset((_bits("BackendSelect", "ADInplaceOrView"), _bits("BackendSelect")))
    """Dispatch state of a thread without modes, transforms, tracers and compilers."""
    _state: Any = _C._dispatch_tls_local_include_set
    _keys: Any = _C._dispatch_keys
    _function_modes: Any = _C._len_torch_function_stack
    _known = isinstance(forward_ad._current_level, int)
except AttributeError:
    _known = False


class Job(NamedTuple):
    """Arguments of a call that are not tensors.

    Attributes:
        numbers: The nine coefficients.
        table: The same in the form that the kernels take.
        kind: The variant of the neuron.
        store_v_seq: Whether the membrane of every step is returned.
        return_h: Whether h is returned although no gradient needs it.
        single: Whether the tensors are one time step, without a dimension for time.
    """

    numbers: tuple[float, ...]
    table: numba_backend.Table
    kind: Kind
    store_v_seq: bool
    return_h: bool
    single: bool


@lru_cache(maxsize=1024)
def job(
    numbers: tuple[float, ...], soft: bool, detach_reset: bool, strict: bool, shape: int, pre_reset: bool,
    rebound: bool, store_v_seq: bool, return_h: bool, single: bool,
) -> Job:  # fmt: skip
    """Prepare the part of a call that does not depend on its tensors; ``numbers`` are the nine coefficients."""
    table = numba_backend.tabulate(Coefficients(*map(Coefficient, numbers)), 1)
    kind = Kind(soft, detach_reset, strict, Shape(shape), pre_reset, rebound)
    return Job(numbers, table, kind, store_v_seq, return_h, single)


def applies(x: Tensor, v: Tensor | float) -> bool:
    """Whether a call on backend ``"numba"`` with this input and initial membrane can go this way."""
    return (
        ENABLED
        and is_plain(x, v)
        and not getattr(profiler, "_is_profiler_enabled", True)
        and x.dtype in _DTYPES
        and x.is_contiguous()
        and x.numel() > 0
        and (not isinstance(v, Tensor) or (v.dtype in _DTYPES and v.is_contiguous()))
    )


def is_plain(*tensors: Any) -> bool:
    """Whether all ``tensors`` (other arguments are skipped) are ordinary CPU tensors and nothing watches operators."""
    if not _known or torch.compiler.is_compiling():
        return False
    if _state().raw_repr() not in _STATES or _function_modes() or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:  # a loop, which takes half the time of all()
        kind = type(tensor)
        if kind in _TYPES:
            if _keys(tensor).raw_repr() not in _KEYS:
                return False
        elif isinstance(tensor, Tensor):
            return False
    return True


def multi_step(
    x: Tensor, v: Tensor | float, v_dtype: torch.dtype, job: Job, twin: Tensor | None = None
) -> tuple[Tensor, Tensor, Any]:
    """Compute ``qif::multi_step``: ``(spike_seq, v_last or v_seq, h_seq)``, with ``None`` for an h_seq nobody needs.

    ``twin`` has the values of ``v``, and is saved for the backward pass in its place.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (isinstance(v, Tensor) and v.requires_grad)):
        # In a tuple, so that autograd does not count it among the inputs.
        outputs: tuple[Tensor, Tensor, Any] = _MultiStep.apply(x, v, v_dtype, job, None if twin is None else (twin,))
        return outputs
    return _forward(x, v, v_dtype, job, job.return_h)


def _forward(
    x: Tensor, v: Tensor | float, v_dtype: torch.dtype, job: Job, with_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    steps = 1 if job.single else x.shape[0]
    spike = on_huge_pages(torch.empty_like(x))
    h = on_huge_pages(torch.empty_like(x, dtype=torch.float32)) if with_h else None
    v_out = on_huge_pages(torch.empty_like(x if job.single or job.store_v_seq else x[0], dtype=v_dtype))
    v_last, v_seq = (None, v_out) if job.store_v_seq else (v_out, None)
    numba_backend.forward(x, v, job.table, job.kind, spike, v_last, v_seq, h, steps)
    return spike, v_out, h


class _MultiStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Any, v_dtype: torch.dtype, job: Job, twin: tuple[Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        spike, v_out, h = _forward(x, v, v_dtype, job, True)
        assert h is not None
        ctx.set_materialize_grads(False)
        needed = ctx.needs_input_grad[1]
        ctx.save_for_backward(h, None if not needed else v if twin is None else twin[0])
        ctx.original = None if not needed or twin is None else (weakref.ref(v), v._version)
        ctx.start = 0.0 if isinstance(v, Tensor) else v
        ctx.job, ctx.x_dtype = job, x.dtype
        return spike, v_out, h  # also where nobody asks for h, so that a second derivative finds the way through it

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if all(gradient is None for gradient in gradients):
            return (None,) * 5
        h, v = ctx.saved_tensors
        job: Job = ctx.job
        if torch.is_grad_enabled() or not is_plain(h, *gradients):
            return (*_by_operator(ctx, gradients, h, v), None, None, None)
        grad_spike, grad_v, grad_h = (None if gradient is None else gradient.contiguous() for gradient in gradients)
        grad_x = on_huge_pages(torch.empty_like(h, dtype=ctx.x_dtype))
        grad_v0 = None if v is None else torch.empty_like(v)
        steps = 1 if job.single else h.shape[0]
        numba_backend.backward(
            grad_spike, grad_v, grad_h, h, ctx.start if v is None else v, None, job.table, job.kind, grad_x, grad_v0,
            _NONE_NEEDED, steps,
        )  # fmt: skip
        return grad_x, grad_v0, None, None, None


def _by_operator(ctx: Any, gradients: Any, h: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients by the operator, for a backward pass that is observed or differentiated itself."""
    job: Job = ctx.job
    grad_spike, grad_v, grad_h = gradients
    if ctx.original is not None:  # where v is still there, a second derivative may be asked with respect to it
        v_ref, version = ctx.original
        original = v_ref()
        v = v if original is None or original._version != version else original
    if job.single:
        h = h.unsqueeze(0)
        grad_spike, grad_h = (None if tensor is None else tensor.unsqueeze(0) for tensor in (grad_spike, grad_h))
    grad_x, *to_v = multi_step_backward(
        grad_spike, grad_v, grad_h, h, v, None, *[None] * 9, [*job.numbers, ctx.start], ctx.x_dtype, *job.kind,
        v is not None, _NONE_NEEDED, "numba",
    )  # fmt: skip
    return grad_x.squeeze(0) if job.single else grad_x, to_v[0] if to_v else None
