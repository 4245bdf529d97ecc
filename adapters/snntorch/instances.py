"""The list ``SpikingNeuron.instances``, through which snnTorch finds its neurons, and the copies of ours in it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import snntorch as snn

__all__ = ["enter"]


class _Collector:
    """Whether the garbage collector is running, which it may do in the middle of a loop of the host's."""

    running = False

    def __call__(self, phase: str, info: Any) -> None:
        self.running = phase == "start"


_collector = _Collector()
gc.callbacks.append(_collector)


def enter(neuron: Any) -> None:
    """Let the host's functions for hidden states find a copy, without keeping it alive as they do what they construct.

    The host does not find its own copies, so that ``utils.reset`` leaves them as they are.
    """
    entered = snn.SpikingNeuron.instances
    entered[:] = [neuron for neuron in entered if neuron is not None]
    proxy = weakref.proxy(neuron)
    entered.append(proxy)
    weakref.finalize(neuron, _leave, entered, proxy).atexit = False


def _leave(entered: list[Any], proxy: Any) -> None:
    """Take a copy that is gone out of the list, through which the host may be going by index at that moment."""
    for index, other in enumerate(entered):
        if other is proxy:
            if _collector.running:
                entered[index] = None  # the host passes over anything but its neurons
            else:
                del entered[index]
            return
