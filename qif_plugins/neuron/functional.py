"""The discrete QIF neuron as functions: one time step, and a whole sequence in one pass.

::

    f(v) = a (v - u1)(v - u2)
    h[t] = f(v[t-1]) + g x[t];   s[t] = 1 if h[t] >= θ else 0;   v[t] = v_reset if s[t] else h[t]

(arXiv 2510.05168). With w(h) in place of ds/dh and d = 0 if ``detach_reset`` else 1, a sequence is
differentiated with the reset folded into the charge, h[t+1] = (1 - s) f(h) + s f(v_reset) + g x[t+1]::

    dh[t+1]/dh[t] = (1 - s) f'(h) + d (f(v_reset) - f(h)) w(h)
    dv[t]/dh[t]   = (1 - s) + d (v_reset - h) w(h)

A single step sees only the second line, and a chain of single steps through v multiplies it with f'(v[t]). With
``detach_reset=True`` this is the same. Without it, chain calls through the membrane before its reset
(``store_h_seq``, ``pre_reset``) to get the gradients of one long call.
A soft reset, v = h - θ s, or min(h - θ s, θ) without rebound, is always differentiated through v.

A NaN in the input never causes a spike, since h >= θ is false for it. The membrane becomes NaN and stays NaN until
the state is reset, so the fault shows where it entered instead of looking like activity.
"""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..ops.backends import BackendName, choose_backend
from ..ops.compiled import compiled_multi_step
from ..ops.contract import LEARNABLE, Kind
from ..ops.layout import in_layout_of, wider
from ..ops.library import multi_step
from ..ops.shortcuts import eager
from ..ops.unfused import autograd_multi_step, composed_multi_step, name_of
from .names import WINDOWS
from .observe import Observation, observers
from .parameters import QIFParameters
from .surrogate import FusedSurrogate, Surrogate


