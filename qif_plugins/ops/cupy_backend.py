"""The kernels in CUDA C++ (``qif.cu``), compiled by NVRTC through CuPy at first use.

Tensors are passed by address: nothing is copied, nothing is allocated by CuPy, and the launch goes to
PyTorch's current stream, so that CUDA graphs capture it. One kernel is compiled for each combination of
types and of what :class:`~.contract.Kind` says, in about half a second.
"""

from __future__ import annotations

import importlib.util
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contract import Coefficient, Coefficients, Kind
from .sums import finish, partials, programs

SOURCE = Path(__file__).with_name("qif.cu")
OPTIONS = ("-std=c++17", "--fmad=false")
"""Options of NVRTC, whose defaults keep subnormal numbers and round divisions correctly."""

THREADS = 256

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NUMBER = struct.Struct("@Pqqfxxxx")
_SUM = struct.Struct("@Pqq")
_FORWARD = struct.Struct("@PPPPPPqqfxxxx")
_BACKWARD = struct.Struct("@PPPPPPPPqqqfxxxx")


@lru_cache(maxsize=16)
def unavailable(device: torch.device) -> str | None:
    """Say why the kernels cannot run on ``device`` and what to install; ``None`` if they can run."""
    if device.type != "cuda":
        return f"its kernels run on CUDA tensors only, and this one is on {device.type!r}."
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "this PyTorch sees no CUDA GPU."
    package = f"cupy-cuda{torch.version.cuda.split('.')[0]}x"
    if importlib.util.find_spec("cupy") is None:
        return f"CuPy is not installed; pip install {package}."
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # whatever a broken installation raises, another backend takes over
        return f"CuPy cannot load NVRTC ({error}); pip install '{package}[ctk]'."
    return None


