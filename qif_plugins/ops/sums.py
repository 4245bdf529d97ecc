"""Sum the gradients of the coefficients on a GPU: deterministic, in one pass, without atomics.

A program (a Triton block, a CUDA thread block) handles ``block`` neighbouring neurons at a time and
strides through the rest by a multiple of the coefficients' common period ``count * inner``. Every lane
thus meets the same coefficients again and again, and keeps one float64 sum for each in registers. At
the end the lanes of one coefficient are added in groups of ``group`` and written: at most
2^20 / ``group`` numbers whatever N is, unless the period itself is longer. :func:`finish` adds those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import Coefficient

TARGET = 2**20
"""Neurons in flight: enough for every thread that a large GPU holds at four neurons each."""


class Partial:
    """Partial sums of one coefficient's gradient.

    Attributes:
        entry: The coefficient.
        group: How many neighbouring neurons share one number of ``values``.
        direct: Whether every neuron has a coefficient of its own, so that ``values`` is the gradient already.
        values: float64, or float32 if ``direct``.
    """

    def __init__(self, entry: Coefficient, span: int, neurons: int, largest_group: int, device: torch.device) -> None:
        self.entry = entry
        single = _count(entry) == 1
        self.direct = not single and _count(entry) == neurons
        self.group = largest_group if single else 1 if self.direct else math.gcd(entry.inner, largest_group)
        dtype = torch.float32 if self.direct else torch.float64
        self.values = torch.empty(-(-span // self.group), dtype=dtype, device=device)


def programs(entries: Sequence[Coefficient], needs: Sequence[bool], neurons: int, block: int) -> int:
    """Choose the number of programs of ``block`` neurons to launch.

    Args:
        entries: The six coefficients that can be learned.
        needs: Which of them need a gradient.
        neurons: N.
        block: Neurons that a program handles at a time.

    Returns:
        Enough for all neurons where no gradient is needed; otherwise such a number that
        ``block * programs`` is a multiple of every period, or at least N.
    """
    all_of_them = -(-neurons // block)
    if not any(needs):
        return all_of_them
    periods = [
        _count(entry) * entry.inner
        for entry, needed in zip(entries, needs, strict=True)
        if needed and _count(entry) > 1
    ]
    unit = math.lcm(block, *periods)
    return min(all_of_them, -(-TARGET // unit) * unit // block)


def partials(
    entries: Sequence[Coefficient], needs: Sequence[bool], neurons: int, span: int, largest_group: int,
    device: torch.device,
) -> list[Partial | None]:  # fmt: skip
    """Allocate a buffer for each gradient that is needed.

    Args:
        entries: The six coefficients that can be learned.
        needs: Which of them need a gradient.
        neurons: N.
        span: Neurons that all programs handle at a time, at most N.
        largest_group: How many neighbouring neurons the kernel can add up, a power of two.
        device: Device of the buffers.
    """
    return [
        Partial(entry, span, neurons, largest_group, device) if needed else None
        for entry, needed in zip(entries, needs, strict=True)
    ]


def finish(sums: Sequence[Partial | None]) -> list[Tensor | None]:
    """Return the gradients, each [count] in float32."""
    return [None if partial is None else _finish(partial) for partial in sums]


def _finish(partial: Partial) -> Tensor:
    count = _count(partial.entry)
    if partial.direct:
        return partial.values
    if count == 1:
        return partial.values.sum().to(torch.float32).reshape(1)
    values = partial.values.view(-1, count, partial.entry.inner // partial.group)
    return values.sum(dim=(0, 2)).to(torch.float32)


def _count(entry: Coefficient) -> int:
    return entry.values.numel() if isinstance(entry.values, Tensor) else 1
