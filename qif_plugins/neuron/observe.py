"""Observe the operator and the spiking layers of a model while they run.

Measurements need the membrane before its reset, which no host keeps. While an observer is active, the operator passes
it on; without one, the only cost is a check of an empty list. Everything that observes running layers uses
:func:`watching`: firing rates, :func:`~qif_plugins.health`, :func:`~qif_plugins.calibrate`, the energy count and the
landscape.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .parameters import QIFParameters
from .surrogate import Surrogate


class Observation(NamedTuple):
    """One call of the operator: input, neuron, surrogate, and the spikes and pre-reset membranes of every step."""

    x_seq: Tensor
    params: QIFParameters
    surrogate: Surrogate
    spike_seq: Tensor
    h_seq: Tensor


class Seen(NamedTuple):
    """One call of a layer.

    Attributes:
        name: The layer's name.
        spikes: The spikes in its output, see :func:`fired`; those of an exact layer are not a tensor.
        runs: The calls of the operator inside, with input and membranes, if these were requested.
    """

    name: str
    spikes: Any
    runs: tuple[Observation, ...]


observers: list[Callable[[Observation], None]] = []


@contextlib.contextmanager
def observing(observer: Callable[[Observation], None]) -> Iterator[None]:
    """Pass every call of the operator inside the block, in any thread, to ``observer``."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


@contextlib.contextmanager
def watching(layers: Mapping[str, Any], see: Callable[[Seen], None], membranes: bool = False) -> Iterator[None]:
    """Pass every call of a layer that succeeds inside the block to ``see``.

    This works for layers of any host, in either step mode, with hidden states, inside one another, through
    ``forward_sequence``, and at each use of a layer that a model uses several times. Calls from several threads are
    passed one after another. Nothing is read back from a GPU. Copies and pickles made inside are not observed.

    A model that ``torch.compile`` compiled before the block runs without the new hooks, and is not observed. Inside
    :func:`~qif_plugins.diagnostics.running.preserved` it runs uncompiled, and is.

    Args:
        layers: Modules by name.
        see: Function that takes a :class:`Seen`.
        membranes: Whether :attr:`Seen.runs` is needed. Default False.
    """
    watch = _Watch(see)
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = _Hook(watch, name)
            if membranes:
                stack.callback(layer.register_forward_pre_hook(hook).remove)
            stack.callback(layer.register_forward_hook(hook, always_call=True).remove)
        if membranes:
            stack.enter_context(observing(watch.observe))
        yield


def fired(output: Any) -> Any:
    """Return the spikes from the output of a spiking layer: the output itself, or the first of several."""
    return output[0] if isinstance(output, tuple | list) and output else output


def watchable(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method that runs a layer without its hooks visible to observers of the layer.

    If such methods call one another, such as a class's and its base's, the outermost call is observed.
    """

    @functools.wraps(method)
    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = [hook for hook in layer._forward_hooks.values() if isinstance(hook, _Hook)]
        if not hooks or layer in (inside := _by_method.__dict__.setdefault("layers", [])):
            return method(layer, *args, **kwargs)
        output = None
        inside.append(layer)
        for hook in hooks:
            hook(layer, args)
        try:
            output = method(layer, *args, **kwargs)
        finally:
            inside.remove(layer)
            for hook in hooks:
                hook(layer, args, output)
        return output

    return run


_by_method = threading.local()
"""The layers that a watchable method runs in this thread."""


class _Watch:
    """State that the hooks of one :func:`watching` share."""

    def __init__(self, see: Callable[[Seen], None]) -> None:
        self.see, self.lock = see, threading.RLock()
        self._thread = threading.local()

    @property
    def running(self) -> list[tuple[Any, list[Observation]]]:
        """The layers that run in this thread, outermost first, and what the operator did in each."""
        return self._thread.__dict__.setdefault("running", [])

    def observe(self, observation: Observation) -> None:
        if self.running:
            self.running[-1][1].append(observation)


class _Hook:
    """Forward hook of one layer, and its forward pre-hook if membranes are needed."""

    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, layer: Any, args: tuple[Any, ...], *after: Any) -> None:
        watch = self.watch
        if not after:
            watch.running.append((layer, []))
            return
        # Not the last one where another hook failed before ours.
        mine = watch.running and watch.running[-1][0] is layer
        runs = tuple(watch.running.pop()[1]) if mine else ()
        output = after[-1]
        if output is None:
            return  # it failed
        # A compiler cannot trace a lock.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else watch.lock:
            watch.see(Seen(self.name, fired(output), runs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unwatched, ()


class _Unwatched:
    """Placeholder for a hook in a copy of a layer, which is not observed."""

    def __call__(self, *args: Any) -> None:
        pass
