"""Keep copied neurons in ``SpikingNeuron.instances``, the list through which snnTorch finds its neurons."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import snntorch as snn


class _Collector:
    """Record whether the garbage collector is running. It may start while the host loops over the list."""

    running = False

    def __call__(self, phase: str, info: Any) -> None:
        self.running = phase == "start"


_collector = _Collector()
gc.callbacks.append(_collector)


def enter(neuron: Any) -> None:
    """Add a copy to the list by a weak reference, so that ``utils.reset`` finds it and it can still be deleted.

    The host adds a neuron when it is constructed, but not when it is copied.
    """
    entered = snn.SpikingNeuron.instances
    entered[:] = [neuron for neuron in entered if neuron is not None]
    proxy = weakref.proxy(neuron)
    entered.append(proxy)
    weakref.finalize(neuron, _leave, entered, proxy).atexit = False


def _leave(entered: list[Any], proxy: Any) -> None:
    """Remove a deleted copy from the list, or only empty its entry while the host may be looping over the list."""
    for index, other in enumerate(entered):
        if other is proxy:
            if _collector.running:
                entered[index] = None  # which the host skips
            else:
                del entered[index]
            return
