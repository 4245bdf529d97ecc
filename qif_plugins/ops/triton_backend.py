"""Launch the kernels of :mod:`.triton_kernels` on CUDA, or on the CPU in Triton's interpreter.

Nothing here waits for the device, tunes itself or creates a tensor from a number: floats travel by
value in the launch, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .contract import Coefficient, Coefficients, Kind
from .sums import finish, partials, programs

# Four neurons a thread, hence 16 bytes an access in float32. Small inputs take small blocks, which
# spread over more of the GPU.
_LARGE, _SMALL = 1024, 256
_LARGE_FROM = 2**19


@lru_cache(maxsize=16)
def unavailable(device: torch.device) -> str | None:
    """Say why the kernels cannot run on ``device`` and what to install or change; ``None`` if they can run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton."
    if device.type == "cpu":
        # The variable first: importing Triton takes a second that the CPU has no use for.
        if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y") and _interpreted():
            return None
        return "on the CPU Triton only interprets; set TRITON_INTERPRET=1 before Python starts."
    if device.type != "cuda":
        return f"Triton's kernels run on CUDA tensors, and this one is on {device.type!r}."
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA GPU."
    if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton needs compute capability 8.0 and this GPU has {major}.{minor}; use backend='cupy'."
    return _why_it_cannot_launch()


def forward(
    x: Tensor, v0: Tensor | float, c: Coefficients, kind: Kind, spike: Tensor, v_last: Tensor | None,
    v_seq: Tensor | None, h: Tensor | None,
) -> None:  # fmt: skip
    """See :mod:`.contract`."""
    from . import triton_kernels

    steps, neurons = x.shape
    block, options = _block(neurons)
    grid = -(-neurons // block)
    numbers = c[:6]
    with torch.cuda.device_of(x):
        triton_kernels.forward[(grid,)](
            x, v0, spike, v_last, v_seq, h, *_arguments(numbers, neurons), steps, neurons,
            LAYOUTS=_layouts(numbers, neurons), START=int(isinstance(v0, Tensor)), SOFT=kind.soft,
            STRICT=kind.strict, PRE_RESET=kind.pre_reset, REBOUND=kind.rebound, WIDE=_is_wide(grid * block),
            BLOCK=block, **options,
        )  # fmt: skip


def backward(
    grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None, h: Tensor, v0: Tensor | float,
    x: Tensor | None, c: Coefficients, kind: Kind, grad_x: Tensor, grad_v0: Tensor | None, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """See :mod:`.contract`."""
    from . import triton_kernels

    steps, neurons = h.shape
    block, options = _block(neurons)
    grid = programs(c[:6], needs, neurons, block)
    visits = -(-neurons // (grid * block))
    sums = partials(c[:6], needs, neurons, min(neurons, grid * block), block, h.device)
    groups = sum((s.group.bit_length() - 1) << 4 * i for i, s in enumerate(sums) if s is not None)
    with torch.cuda.device_of(h):
        triton_kernels.backward[(grid,)](
            grad_spike, grad_v, grad_h, h, v0, x, grad_x, grad_v0, *(None if s is None else s.values for s in sums),
            *_arguments(c, neurons), steps, neurons, visits,
            LAYOUTS=_layouts(c, neurons), START=int(isinstance(v0, Tensor)), SHAPE=int(kind.shape), SOFT=kind.soft,
            DETACHED=kind.detach_reset, STRICT=kind.strict, PRE_RESET=kind.pre_reset, REBOUND=kind.rebound,
            GRAD_V_LAST=grad_v is not None and grad_v.dim() == 1, GROUPS=groups,
            WIDE=_is_wide(grid * block * visits), BLOCK=block, **options,
        )  # fmt: skip
    return finish(sums)


def _why_it_cannot_launch() -> str | None:
    """Try Triton's launcher: building it takes a C compiler and Python's headers, which slim containers lack."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever a build raises, another backend takes over
        reason = " ".join(str(error).split())[:200]
        return f"Triton cannot launch kernels ({reason}); it needs the GPU's driver, a C compiler and Python's headers."
    return None


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    import triton

    from . import triton_kernels

    return not isinstance(triton_kernels.forward, triton.JITFunction)


def _block(neurons: int) -> tuple[int, dict[str, Any]]:
    """Neurons a program, and the launch options that go with them."""
    block = _LARGE if neurons >= _LARGE_FROM else _SMALL
    return block, {"num_warps": block // 128, "num_stages": 1, "enable_fp_fusion": False}


def _is_wide(lanes: int) -> bool:
    """Whether the index of a neuron, or of a lane beyond the last neuron, needs more than 31 bits."""
    return lanes > 2**31 - 1


def _arguments(entries: tuple[Coefficient, ...], neurons: int) -> list[Any]:
    """Make three arguments per number: the number or its address, and inner and count if the kernel divides by them."""
    arguments: list[Any] = []
    for entry in entries:
        values, inner = entry
        if isinstance(values, Tensor) and _layout(entry, neurons) == 3:
            arguments += [values, inner, values.numel()]
        else:
            arguments += [values, None, None]
    return arguments


def _layouts(entries: tuple[Coefficient, ...], neurons: int) -> int:
    return sum(_layout(entry, neurons) << 2 * i for i, entry in enumerate(entries))


def _layout(entry: Coefficient, neurons: int) -> int:
    """Return the code of ``triton_kernels``: 0 float, 1 single, 2 one per neuron, 3 periodic."""
    if not isinstance(entry.values, Tensor):
        return 0
    count = entry.values.numel()
    return 1 if count == 1 else 2 if count == neurons else 3
