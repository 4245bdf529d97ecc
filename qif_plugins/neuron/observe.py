"""Watching at work: the operator, and the spiking layers of a model.

Measuring needs the membrane before its reset, which no host keeps. While something observes, the operator hands it
over; otherwise it costs one look at an empty list. Whatever looks at layers while they run does so by :func:`watching`:
firing rates, :func:`~qif_plugins.health`, :func:`~qif_plugins.calibrate`, the energy count and the landscape.
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
        spikes: The spikes in its output, see :func:`fired`; an exact layer's are no tensor.
        runs: The calls of the operator inside, with input and membranes, where these were asked for.
    """

    name: str
    spikes: Any
    runs: tuple[Observation, ...]


observers: list[Callable[[Observation], None]] = []


@contextlib.contextmanager
def observing(observer: Callable[[Observation], None]) -> Iterator[None]:
    """Hand every call of the operator that is made inside the block, in any thread, to ``observer``."""
    observers.append(observer)
    try:
        yield
    finally:
        observers.remove(observer)


@contextlib.contextmanager
def watching(layers: Mapping[str, Any], see: Callable[[Seen], None], membranes: bool = False) -> Iterator[None]:
    """Hand every call of a layer that ends inside the block to ``see``, and none that fails.

    Layers of any host are seen, in either step mode, with hidden states, inside one another, through
    ``forward_sequence``, and at each use of a layer that a model uses several times. Calls from several threads come
    one after another. Nothing is read back from a GPU. Copies and pickles that are made inside the block are not seen.

    A model that ``torch.compile`` compiled before the block runs without hooks that it did not have then, and is not
    seen; inside :func:`~qif_plugins.diagnostics.running.preserved` it runs as written.

    Args:
        layers: Modules by name.
        see: Takes a :class:`Seen`.
        membranes: Whether :attr:`Seen.runs` is wanted. Default False.
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
    """The spikes in what a spiking layer returned: the output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) and output else output


def watchable(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method by which a layer is run, past its hooks, seen by those who watch the layer.

    Of such methods that call one another, as a class's and its base's do, the outermost is seen.
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
    """The state that the hooks of one :func:`watching` share."""

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
    """Forward pre-hook, where membranes are wanted, and forward hook of one layer."""

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
    """A hook's place in a copy, which nobody watches."""

    def __call__(self, *args: Any) -> None:
        pass
