"""Where a model's neurons stand: what feeds each, and which of them read out.

Without an example input, the order in which the modules were registered stands for the order in which they run, as
it does in most models. With one, the model's copy runs on it and every tensor carries where it came from.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .hosts import Host, Neuron, Request
from .rebuild import rebuild

__all__ = ["Call", "Site", "Survey", "neurons", "survey"]

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, *filter(None, [getattr(nn, "RMSNorm", None)]))


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model.

    Attributes:
        args: The positional ones.
        kwargs: Those by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Site:
    """One neuron of a model.

    Attributes:
        name: Its first name in the model.
        module: The neuron.
        host: Its host.
        neuron: What the host says of it.
        norms: Names of the normalizations that feed it.
        norms_known: Whether it is known what feeds it.
        sources: Over how many paths its input comes, where that is known, else 1.
        reads_out: Whether it feeds the model's output, with no weight between.
        how: How ``norms`` and ``reads_out`` were recognised.
    """

    name: str
    module: nn.Module
    host: Host
    neuron: Neuron
    norms: list[str] = field(default_factory=list)
    norms_known: bool = True
    sources: int = 1
    reads_out: bool = False
    how: str = ""


@dataclass
class Survey:
    """The neurons of a model, in order, and how their places were found out.

    Attributes:
        sites: One for each neuron.
        norms: The normalizations, by name.
        blind: Why nothing can be said about the readout, if so.
        norms_blind: Why nothing can be said about what the normalizations feed, if so.
    """

    sites: list[Site]
    norms: dict[str, nn.Module]
    blind: str = ""
    norms_blind: str = ""


def neurons(model: nn.Module, hosts: Sequence[Host]) -> list[Site]:
    """Every neuron of the model once, those in plain Python lists, tuples and dicts of its modules included."""
    return [Site(name, module, host, neuron) for name, module, found in _walk(model, hosts) if found
            for host, neuron in [found]]  # fmt: skip


def survey(model: nn.Module, hosts: Sequence[Host], example_input: Any = None) -> Survey:
    """Find the neurons and their places.

    Args:
        model: Any module.
        hosts: Whose neurons to look for.
        example_input: The model's argument, a tuple of them, or a :class:`Call`; ``None`` to go by the registration
            order.

    Raises:
        ValueError: The model does not run on the example input, or its copy cannot be made.
    """
    sites = neurons(model, hosts)
    norms = {name: m for name, m, found in _walk(model, hosts) if not found and isinstance(m, NORMS)}
    if len(sites) == 1 and sites[0].module is model:
        sites[0].how = "the model is the neuron"
        return Survey(sites, norms)
    if example_input is not None:
        _trace(model, hosts, sites, example_input)
        return Survey(sites, norms)
    return Survey(sites, norms, *_by_order(model, hosts, sites))


# -- registration order -----------------------------------------------------------------------------------------------

NEURON, NORM, WEIGHT, OTHER = "neuron", "norm", "weight", "other"


def _by_order(model: nn.Module, hosts: Sequence[Host], sites: list[Site]) -> tuple[str, str]:
    """Places by registration order; returns why it says nothing about the readout, and about the norms, if so."""
    line = [(name, _kind(module, found)) for name, module, found in _walk(model, hosts)]
    line = [(name, kind) for name, kind in line if kind != OTHER]
    kinds = "".join({NEURON: "n", NORM: "b", WEIGHT: "w"}[kind] for _, kind in line)
    for site in sites:
        site.how = "registration order"
    if any("[" in site.name for site in sites):
        blind = (
            "neurons in plain Python lists or dicts are not registered, so the order does not tell which one reads out"
        )
        fed = None
    else:
        blind = _blind_readout(kinds)
        fed = _fed_by_order(line)
    if "b" in kinds and fed is None:
        for site in sites:
            site.norms_known = False
        norms_blind = "the registration order does not tell which normalization feeds which neuron"
    else:
        norms_blind = ""
        for site in sites:
            site.norms = (fed or {}).get(site.name, [])
    if not blind and kinds.endswith(("n", "nb")):
        last = next(name for name, kind in reversed(line) if kind == NEURON)
        next(site for site in sites if site.name == last).reads_out = True
    return blind, norms_blind


def _blind_readout(kinds: str) -> str:
    if kinds.count("n") > 1 and "w" in kinds and kinds.rstrip("wb").find("w") < 0:
        return (
            "every neuron is registered before every weight, so the registration order does not tell which one reads "
            "out"
        )
    grouped = re.search(r"([wb]+)(nn+)b?$", kinds)
    if grouped and "w" in grouped[1] and grouped[1].count("w") != len(grouped[2]):
        return "modules are registered by kind, so the registration order does not tell which neuron reads out"
    return ""


def _fed_by_order(line: Sequence[tuple[str, str]]) -> dict[str, list[str]] | None:
    """Neuron -> norms, where a weight parts every two neurons or a run of neurons follows as many norms; else None."""
    fed: dict[str, list[str]] = {}
    runs = [(is_run, list(group)) for is_run, group in itertools.groupby(line, lambda item: item[1] == NEURON)]
    before: list[tuple[str, str]] = []
    for is_run, group in runs:
        if not is_run:
            before = group
            continue
        norms = [name for name, kind in before if kind == NORM]
        weights = len(before) - len(norms)
        if len(group) == len(norms) > 1:  # grouped by kind: the i-th norm feeds the i-th neuron
            fed.update({name: [norm] for (name, _), norm in zip(group, norms, strict=True)})
        elif len(group) > 1 or not before or (not weights and fed):
            return None
        else:
            fed[group[0][0]] = [before[-1][0]] if before[-1][1] == NORM else []
    return fed


def _kind(module: nn.Module, found: tuple[Host, Neuron] | None) -> str:
    if found:
        return NEURON
    if isinstance(module, NORMS):
        return NORM
    is_leaf = next(module.children(), None) is None
    return WEIGHT if is_leaf and next(module.parameters(), None) is not None else OTHER


def _walk(model: nn.Module, hosts: Sequence[Host]) -> Iterator[tuple[str, nn.Module, tuple[Host, Neuron] | None]]:
    """Modules once each, in registration order, nothing inside a neuron."""
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> Iterator[Any]:
        if id(module) in seen:
            return
        seen.add(id(module))
        found = next(((host, neuron) for host in hosts if (neuron := host.neuron(module)) is not None), None)
        yield name, module, found
        if found:
            return
        for child, submodule in module._modules.items():
            if submodule is not None:
                yield from visit(f"{name}.{child}".lstrip("."), submodule)
        for attribute, value in vars(module).items():
            if isinstance(value, list | tuple | dict) and not attribute.startswith("_"):
                yield from inside(f"{name}.{attribute}".lstrip("."), value)

    def inside(name: str, container: Any) -> Iterator[Any]:
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if isinstance(value, nn.Module):
                yield from visit(f"{name}[{key!r}]", value)
            elif isinstance(value, list | tuple | dict):
                yield from inside(f"{name}[{key!r}]", value)

    return visit("", model)


# -- data flow --------------------------------------------------------------------------------------------------------

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
        feeding: The neurons that feed a weight or another neuron.
        within: The neuron that is running, whose own recurrence says nothing about its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()
        self.feeding: set[str] = set()
        self.within = ""

    def feed(self, sources: frozenset[Source]) -> None:
        if not self.within:
            self.feeding |= {name for kind, name in sources if kind == NEURON}

    def of(self, values: Any) -> frozenset[Source]:
        found: frozenset[Source] = frozenset()
        for tensor in tree_leaves(values):
            if isinstance(tensor, nn.Parameter):
                found |= {_PARAMETER}
            elif isinstance(tensor, Tensor):
                found |= self.sources.get(tensor, frozenset())
        return found

    def mark(self, values: Any, sources: frozenset[Source]) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self.sources[tensor] = sources

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = self.of((args, kwargs))
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name.endswith("_like") or name.startswith("new_"):
            sources = frozenset()  # its shape, not its values
        elif _PARAMETER in sources and name in _MIXING:
            self.feed(sources)
            sources = frozenset({(WEIGHT, name)})
        self.mark(out, sources)
        return out


def _trace(model: nn.Module, hosts: Sequence[Host], sites: list[Site], example_input: Any) -> None:
    """Places by running a copy of the model, in eval mode and without gradient."""
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    call = example_input if isinstance(example_input, Call) else Call(arguments)
    with contextlib.ExitStack() as stack:
        for host in hosts:
            stack.enter_context(host.apart())
        twin = _copy(model)
        flow, fed, counts = _Flow(), {}, {}  # type: ignore[var-annotated]
        handles = []
        for name, module, found in _walk(twin, hosts):
            kind = _kind(module, found)
            if kind == OTHER:
                continue
            if kind == NEURON:
                # QIF runs wherever the example is, unlike a LIF neuron that was set to a GPU's backend.
                with contextlib.suppress(ValueError):
                    if found and found[1].role == "lif":
                        rebuild(module, found[0], found[0].plan(module, _TRIAL, normalized=False))
                handles.append(module.register_forward_pre_hook(_entering(flow, name, fed, counts)))
            elif kind == WEIGHT:
                handles.append(module.register_forward_pre_hook(lambda module, args: flow.feed(flow.of(args))))
            handles.append(module.register_forward_hook(_leaving(flow, frozenset({(kind, name)}))))
        flow.mark((call.args, dict(call.kwargs)), frozenset({_INPUT}))
        try:
            with torch.no_grad(), flow:
                out = twin.eval()(*call.args, **call.kwargs)
        except Exception as error:
            raise ValueError(f"the model does not run on example_input: {type(error).__name__}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
        last = {name for kind, name in flow.of(out) if kind == NEURON}
    last = last - flow.feeding or last  # hidden neurons may be returned, too
    for site in sites:
        site.norms = sorted(name for kind, name in fed.get(site.name, ()) if kind == NORM)
        site.sources = max(counts.get(site.name, 1), 1)
        site.reads_out = site.name in last
        site.norms_known = site.name in fed
        site.how = "data flow" if site.norms_known else "not reached by example_input"


def _copy(model: nn.Module) -> nn.Module:
    # States that a forward pass left behind have a graph, which deepcopy refuses; the copy gets them without.
    states = [t for m in model.modules() for t in tree_leaves(dict(vars(m))) if isinstance(t, Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(model, {id(state): state.detach().clone() for state in states})
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied to follow example_input through it: {type(error).__name__}: {error}. Leave "
            "example_input out to go by the order of registration."
        ) from error


def _entering(flow: _Flow, name: str, fed: dict[str, set[Source]], counts: dict[str, int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        sources = flow.of(args[:1]) - {_PARAMETER}
        fed.setdefault(name, set()).update(sources)
        counts[name] = max(counts.get(name, 0), len(sources))
        flow.feed(sources)
        flow.within = name

    return hook


def _leaving(flow: _Flow, sources: frozenset[Source]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        flow.mark(out, sources)
        flow.within = "" if any(kind == NEURON for kind, _ in sources) else flow.within

    return hook
