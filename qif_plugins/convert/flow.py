"""Find the places of neurons by data flow: a copy of the model runs on an example, and each tensor keeps its origin."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .hosts import Host, Request
from .rebuild import rebuild
from .trial import Call, trial
from .walk import NEURON, NORM, OTHER, WEIGHT, Site, kind_of, walk

_TRIAL = Request("lif", parameters={"backend": "auto"})
_PARAMETER = ("parameter", "")
_INPUT, _MASK = "input", "mask"
_MIXING = {
    "addmm", "mm", "bmm", "baddbmm", "addmv", "mv", "addbmm", "linear", "convolution", "_convolution", "embedding",
    "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution", "einsum", "dot", "_int_mm",
}  # fmt: skip
"""Operators that count as a weight layer if one of their arguments is a parameter."""

Source = tuple[str, str]
Path = frozenset[Any]
"""The neurons in a row between the input and a tensor, on the path with the fewest.

Each entry is a neuron's name with the number of its call or with the layers that feed it, see :func:`_into_neuron`.
"""


class _Flow(TorchDispatchMode):
    """Records the sources of every tensor: the neurons, norms and weight layers that it was directly made from.

    A tensor that no operator of the run made came from outside: an argument, a field of one, an array that was turned
    into a tensor. Each of these is a source of its own, ``"input"`` if it is floating point, else ``"mask"``. The
    result of a comparison is a ``"mask"`` as well. A source is the network's input if it reaches a weight, a norm or a
    neuron before any other neuron. A source that joins the network later, such as a mask, is not the input, so no
    shortcut leads through it.

    Attributes:
        sources: Tensor -> its sources.
        paths: Tensor -> its path.
        inputs: The sources that are the network's input, with their paths. The result of a comparison has the path of
            the tensors that were compared, every other input an empty path.
        feeding: The neurons that feed a weight or another neuron.
        behind: Norm -> the neurons that feed it, with no weight between.
        reached: Whether a neuron with a known path has run.
        within: The neuron that is running. Its own recurrence does not count as feeding.
        behind_neuron: The path of that neuron's output; ``None`` if it is unknown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()
        self.paths: Any = WeakTensorKeyDictionary()
        self.inputs: dict[Source, Path] = {}
        self.feeding: set[str] = set()
        self.behind: dict[str, set[str]] = {}
        self.reached = False
        self.within = ""
        self.behind_neuron: Path | None = None
        self._outside: dict[Source, tuple[int, Path]] = {}

    def feed(self, sources: frozenset[Source]) -> None:
        if not self.within:
            self.feeding |= self.neurons(sources)

    def neurons(self, sources: frozenset[Source]) -> set[str]:
        """Return the neurons among ``sources``, and those that feed the norms among them."""
        found = {name for kind, name in sources if kind == NEURON}
        return found.union(*(self.behind.get(name, ()) for kind, name in sources if kind == NORM))

    def of(self, values: Any) -> frozenset[Source]:
        found: frozenset[Source] = frozenset()
        for tensor in tree_leaves(values):
            if isinstance(tensor, nn.Parameter):
                found |= {_PARAMETER}
            elif isinstance(tensor, Tensor):
                if tensor not in self.sources:
                    self.sources[tensor] = self.outside(tensor)
                found |= self.sources[tensor]
        return found

    def outside(self, tensor: Tensor, path: Path = frozenset()) -> frozenset[Source]:
        """Make a new source for a tensor from outside or a mask; a single number gets no source."""
        if not tensor.dim():
            return frozenset()
        source = (_INPUT if _is_float(tensor) else _MASK), str(len(self._outside))
        self._outside[source] = tensor.numel(), path
        return frozenset({source})

    def take(self, values: Any) -> None:
        """Record ``values``, which enter a weight, norm or neuron, as the network's input if no neuron came before."""
        if self.within or self.path_of(values) is not None:
            return
        sources = self.of(values)
        found = [one for one in sources if one[0] == _INPUT] or [one for one in sources if one[0] == _MASK]
        if found:  # the largest: a smaller one is a mask, or a constant that normalizes
            most = max(self._outside[one][0] for one in found)
            self.inputs |= {one: self._outside[one][1] for one in found if self._outside[one][0] == most}
        elif not (self.inputs or self.reached):  # the model makes its input itself
            self.mark(values, sources, frozenset())

    def path_of(self, values: Any) -> Path | None:
        """Return the path of a tensor made from ``values``; ``None`` if they do not depend on the network's input."""
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        known = [path for tensor in tensors if (path := self.paths.get(tensor)) is not None]
        for tensor in tensors:
            if tensor not in self.paths:
                known += [self.inputs[one] for one in self.sources.get(tensor, ()) if one in self.inputs]
        return min(known, key=len, default=None)

    def mark(self, values: Any, sources: frozenset[Source], path: Path | None = None) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self.sources[tensor] = sources
                if path is not None:
                    self.paths[tensor] = path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = self.of((args, kwargs))
        name = func.overloadpacket.__name__
        mixes = _PARAMETER in sources and name in _MIXING
        if mixes:
            self.take((args, kwargs))
        path = self.path_of((args, kwargs))
        out = func(*args, **kwargs)
        if name.endswith("_like") or name.startswith("new_"):
            sources, path = frozenset(), None  # its shape, not its values
        elif mixes:
            self.feed(sources)
            sources = frozenset({(WEIGHT, f"aten.{name}")})
        elif sources and _compares(out, args) and (name != "_to_copy" if path else not self.neurons(sources)):
            mask = self.outside(out, path or frozenset())
            sources, path = (sources | mask if path else mask), None
        self.mark(out, sources, path)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            base = getattr(value, "_base", None)
            if base is not None and argument.alias_info is not None and argument.alias_info.is_write:
                # record[t] = spikes: the whole record now has the sources of the spikes, too.
                self.mark(base, sources | self.of(base), self.path_of((base, *args)))
        return out


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _compares(out: Any, args: Any) -> bool:
    """Return whether an operator's result is a mask or an index made from values of another dtype."""
    if not isinstance(out, Tensor) or _is_float(out):
        return False
    return any(isinstance(value, Tensor) and value.dtype != out.dtype for value in tree_leaves(args))