@overload
def qif_step(
    x: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Surrogate, detach_reset: bool = ...,
    *, backend: BackendName = ..., store_h: Literal[False] = ..., pre_reset: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def qif_step(
    x: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Surrogate, detach_reset: bool = ...,
    *, backend: BackendName = ..., store_h: Literal[True], pre_reset: bool = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def qif_step(
    x: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Surrogate, detach_reset: bool = ...,
    *, backend: BackendName = ..., store_h: bool, pre_reset: bool = ...,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def qif_step(
    x: Tensor,
    v: Tensor | float,
    params: QIFParameters,
    surrogate: Surrogate,
    detach_reset: bool = False,
    *,
    backend: BackendName = "auto",
    store_h: bool = False,
    pre_reset: bool = False,
) -> tuple[Tensor, ...]:
    """Compute one time step.

    Args:
        x: Input current, any shape, floating point.
        v: Membrane after the previous step, of ``x``'s shape, or a float.
        params: The neuron.
        surrogate: As in :func:`qif_multi_step`.
        detach_reset: Whether to detach the spike in the reset, so that no gradient passes through it. Default False.
        backend: As in :func:`qif_multi_step`.
        store_h: Whether to return the pre-reset membrane, too, with gradient. Default False.
        pre_reset: Whether ``v`` is the membrane before its reset, as in :func:`qif_multi_step`. Default False.

    Returns:
        ``(spike, v)``, both of ``x``'s shape: 0 or 1 in ``x``'s dtype, and the membrane after the reset.
        ``store_h`` appends a copy of the membrane before the reset, which may be changed in place.

    Raises:
        TypeError: As in :func:`qif_multi_step`.
        ValueError: As in :func:`qif_multi_step`.
        RuntimeError: As in :func:`qif_multi_step`.
    """
    results = uncopied_step(x, v, params, surrogate, detach_reset, backend, store_h, pre_reset)
    return (*results[:2], *[h.clone() for h in results[2:]])


def uncopied_step(
    x: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Surrogate, detach_reset: bool,
    backend: BackendName, store_h: bool, pre_reset: bool, twin: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute :func:`qif_step`, but return the very membrane before the reset that the backward pass reads.

    That membrane must not be changed. The arguments and the errors are those of :func:`qif_step`. ``twin``, if given,
    is such a membrane with the values of ``v``: the backward pass reads it instead of ``v``, so that the copy in ``v``
    need not stay in memory.
    """
    _check_tensor("x", x)
    call = _check(x, v, params, surrogate, backend, x.shape)
    options = (detach_reset, False, store_h, pre_reset)
    if not observers and _is_plain(x, v, call):
        direct: tuple[Tensor, ...] = _run_directly(x, v, params, surrogate, call, *options, True, twin)
        return direct
    spike_seq, v_next, *h_seq = _run_operator(x.unsqueeze(0), v, params, surrogate, call, *options)
    return (spike_seq.squeeze(0), v_next, *[h.squeeze(0) for h in h_seq])


@overload
def qif_multi_step(
    x_seq: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Surrogate, detach_reset: bool = ...,
    store_v_seq: bool = ..., backend: BackendName = ..., *, store_h_seq: Literal[False] = ..., pre_reset: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def qif_multi_step(
    x_seq: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Surrogate, detach_reset: bool = ...,
    store_v_seq: bool = ..., backend: BackendName = ..., *, store_h_seq: Literal[True], pre_reset: bool = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def qif_multi_step(
    x_seq: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Surrogate, detach_reset: bool = ...,
    store_v_seq: bool = ..., backend: BackendName = ..., *, store_h_seq: bool, pre_reset: bool = ...,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def qif_multi_step(
    x_seq: Tensor,
    v: Tensor | float,
    params: QIFParameters,
    surrogate: Surrogate,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    backend: BackendName = "auto",
    *,
    store_h_seq: bool = False,
    pre_reset: bool = False,
) -> tuple[Tensor, ...]:
    """Compute all time steps of a sequence in one pass forward and one backward.

    Args:
        x_seq: Input current ``[T, ...]``, time first, T >= 1; float16, bfloat16 (both computed in
            float32 and rounded once on output), float32 or float64. A dense layout with time outermost in memory,
            such as channels-last, is not copied. With other layouts, such as a batch-first ``x.transpose(0, 1)`` or a
            slice, each tensor of this size is copied on its way in or out, which takes about as long as the pass.
        v: Membrane before the first step: a tensor of one time step's shape ``[...]``, which may
            carry gradient, or a float.
        params: The neuron.
        surrogate: A :class:`~qif_plugins.neuron.surrogate.Window`, another surrogate of
            :mod:`qif_plugins.neuron.surrogate`, or any callable that takes h - θ and returns the spike. A callable
            runs on the reference, which is slower.
        detach_reset: Whether to detach the spike in the reset, so that no gradient passes through it. Default False.
        store_v_seq: Whether to return the membrane after every step instead of after the last. Default False.
        backend: ``"auto"`` (default) takes the best for the input's device, see :func:`available_backends`.
        store_h_seq: Whether to return the pre-reset membrane of every step, too, with gradient. Default False.
        pre_reset: Whether ``v`` is the membrane before its reset, such as ``h_seq[-1]`` of an earlier call. The reset
            is then applied to it first, and the chained calls have the gradients of one call. Default False.

    Returns:
        ``(spike_seq, v_last)``, or ``(spike_seq, v_seq)`` with ``store_v_seq``; ``store_h_seq`` appends
        ``h_seq``. ``spike_seq`` has ``x_seq``'s shape and dtype; the membranes have the wider dtype of ``x_seq``
        and ``v``. All of them, and with a fused surrogate the gradient of ``x_seq``, have the strides that PyTorch
        gives an elementwise function of ``x_seq`` (the last membrane, of one time step of it).

    Raises:
        TypeError: ``x_seq`` or ``v`` is not floating point, or ``params`` or ``surrogate`` has the wrong type.
        ValueError: T is 0, a shape does not fit, the backend is unknown, or a float32 backend gets float64.
        RuntimeError: The backend is not available; the message says what to install.
    """
    _check_tensor("x_seq", x_seq)
    check_sequence(x_seq)
    call = _check(x_seq, v, params, surrogate, backend, x_seq.shape[1:])
    run = _run_directly if _is_plain(x_seq, v, call) else _run_operator
    return run(x_seq, v, params, surrogate, call, detach_reset, store_v_seq, store_h_seq, pre_reset)


def check_sequence(x_seq: Tensor) -> None:
    """Raise ValueError for an input without a time step."""
    if x_seq.dim() == 0 or x_seq.shape[0] == 0:
        raise ValueError(f"x_seq needs at least one time step in dimension 0, got shape {list(x_seq.shape)}")


class _Call(NamedTuple):
    """Types, back end and numbers of a checked call."""

    v_dtype: torch.dtype
    backend: str
    chosen: str
    numbers: tuple[Any, ...]
    """Six numbers of the neuron, and three of a fused surrogate."""


def _check(x: Tensor, v: Any, params: Any, surrogate: Any, backend: str, step_shape: torch.Size) -> _Call:
    if not isinstance(params, QIFParameters):
        raise TypeError(f"params must be QIFParameters, got {params!r}")
    fused = isinstance(surrogate, FusedSurrogate)
    if isinstance(surrogate, type) or not (fused or callable(surrogate)):
        raise TypeError(
            f"surrogate must be a Window, another surrogate of qif_plugins.neuron.surrogate, or a function of h - θ, "
            f"got {surrogate!r}; a window by name is Window.named(name, params), with a name of {', '.join(WINDOWS)}"
        )
    v_dtype = x.dtype
    if isinstance(v, Tensor):
        _check_state(v, x, step_shape)
        v_dtype = wider(x.dtype, v.dtype)
    elif isinstance(v, bool) or not isinstance(v, (int, float)):  # older TorchDynamo traces no union
        raise TypeError(f"v must be a tensor or a float, got {type(v).__name__}")
    numbers = (params.a, params.u1, params.u2, params.v_threshold, params.v_reset, params.input_gain)
    if fused:
        numbers += surrogate.coefficients()
    if not _are_floats(numbers):
        names = (*LEARNABLE, *(surrogate.coefficient_names if fused else ()))
        for name, value in zip(names, numbers, strict=False):
            check_spread(name, value, x, step_shape)
    # TorchDynamo cannot trace the choice, and the operator makes it again where it runs.
    chosen = backend if torch.compiler.is_compiling() else choose_backend(backend, x.device, v_dtype)
    return _Call(v_dtype, backend, chosen, numbers)


def _are_floats(numbers: tuple[Any, ...]) -> bool:
    # A loop, which every TorchDynamo traces, over exact types, which is the fastest question to ask.
    for number in numbers:  # noqa: SIM110
        if type(number) is not float and type(number) is not int:
            return False
    return True


def _is_plain(x: Tensor, v: Tensor | float, call: _Call) -> bool:
    """Return whether :mod:`..ops.shortcuts.eager` can run the call."""
    return (
        call.chosen == "numba"
        and len(call.numbers) == 9
        and not torch.compiler.is_compiling()
        and _are_floats(call.numbers)
        and eager.applies(x, v)
    )


def _run_directly(
    x: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Any, call: _Call, detach_reset: bool,
    store_v_seq: bool, store_h: bool, pre_reset: bool, single: bool = False, twin: Tensor | None = None,
) -> Any:  # fmt: skip
    job = eager.job(
        call.numbers, params.reset == "soft", detach_reset, surrogate.strict, surrogate.shape, pre_reset,
        params.rebound, store_v_seq, store_h or bool(observers), single,
    )  # fmt: skip
    spikes, v_out, h = eager.multi_step(x, v, call.v_dtype, job, twin)
    for observe in observers:
        observe(Observation(x, params, surrogate, spikes, h))
    if not store_h:
        return spikes, v_out
    return spikes, v_out, h if h.dtype == call.v_dtype else h.to(call.v_dtype)


def _run_operator(
    x_seq: Tensor, v: Tensor | float, params: QIFParameters, surrogate: Any, call: _Call, detach_reset: bool,
    store_v_seq: bool, store_h_seq: bool, pre_reset: bool,
) -> Any:  # fmt: skip
    v_dtype, backend, _, numbers = call
    wide = x_seq.to(v_dtype) if v_dtype == torch.float64 else x_seq

    fused, exported = isinstance(surrogate, FusedSurrogate), _is_exported_to_onnx()
    soft = params.reset == "soft"
    if fused and not exported:
        state = v if isinstance(v, Tensor) else None
        tensors = [value if isinstance(value, Tensor) else None for value in numbers]
        floats = [0.0 if isinstance(value, Tensor) else float(value) for value in (*numbers, v)]
        # Not whether any of them requires a gradient, which torch.func's transforms and torch.vmap hide.
        save_h = torch.is_grad_enabled() or store_h_seq or bool(observers)
        operator = compiled_multi_step if _is_compiled() else multi_step
        spike_seq, v_out, h_seq = operator(
            wide, state, *tensors, floats, v_dtype, soft, detach_reset, surrogate.strict, int(surrogate.shape),
            pre_reset, params.rebound, store_v_seq, save_h, backend,
        )  # fmt: skip
        if wide is not x_seq:
            spike_seq = spike_seq.to(x_seq.dtype)
    else:
        if fused:
            kind = Kind(soft, detach_reset, surrogate.strict, surrogate.shape, pre_reset, params.rebound)
            spike_seq, v_seq, h_seq = composed_multi_step(wide, v, numbers[:6], kind)
        else:
            if not torch.compiler.is_compiling():  # TorchDynamo cannot trace how a notice is given once
                _notice(name_of(surrogate))
            spike_seq, v_seq, h_seq = autograd_multi_step(
                wide, v, numbers, soft, surrogate, detach_reset, pre_reset, params.rebound
            )
        v_out = (v_seq if store_v_seq else v_seq[-1]).to(v_dtype)
        spike_seq = spike_seq.to(x_seq.dtype)
        if not exported:  # ONNX knows no layouts
            spike_seq, h_seq = in_layout_of(x_seq, spike_seq), in_layout_of(x_seq, h_seq)
            v_out = in_layout_of(x_seq if store_v_seq else x_seq[0], v_out)
    for observe in observers:
        observe(Observation(x_seq, params, surrogate, spike_seq, h_seq))
    return (spike_seq, v_out, *([h_seq.to(v_dtype)] if store_h_seq else []))


def _is_exported_to_onnx() -> bool:
    """Tell whether the call is traced for ONNX, which lacks the operator; its exporter does not use TorchDynamo."""
    # PyTorch imports torch.onnx when it is first asked for, which takes a while.
    return not torch.compiler.is_dynamo_compiling() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _is_compiled() -> bool:
    """Tell whether the call is traced for ``torch.compile``; an exported program keeps the operator."""
    exporting: Any = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return torch.compiler.is_compiling() and not exporting()


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}; convert it, e.g. with {name}.float()")


def _check_state(v: Tensor, x: Tensor, step_shape: torch.Size) -> None:
    _check_tensor("v", v)
    if v.shape != step_shape:
        raise ValueError(
            f"v has shape {list(v.shape)} and one time step of x_seq has {list(step_shape)}; they must be equal. "
            "Pass a float to start every neuron at the same potential."
        )
    if v.device != x.device:
        raise ValueError(f"v is on {v.device} and x_seq on {x.device}; move one of them")


def check_spread(name: str, value: Any, x: Tensor, step_shape: torch.Size) -> None:
    """Refuse a number, called ``name``, that does not broadcast to one time step of the input ``x``.

    Raises:
        ValueError: It does not broadcast, or is on another device.
    """
    if not isinstance(value, Tensor):
        return
    dims = value.dim()
    fits = value.numel() == 1 or (
        dims <= len(step_shape)
        and all(s in (1, full) for s, full in zip(value.shape, step_shape[len(step_shape) - dims :], strict=True))
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, which does not broadcast to one time step of x_seq, "
            f"{list(step_shape)}. One value a channel of [N, C, H, W] has shape [C, 1, 1]."
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} and x_seq on {x.device}; move one of them")


@lru_cache(maxsize=256)
def _notice(name: str) -> None:
    warnings.warn(
        f"the surrogate {name} has no fused kernel and runs on the PyTorch reference; "
        "Window, Gaussian, ATan, Sigmoid and FastSigmoid of qif_plugins.neuron.surrogate have one.",
        stacklevel=4,
    )
