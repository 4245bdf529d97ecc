"""Run the neuron as a graph of PyTorch's own operators, for calls that no kernel serves.

:func:`autograd_multi_step` takes any surrogate that is a function of h - θ, and leaves its derivative to autograd.
:func:`composed_multi_step` serves exporters, which know PyTorch's operators alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Kind
from .torch_backend import charge, compute_dtype, highest, initial, steps


def autograd_multi_step(
    x_seq: Tensor, v: Tensor | float, numbers: Sequence[Tensor | float], soft: bool,
    surrogate: Callable[[Tensor], Tensor], detach_reset: bool, pre_reset: bool = False, rebound: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the neuron with any surrogate callable, to be differentiated by PyTorch.

    Args:
        x_seq: Input ``[T, ...]``.
        v: Membrane before the first step, of one time step's shape or a float.
        numbers: The neuron's six numbers, in the order of :data:`.contract.LEARNABLE`.
        soft: Whether the reset subtracts the threshold, and without rebound leaves at most the threshold.
        surrogate: Takes h - θ, returns the spike. If its attribute ``spiking`` is false, as for the hosts' smooth
            surrogates, it returns any number, and the membrane is reset in part, in both passes.
        detach_reset: Whether the reset passes no gradient to the spike.
        pre_reset: Whether ``v`` is the membrane before its reset.
        rebound: Whether the map is the parabola everywhere, or below u1 its tangent there.

    Returns:
        ``(spike_seq, v_seq, h_seq)``, each ``[T, ...]`` in the computation's dtype.

    Raises:
        TypeError: The surrogate returns no tensor.
    """
    dtype = compute_dtype(x_seq)
    cast: list[Any] = [number.to(dtype) if isinstance(number, Tensor) else number for number in numbers]
    a, u1, u2, threshold, v_reset, gain = cast
    folded = not soft and getattr(surrogate, "spiking", True)

    def contribute(v: Any) -> Any:
        return charge(a, u1, u2, v, rebound)

    def fire(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the spike, the membrane after the reset, and its contribution to the next step's charge."""
        s = surrogate(h - threshold)
        if not isinstance(s, Tensor):
            raise TypeError(
                f"the surrogate {name_of(surrogate)} takes h - θ and returns the spike, a tensor; this one returned "
                f"{s!r}. If it makes surrogates, as snnTorch's surrogate.atan does, pass what it returns."
            )
        gate = (s.detach() if detach_reset else s).to(dtype)
        after = highest(h - gate * threshold, threshold, rebound) if soft else (1 - gate) * h + gate * v_reset
        if folded:
            return s, after, (1 - gate) * contribute(highest(h, threshold, rebound)) + gate * contribute(v_reset)
        return s, after, contribute(after)

    start = initial(v, x_seq, dtype)
    contribution = fire(start)[2] if pre_reset else contribute(start)
    spikes, v_seq, h_seq = [], [], []
    for x in x_seq.to(dtype).unbind(0):
        h = contribution + gain * x
        s, after, contribution = fire(h)
        spikes.append(s)
        v_seq.append(after)
        h_seq.append(h)
    return torch.stack(spikes), torch.stack(v_seq), torch.stack(h_seq)


def composed_multi_step(
    x_seq: Tensor, v: Tensor | float, numbers: Sequence[Tensor | float], kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward pass by operators of PyTorch that do not write in place.

    Args:
        x_seq: Input ``[T, ...]``; the graph repeats the step T times.
        v: Membrane before the first step, of one time step's shape or a float.
        numbers: The neuron's six numbers, in the order of :data:`.contract.LEARNABLE`.
        kind: The reset, the comparison and ``pre_reset``; the rest is not used.

    Returns:
        ``(spike_seq, v_seq, h_seq)``, each ``[T, ...]``, with the bits of the reference; the spikes are bool.
    """
    dtype = compute_dtype(x_seq)
    cast = [
        number.to(dtype) if isinstance(number, Tensor) else torch.full((), number, dtype=dtype, device=x_seq.device)
        for number in numbers
    ]
    h_seq, spikes, v_seq = zip(*steps(x_seq, initial(v, x_seq, dtype), cast, kind), strict=True)
    return torch.stack(spikes), torch.stack(v_seq), torch.stack(h_seq)


def name_of(surrogate: Any) -> str:
    """Return the name of a surrogate, which may be any callable, for messages."""
    owner = getattr(surrogate, "__self__", None)  # of autograd.Function's apply
    named: Any = (
        owner if isinstance(owner, type) else surrogate if hasattr(surrogate, "__qualname__") else type(surrogate)
    )
    return f"{named.__module__}.{named.__qualname__}"
