"""Find the places of a model's neurons by data flow: a copy runs on an example, and every tensor carries its origin."""

from __future__ import annotations

import contextlib
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
_INPUT = ("input", "")
_MIXING = {
    "addmm", "mm", "bmm", "baddbmm", "addmv", "mv", "addbmm", "linear", "convolution", "_convolution", "embedding",
    "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution", "einsum", "dot", "_int_mm",
}  # fmt: skip
"""Operators that are a weight layer where one of their arguments is a parameter."""

Source = tuple[str, str]


class _Flow(TorchDispatchMode):
    """Every tensor's sources: the neurons, norms and weight layers that it was made from without another between.

    Attributes:
        sources: Tensor -> where it comes from.
        depths: Tensor -> the number of neurons in a row that it went through, over the way with the fewest.
        feeding: The neurons that feed a weight or another neuron.
        behind: Norm -> the neurons that feed it, with no weight between.
        within: The neuron that is running, whose own recurrence says nothing about its place.
        behind_neuron: The depth of what it returns; ``None`` where that is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()
        self.depths: Any = WeakTensorKeyDictionary()
        self.feeding: set[str] = set()
        self.behind: dict[str, set[str]] = {}
        self.within = ""
        self.behind_neuron: int | None = None

    def feed(self, sources: frozenset[Source]) -> None:
        if not self.within:
            self.feeding |= self.neurons(sources)

    def neurons(self, sources: frozenset[Source]) -> set[str]:
        """The neurons among ``sources``, seen through the norms there."""
        found = {name for kind, name in sources if kind == NEURON}
        return found.union(*(self.behind.get(name, ()) for kind, name in sources if kind == NORM))

    def of(self, values: Any) -> frozenset[Source]:
        found: frozenset[Source] = frozenset()
        for tensor in tree_leaves(values):
            if isinstance(tensor, nn.Parameter):
                found |= {_PARAMETER}
            elif isinstance(tensor, Tensor):
                found |= self.sources.get(tensor, frozenset())
        return found

    def depth_of(self, values: Any) -> int | None:
        """The depth of what was made of ``values``; ``None`` where no input went into them."""
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        return min((depth for t in tensors if (depth := self.depths.get(t)) is not None), default=None)

    def mark(self, values: Any, sources: frozenset[Source], depth: int | None = None) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self.sources[tensor] = sources
                if depth is not None:
                    self.depths[tensor] = depth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources, depth = self.of((args, kwargs)), self.depth_of((args, kwargs))
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name.endswith("_like") or name.startswith("new_"):
            sources, depth = frozenset(), None  # its shape, not its values
        elif _PARAMETER in sources and name in _MIXING:
            self.feed(sources)
            sources = frozenset({(WEIGHT, f"aten.{name}")})
        self.mark(out, sources, depth)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            base = getattr(value, "_base", None)
            if base is not None and argument.alias_info is not None and argument.alias_info.is_write:
                # record[t] = spikes: what the whole holds comes from there, too.
                self.mark(base, sources | self.of(base), self.depth_of((base, *args)))
        return out


def trace(model: nn.Module, hosts: Sequence[Host], sites: list[Site], example: Call) -> None:
    """Find the places by running a copy of the model, in eval mode and without gradient.

    Args:
        model: Any module.
        hosts: Whose neurons it has.
        sites: Its neurons, whose places are filled in.
        example: The call.

    Raises:
        ValueError: The model does not run on the example, or its copy cannot be made.
    """
    flow, fed, counts, depths = _Flow(), {}, {}, {}  # type: ignore[var-annotated]
    with trial(model, hosts) as twin, torch.no_grad():
        for name, module, found in walk(twin, hosts):
            kind = kind_of(module, found)
            if kind == OTHER:
                continue
            if found and found[1] == ("lif", ""):
                # QIF runs wherever the example is, unlike a LIF neuron that was set to a GPU's backend.
                with contextlib.suppress(ValueError):
                    rebuild(module, found[0], found[0].plan(module, _TRIAL, normalized=False))
            entering = {NEURON: _into_neuron(flow, name, fed, counts, depths), NORM: _into_norm(flow, name)}
            module.register_forward_pre_hook(entering.get(kind, _into_weight(flow)), with_kwargs=True)
            module.register_forward_hook(_out_of(flow, kind, name), with_kwargs=True)
        call = example.copied()
        flow.mark((call.args, dict(call.kwargs)), frozenset({_INPUT}), 0)
        try:
            with flow:
                out = call.run(twin)
        except Exception as error:
            raise ValueError(f"the model does not run on example_input: {type(error).__name__}: {error}") from error
        returned = flow.neurons(flow.of(out))
    # Hidden neurons may be returned, too, and a readout may feed itself. What feeds nothing and is not returned is read
    # as an attribute, or by a hook.
    last = fed.keys() - flow.feeding or returned
    for site in sites:
        site.norms = sorted(name for kind, name in fed.get(site.name, ()) if kind == NORM)
        site.weights = sorted(name for kind, name in fed.get(site.name, ()) if kind == WEIGHT)
        site.direct = sorted(name or kind for kind, name in fed.get(site.name, ()) if kind not in (NORM, WEIGHT))
        site.depth = depths.get(site.name, 0)
        site.sources = max(counts.get(site.name, 1), 1)
        site.norms_known = site.name in fed
        site.reads_out = site.name in last
        site.how = "data flow" if site.norms_known else "not reached by example_input"


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _into_neuron(
    flow: _Flow, name: str, fed: dict[str, set[Source]], counts: dict[str, int], depths: dict[str, int]
) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = args[:1] or list(kwargs.values())[:1]  # the others are its state
        sources = flow.of(current) - {_PARAMETER}
        fed.setdefault(name, set()).update(sources)
        counts[name] = max(counts.get(name, 0), len(sources))
        depth = flow.depth_of(current)
        flow.feed(sources)
        flow.within, flow.behind_neuron = name, None if depth is None else depth + 1
        if depth is not None:  # a neuron that is called again and again, by layers that share it, is as many in a row
            depths[name] = max(depths.get(name, 0), depth + 1)

    return hook


def _into_norm(flow: _Flow, name: str) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow.behind.setdefault(name, set()).update(flow.neurons(flow.of((args, kwargs))))

    return hook


def _into_weight(flow: _Flow) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow.feed(flow.of((args, kwargs)))

    return hook


def _out_of(flow: _Flow, kind: str, name: str) -> Callable[..., None]:
    sources = frozenset({(kind, name)})

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        depth = flow.behind_neuron if kind == NEURON else None
        flow.mark(out, sources, depth)
        if kind != NEURON:
            return
        flow.within, flow.behind_neuron = "", None
        # Its state, which is read by name in place of what it returns; not the input, should it have kept that.
        given = {id(value) for value in tree_leaves((args, kwargs))}
        state = {key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters")}
        flow.mark([value for value in tree_leaves(state) if id(value) not in given], sources, depth)

    return hook
