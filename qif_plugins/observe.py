"""Watching the operator at work: what entered every call of :func:`~qif_plugins.functional.qif_multi_step`, what left.

Measuring needs the membrane before its reset, which no host keeps. While something observes, the operator
hands it over; otherwise it costs one look at an empty list. An observer sees the calls of its own thread: what
another one computes meanwhile, on a model of its own, is not part of the measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from .parameters import QIFParameters
from .surrogate import Surrogate

__all__ = ["Observation", "observers", "observing"]


class Observation(NamedTuple):
    """One call of the operator: input, neuron, surrogate, and the spikes and pre-reset membranes of every step."""

    x_seq: Tensor
    params: QIFParameters
    surrogate: Surrogate
    spike_seq: Tensor
    h_seq: Tensor


observers: list[Callable[[Observation], None]] = []


@contextmanager
def observing(observer: Callable[[Observation], None]) -> Iterator[None]:
    """Hand every call of the operator that this thread makes inside the block to ``observer``."""
    thread = threading.get_ident()

    def of_this_thread(observation: Observation) -> None:
        if threading.get_ident() == thread:
            observer(observation)

    observers.append(of_this_thread)
    try:
        yield
    finally:
        observers.remove(of_this_thread)