def trace(model: nn.Module, hosts: Sequence[Host], sites: list[Site], example: Call) -> None:
    """Find the places by running a copy of the model, in eval mode and without gradient.

    Args:
        model: Any module.
        hosts: The hosts of its neurons.
        sites: Its neurons; their places are filled in.
        example: The call.

    Raises:
        ValueError: The model does not run on the example, or its copy cannot be made.
    """
    flow, fed, counts, depths = _Flow(), {}, {}, {}  # type: ignore[var-annotated]
    with trial(model, hosts) as twin, torch.no_grad():
        # Buffers, and tensors that are attributes, are the model's own.
        flow.mark([list(vars(module).values()) for module in twin.modules()], frozenset())
        twin.register_forward_pre_hook(_into_model(flow), with_kwargs=True)
        for name, module, found in walk(twin, hosts):
            kind = kind_of(module, found)
            if kind == OTHER:
                continue
            if found and found[1] == ("lif", ""):
                # QIF runs wherever the example is, unlike a LIF neuron that was set to a GPU's backend.
                with contextlib.suppress(ValueError):
                    rebuild(module, found[0], found[0].plan(module, _TRIAL, normalized=False))
            sequences = found is not None and found[0].takes_sequences(module)
            entering = {NEURON: _into_neuron(flow, name, sequences, fed, counts, depths), NORM: _into_norm(flow, name)}
            module.register_forward_pre_hook(entering.get(kind, _into_weight(flow)), with_kwargs=True)
            module.register_forward_hook(_out_of(flow, kind, name), with_kwargs=True)
        call = example.copied()
        try:
            with flow:
                out = call.run(twin)
        except Exception as error:
            raise ValueError(f"the model does not run on the example input: {type(error).__name__}: {error}") from error
        returned = flow.neurons(flow.of(out))
    # Hidden neurons may be returned, too, and a readout may feed itself. What feeds nothing and is not returned is read
    # as an attribute, or by a hook.
    last = fed.keys() - flow.feeding or returned
    for site in sites:
        site.norms = sorted(name for kind, name in fed.get(site.name, ()) if kind == NORM)
        site.weights = sorted(name for kind, name in fed.get(site.name, ()) if kind == WEIGHT)
        site.direct = sorted(name for kind, name in fed.get(site.name, ()) if kind not in (NORM, WEIGHT))
        site.depth = depths.get(site.name, 0)
        site.sources = max(counts.get(site.name, 1), 1)
        site.norms_known = site.name in fed
        site.reads_out = site.name in last
        site.how = "data flow" if site.norms_known else "not reached by the example"


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _into_model(flow: _Flow) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not flow.of(tensor) and flow.path_of(tensor) is None:
                flow.mark(tensor, flow.outside(tensor))  # made on the way, such as random numbers

    return hook


def _into_neuron(
    flow: _Flow, name: str, sequences: bool, fed: dict[str, set[Source]], counts: dict[str, int],
    depths: dict[str, int],
) -> Hook:  # fmt: skip
    calls = itertools.count()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = _first(args, kwargs)  # the others are its state
        flow.take(current)
        sources = frozenset(
            (_INPUT, _INPUT) if kind in (_INPUT, _MASK) else (kind, source)
            for kind, source in flow.of(current) - {_PARAMETER}
            if kind != _MASK or (kind, source) in flow.inputs
        )
        fed.setdefault(name, set()).update(sources)
        counts[name] = max(counts.get(name, 0), len(sources))
        path = flow.path_of(current)
        if path is None and not flow.reached:
            path = frozenset()
        flow.feed(sources)
        flow.within, flow.behind_neuron = name, None
        if path is not None:
            # If a neuron that takes one time step per call gets its own output, that is its next step in time and not
            # a further neuron in the row, unless other layers feed it this time. A neuron that takes sequences runs all
            # steps in one call.
            flow.behind_neuron = path | {(name, next(calls) if sequences else sources)}
            flow.reached = True
            depths[name] = max(depths.get(name, 0), len(flow.behind_neuron))

    return hook


def _into_norm(flow: _Flow, name: str) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow.take(_first(args, kwargs))
        flow.behind.setdefault(name, set()).update(flow.neurons(flow.of((args, kwargs))))

    return hook


def _into_weight(flow: _Flow) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow.take(_first(args, kwargs))
        flow.feed(flow.of((args, kwargs)))

    return hook


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[:1] or list(kwargs.values())[:1]


def _out_of(flow: _Flow, kind: str, name: str) -> Callable[..., None]:
    sources = frozenset({(kind, name)})

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        path = flow.behind_neuron if kind == NEURON else None
        flow.mark(out, sources, path)
        if kind != NEURON:
            return
        flow.within, flow.behind_neuron = "", None
        # Its state counts as output, too, as it may be read by name; but not an input that it keeps as an attribute.
        given = {id(value) for value in tree_leaves((args, kwargs))}
        state = {key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters")}
        flow.mark([value for value in tree_leaves(state) if id(value) not in given], sources, path)

    return hook