def forward(
    x: Tensor, v0: Tensor | float, c: Coefficients, kind: Kind, spike: Tensor, v_last: Tensor | None,
    v_seq: Tensor | None, h: Tensor | None,
) -> None:  # fmt: skip
    """See :mod:`.contract`."""
    vector = width(x.shape[1], (x, v0, spike, v_last, v_seq, h, *(entry.values for entry in c)))
    blocks = -(-x.shape[1] // (THREADS * vector))
    membrane = v_seq if v_seq is not None else v_last
    kind = kind._replace(detach_reset=False, shape=type(kind.shape)(0))
    flags = _macros(kind, c, x, v0, membrane, (False,) * 6, (v_seq, h))
    _launch(f"forward<{vector}>", flags, blocks, _pack_forward(x, v0, c, spike, v_last, v_seq, h), x.device)


def backward(
    grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None, h: Tensor, v0: Tensor | float,
    x: Tensor | None, c: Coefficients, kind: Kind, grad_x: Tensor, grad_v0: Tensor | None, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """See :mod:`.contract`."""
    neurons = h.shape[1]
    tensors = (grad_spike, grad_v, grad_h, h, v0, x, grad_x, grad_v0, *(entry.values for entry in c))
    vector = width(neurons, tensors)
    blocks = programs(c[:6], needs, neurons, THREADS * vector)
    sums = partials(c[:6], needs, neurons, min(neurons, blocks * THREADS * vector), vector, h.device)
    arguments = _pack_backward(grad_spike, grad_v, grad_h, h, v0, x, c, grad_x, grad_v0, sums)
    flags = _macros(kind, c, grad_x, v0, grad_v, needs, (None, None, grad_spike, grad_v, grad_h))
    _launch(f"backward<{vector}>", flags, blocks, arguments, h.device)
    return finish(sums)


def width(neurons: int, tensors: Sequence[Any]) -> int:
    """Return the neurons per thread: 4 if every row of every tensor starts at a multiple of four elements, else 1."""
    aligned = all(t.data_ptr() % (4 * t.element_size()) == 0 for t in tensors if isinstance(t, Tensor))
    return 4 if neurons % 4 == 0 and aligned else 1


def _macros(
    kind: Kind,
    c: Coefficients,
    x: Tensor,
    v0: Tensor | float,
    membrane: Tensor | None,
    needs: Sequence[bool],
    given: Sequence[Tensor | None],
) -> dict[str, int]:
    """Return the macros to compile ``qif.cu`` with; ``membrane`` is any tensor of the stored membranes' type."""
    return {
        "QIF_X": _TYPES[x.dtype],
        "QIF_V0": _TYPES[v0.dtype] if isinstance(v0, Tensor) else 0,
        "QIF_V": _TYPES[membrane.dtype] if membrane is not None else 0,
        "QIF_SOFT": int(kind.soft),
        "QIF_DETACHED": int(kind.detach_reset),
        "QIF_STRICT": int(kind.strict),
        "QIF_SHAPE": int(kind.shape),
        "QIF_PRE_RESET": int(kind.pre_reset),
        "QIF_REBOUND": int(kind.rebound),
        "QIF_TENSORS": sum(1 << i for i, entry in enumerate(c) if isinstance(entry.values, Tensor)),
        "QIF_NEEDS": sum(1 << i for i, needed in enumerate(needs) if needed),
        "QIF_GIVEN": sum(1 << i for i, tensor in enumerate(given) if tensor is not None),
    }


def _pack_forward(
    x: Tensor, v0: Tensor | float, c: Coefficients, spike: Tensor, v_last: Tensor | None, v_seq: Tensor | None,
    h: Tensor | None,
) -> bytes:  # fmt: skip
    """Pack ``struct Forward`` of ``qif.cu``."""
    pointers = [_address(t) for t in (x, v0, spike, v_last, v_seq, h)]
    return _pack_numbers(c) + _FORWARD.pack(*pointers, *x.shape, _start(v0))


def _pack_backward(
    grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None, h: Tensor, v0: Tensor | float,
    x: Tensor | None, c: Coefficients, grad_x: Tensor, grad_v0: Tensor | None, sums: Sequence[Any],
) -> bytes:  # fmt: skip
    """Pack ``struct Backward`` of ``qif.cu``."""
    places = b"".join(
        _SUM.pack(0, 1, 0) if s is None else _SUM.pack(s.values.data_ptr(), s.group, s.direct) for s in sums
    )
    pointers = [_address(t) for t in (grad_spike, grad_v, grad_h, h, v0, x, grad_x, grad_v0)]
    v_last = grad_v is not None and grad_v.dim() == 1
    return _pack_numbers(c) + places + _BACKWARD.pack(*pointers, *h.shape, v_last, _start(v0))


def _pack_numbers(c: Coefficients) -> bytes:
    return b"".join(map(_pack_number, c))


def _pack_number(entry: Coefficient) -> bytes:
    values = entry.values
    if isinstance(values, Tensor):
        return _NUMBER.pack(values.data_ptr(), entry.inner, values.numel(), 0.0)
    return _NUMBER.pack(0, 1, 1, values)


def _address(value: Tensor | float | None) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else 0


def _start(v0: Tensor | float) -> float:
    return 0.0 if isinstance(v0, Tensor) else v0


class _Stream:
    """Stream by its handle, as CuPy's launch takes it. (CuPy's ExternalStream is deprecated since version 14.)"""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


def _launch(name: str, flags: dict[str, int], blocks: int, arguments: bytes, device: torch.device) -> None:
    import numpy as np

    index = device.index if device.index is not None else torch.cuda.current_device()
    # A NumPy array of one element is passed by value.
    by_value = np.frombuffer(arguments, dtype=f"V{len(arguments)}")
    # PyTorch's guard, not CuPy's: on its way out CuPy's would create a context on a first GPU that nobody uses.
    with torch.cuda.device(index):
        stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
        _kernel(name, flags, index)((blocks,), (THREADS,), (by_value,), stream=stream)


_loaded: dict[tuple[str, tuple[int, ...], int], Any] = {}
_loading = threading.Lock()


def _kernel(name: str, flags: dict[str, int], index: int) -> Any:
    """Load the kernel on the current device, whose number is ``index``, unless it is loaded already."""
    key = (name, tuple(flags.values()), index)
    kernel = _loaded.get(key)
    if kernel is not None:
        return kernel
    from cupy.cuda import Module

    # One thread at a time: of two copies one would be unloaded again, perhaps while it runs.
    with _loading:
        if key not in _loaded:
            binary, symbol = compile_kernel(name, flags, torch.cuda.get_device_capability(index))
            module = Module()
            module.load(binary)
            _loaded[key] = module.get_function(symbol)
        return _loaded[key]


def compile_kernel(name: str, flags: dict[str, int], capability: tuple[int, int]) -> tuple[bytes, str]:
    """Compile ``qif.cu`` with CuPy's NVRTC; no GPU is needed.

    CuPy's RawModule will not do: it adds ``-ftz=true``, which flushes subnormal numbers to zero.

    Args:
        name: The instantiation, ``"forward<4>"`` for example.
        flags: From :func:`_macros`.
        capability: The GPU's compute capability.

    Returns:
        Machine code, or PTX for a GPU younger than this NVRTC, and the kernel's name in it.

    Raises:
        RuntimeError: The source does not compile; the message is the compiler's.
    """
    from cupy.cuda import nvrtc

    wanted = capability[0] * 10 + capability[1]
    known = [arch for arch in nvrtc.getSupportedArchs() if arch <= wanted]
    if not known:
        raise RuntimeError(
            f"this NVRTC ({'.'.join(map(str, nvrtc.getVersion()))}) no longer compiles for compute capability "
            f"{capability[0]}.{capability[1]}; use backend='torch', or an older CUDA with its CuPy."
        )
    native = wanted in known
    options = [f"--gpu-architecture={'sm' if native else 'compute'}_{max(known)}", *OPTIONS]
    program = nvrtc.createProgram(SOURCE.read_text(encoding="utf-8"), SOURCE.name, (), ())
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*options, *(f"-D{key}={value}" for key, value in flags.items())))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{SOURCE.name} does not compile: {nvrtc.getProgramLog(program)}") from error
        return (nvrtc.getCUBIN if native else nvrtc.getPTX)(program), nvrtc.getLoweredName(program, name)
    finally:
        nvrtc.destroyProgram(program)
