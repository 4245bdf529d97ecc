"""Watch the firing rates of neurons while a program runs: now and then count spikes, and read the counts at the end."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..neuron.observe import fired

STRIDE = 17
"""One call in this many is looked at. A prime, so that a loop over time does not show one and the same step."""
FIRST, LAST = 4, 32
"""Numbers of looks that are kept of the beginning and of the end. With fewer than FIRST no rate is given: a program
that made a few calls has not shown what its neurons do."""
HARDLY = 0.002
"""Spikes per neuron-step below which a layer hardly spikes: in a small network of the shape of SpikingJelly's
convolutional tutorial that learns scikit-learn's digits under ``qif run`` they are 0.1 to 0.4."""
NEVER = 1e-4
"""Spikes per neuron-step below which a readout hardly spikes: one of a thousand classes may spike."""
INTEGRATES = 1000.0
"""A readout with a threshold of this or more is not meant to spike."""


class Rate(NamedTuple):
    """Spikes per neuron-step of one neuron layer.

    Attributes:
        name: Its name in its network.
        reads_out: Whether it is a LIF neuron that was left alone.
        first: In the first looks; NaN where they cannot be read any more.
        last: In the last looks.
    """

    name: str
    reads_out: bool
    first: float
    last: float

    @property
    def silent(self) -> bool:
        """Whether it hardly spiked in the end."""
        return self.last < (NEVER if self.reads_out else HARDLY)


class _Looks:
    """Spikes, on their device, and neuron-steps of one neuron layer."""

    def __init__(self, name: str, reads_out: bool) -> None:
        self.name, self.reads_out = name, reads_out
        self.calls = 0
        self.first: list[tuple[Tensor, int]] = []
        self.last: deque[tuple[Tensor, int]] = deque(maxlen=LAST)

    def add(self, spikes: Tensor) -> None:
        # Counted where they are: reading the number back would make the program wait for its GPU.
        look = torch.count_nonzero(spikes.detach()), spikes.numel()
        if len(self.first) < FIRST:
            self.first.append(look)
        self.last.append(look)

    def rate(self) -> Rate | None:
        """Compute the rates so far; ``None`` for a neuron that did not run often enough."""
        if len(self.last) < FIRST:
            return None
        return Rate(self.name, self.reads_out, _rate(self.first), _rate(self.last))


class Watch:
    """Watches neurons of any host, whose modules stay as they are.

    The rates of a neuron that is garbage collected are kept, of several with one name those of the last.
    """

    def __init__(self) -> None:
        self._looks = WeakIdKeyDictionary()
        self._gone: dict[str, Rate] = {}

    def add(self, name: str, neuron: nn.Module, reads_out: bool = False) -> None:
        """Watch one more neuron; a readout only if its spikes are read, not its membrane."""
        threshold = getattr(neuron, "v_threshold", None)
        if reads_out and not (isinstance(threshold, int | float) and threshold < INTEGRATES):
            return
        looks = self._looks[neuron] = _Looks(name, reads_out)
        weakref.finalize(neuron, self._ended, looks).atexit = False

    def _ended(self, looks: _Looks) -> None:
        rate = looks.rate()
        if rate is not None:
            self._gone.pop(looks.name, None)  # to the end of the order
            self._gone[looks.name] = rate

    def ran(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count the spikes of a watched neuron at every :data:`STRIDE`-th call; a forward hook for every module."""
        if torch.compiler.is_compiling():
            return
        looks = self._looks.get(module)
        if looks is None:
            return
        looks.calls += 1
        if looks.calls % STRIDE != 1:
            return
        spikes = fired(output)
        # A plain tensor, and none inside the capture of a CUDA graph, which would replay the count.
        if type(spikes) is Tensor and not (spikes.is_cuda and torch.cuda.is_current_stream_capturing()):
            looks.add(spikes)

    def rates(self) -> Iterator[Rate]:
        """Yield the rates of each neuron that ran often enough, those that are gone first."""
        yield from self._gone.values()
        yield from filter(None, (looks.rate() for looks in self._looks.values()))


def _rate(looks: Any) -> float:
    try:
        return sum(spikes.item() for spikes, _ in looks) / max(sum(steps for _, steps in looks), 1)
    except RuntimeError:  # the device failed or captures a graph, or the tensor lived inside a transform
        return math.nan
