"""Watch the firing rates of neurons while a program runs: count spikes in some calls, and read the counts later."""

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
"""Number of calls of which one is counted. It is prime, so that in a loop over time not always the same step counts."""
FIRST, LAST = 4, 32
"""Numbers of counts that are kept of the beginning and of the end. With fewer than FIRST counts no rate is given, since
a few calls do not show the behaviour of the neurons."""
HARDLY = 0.002
"""Spikes per neuron-step below which a layer hardly spikes. For comparison: they are 0.1 to 0.4 in a small network like
SpikingJelly's convolutional tutorial that learns scikit-learn's digits under ``qif run``."""
NEVER = 1e-4
"""Spikes per neuron-step below which a readout hardly spikes. Lower, since only one of a thousand classes may spike."""
INTEGRATES = 1000.0
"""Threshold from which on a readout is not meant to spike."""


class Rate(NamedTuple):
    """Spikes per neuron-step of one neuron layer.

    Attributes:
        name: Its name in its network.
        reads_out: Whether it is a LIF neuron that was left alone.
        first: Rate in the first counts; NaN if they can no longer be read.
        last: Rate in the last counts.
    """

    name: str
    reads_out: bool
    first: float
    last: float

    @property
    def silent(self) -> bool:
        """Whether it hardly spiked at the end."""
        return self.last < (NEVER if self.reads_out else HARDLY)


class _Looks:
    """Counts of spikes (kept on their device) and of neuron-steps of one neuron layer."""

    def __init__(self, name: str, reads_out: bool) -> None:
        self.name, self.reads_out = name, reads_out
        self.calls = 0
        self.first: list[tuple[Tensor, int]] = []
        self.last: deque[tuple[Tensor, int]] = deque(maxlen=LAST)

    def add(self, spikes: Tensor) -> None:
        # The count stays on the device: reading it would make the program wait for its GPU.
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
    """Watches neurons of any host without changing their modules.

    The rates of a neuron are kept after it is garbage collected; of several with one name, those of the last.
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
            self._gone.pop(looks.name, None)  # the new entry comes last
            self._gone[looks.name] = rate

    def ran(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count the spikes of a watched neuron at every :data:`STRIDE`-th call; meant as a global forward hook."""
        if torch.compiler.is_compiling():
            return
        looks = self._looks.get(module)
        if looks is None:
            return
        looks.calls += 1
        if looks.calls % STRIDE != 1:
            return
        spikes = fired(output)
        # Only a plain tensor, and not while a CUDA graph is captured, which would replay the count.
        if type(spikes) is Tensor and not (spikes.is_cuda and torch.cuda.is_current_stream_capturing()):
            looks.add(spikes)

    def rates(self) -> Iterator[Rate]:
        """Yield the rates of each neuron that ran often enough, beginning with those that no longer exist."""
        yield from self._gone.values()
        yield from filter(None, (looks.rate() for looks in self._looks.values()))


def _rate(looks: Any) -> float:
    try:
        return sum(spikes.item() for spikes, _ in looks) / max(sum(steps for _, steps in looks), 1)
    except RuntimeError:  # the device failed or captures a graph, or the tensor lived inside a transform
        return math.nan
