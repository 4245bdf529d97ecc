"""Where a model's neurons stand, by data flow: its copy runs on an example, and every tensor carries its origin."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .hosts import Host, Request
from .rebuild import rebuild
from .walk import NEURON, NORM, OTHER, WEIGHT, Site, kind_of, walk

__all__ = ["Call", "on_trial", "trace"]

_TRIAL = Request("lif", parameters={"backend": "auto"})
_PARAMETER = ("parameter", "")
_INPUT = ("input", "")
_MIXING = {
    "addmm", "mm", "bmm", "baddbmm", "addmv", "mv", "addbmm", "linear", "convolution", "_convolution", "embedding",
    "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution", "einsum", "dot", "_int_mm",
}  # fmt: skip
"""Operators that are a weight layer where one of their arguments is a parameter."""

Source = tuple[str, str]

STEPS, NEURONS = 64, 4096
"""How much is kept of what arrives at a neuron, at most."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model.

    Attributes:
        args: The positional ones.
        kwargs: Those by name.
        drive: Runs the model in its own way in place of a call with these arguments; ``None`` (default) calls it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    drive: Callable[[nn.Module], Any] | None = None

    @staticmethod
    def of(example: Any, model: nn.Module) -> Call:
        """What a user gives as ``example_input``: a Call, a tuple of arguments, a dict by name, or one argument."""
        if isinstance(example, Call):
            return example
        if isinstance(example, tuple):
            return Call(example)
        if isinstance(example, Mapping) and example and example.keys() <= _named(model):
            return Call((), example)
        return Call((example,))


def _named(model: nn.Module) -> set[str]:
    """Names that ``model`` takes arguments by, so that a dict that is itself the argument is not taken apart."""
    return {name for name, p in inspect.signature(model.forward).parameters.items() if p.kind is not p.VAR_KEYWORD}


class _Flow(TorchDispatchMode):
    """Every tensor's sources: the neurons, norms and weight layers that it was made from without another between.

    Attributes:
        feeding: The neurons that feed a weight or another neuron.
        behind: Norm -> the neurons that feed it, with no weight between.
        within: The neuron that is running, whose own recurrence says nothing about its place.
        generators: The generators that were drawn from, and their states before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()
        self.feeding: set[str] = set()
        self.behind: dict[str, set[str]] = {}
        self.within = ""
        self.generators: dict[torch.Generator, Tensor] = {}

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

    def mark(self, values: Any, sources: frozenset[Source]) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self.sources[tensor] = sources

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sources = self.of((args, kwargs))
        generator = kwargs.get("generator")
        if generator is not None and generator not in self.generators:
            self.generators[generator] = generator.get_state()
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name.endswith("_like") or name.startswith("new_"):
            sources = frozenset()  # its shape, not its values
        elif _PARAMETER in sources and name in _MIXING:
            self.feed(sources)
            sources = frozenset({(WEIGHT, f"aten.{name}")})
        self.mark(out, sources)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            base = getattr(value, "_base", None)
            if base is not None and argument.alias_info is not None and argument.alias_info.is_write:
                # record[t] = spikes: what the whole holds comes from there, too.
                self.mark(base, sources | self.of(base))
        return out


def trace(model: nn.Module, hosts: Sequence[Host], sites: list[Site], example: Any) -> None:
    """Places by running a copy of the model, in eval mode and without gradient.

    Args:
        model: Any module.
        hosts: Whose neurons it has.
        sites: Its neurons, whose places are filled in.
        example: See :meth:`Call.of`.

    Raises:
        ValueError: The model does not run on the example, or its copy cannot be made.
    """
    call = Call.of(example, model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_trial())
        for host in hosts:
            stack.enter_context(host.apart())
        twin = _copy(model)
        flow, fed, counts = _Flow(), {}, {}  # type: ignore[var-annotated]
        places = {site.name: site for site in sites}
        handles: list[Any] = []
        for name, module, found in walk(twin, hosts):
            kind = kind_of(module, found)
            if kind == OTHER:
                continue
            entering = {NEURON: _into_neuron(flow, name, fed, counts), NORM: _into_norm(flow, name)}
            if found:
                handles.append(module.register_forward_pre_hook(_recording(places[name]), with_kwargs=True))
            if found and found[1] == ("lif", ""):
                # QIF runs wherever the example is, unlike a LIF neuron that was set to a GPU's backend.
                with contextlib.suppress(ValueError):
                    rebuild(module, found[0], found[0].plan(module, _TRIAL, normalized=False))
            handles.append(module.register_forward_pre_hook(entering.get(kind, _into_weight(flow)), with_kwargs=True))
            handles.append(module.register_forward_hook(_out_of(flow, kind, name), with_kwargs=True))
        flow.mark((call.args, dict(call.kwargs)), frozenset({_INPUT}))
        try:
            with torch.no_grad(), flow:
                twin.eval()
                out = call.drive(twin) if call.drive else twin(*call.args, **call.kwargs)
        except Exception as error:
            raise ValueError(f"the model does not run on example_input: {type(error).__name__}: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
            for generator, state in flow.generators.items():
                generator.set_state(state)
        returned = flow.neurons(flow.of(out))
    # Hidden neurons may be returned, too, and a readout may feed itself. What feeds nothing and is not returned is read
    # as an attribute, or by a hook.
    last = fed.keys() - flow.feeding or returned
    for site in sites:
        site.norms = sorted(name for kind, name in fed.get(site.name, ()) if kind == NORM)
        site.weights = sorted(name for kind, name in fed.get(site.name, ()) if kind == WEIGHT)
        site.direct = sorted(name or kind for kind, name in fed.get(site.name, ()) if kind not in (NORM, WEIGHT))
        site.sources = max(counts.get(site.name, 1), 1)
        site.norms_known = site.name in fed
        site.reads_out = site.name in last
        site.how = "data flow" if site.norms_known else "not reached by example_input"


_ON_TRIAL = contextvars.ContextVar("on_trial", default=False)


def on_trial() -> bool:
    """Whether what runs now is a copy of a model, for the sake of its data flow."""
    return _ON_TRIAL.get()


@contextlib.contextmanager
def _trial() -> Iterator[None]:
    token = _ON_TRIAL.set(True)
    try:
        yield
    finally:
        _ON_TRIAL.reset(token)


def _copy(model: nn.Module) -> nn.Module:
    # States that a forward pass left behind have a graph, which deepcopy refuses; the copy gets them without.
    states = [t for m in model.modules() for t in tree_leaves(dict(vars(m))) if isinstance(t, Tensor) and not t.is_leaf]
    try:
        with _without_hooks(model):
            return copy.deepcopy(model, {id(state): state.detach().clone() for state in states})
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied to follow example_input through it: {type(error).__name__}: {error}. Leave "
            "example_input out to go by the order of registration."
        ) from error


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """A copy made inside has PyTorch's own hooks (weight norms) only: monitors are not to record its run."""
    attached = [
        (vars(module), kind, vars(module)[kind])
        for module in model.modules()
        for kind in ("_forward_pre_hooks", "_forward_hooks")
    ]
    try:
        for attributes, kind, hooks in attached:
            attributes[kind] = type(hooks)((key, hook) for key, hook in hooks.items() if _of_torch(hook))
        yield
    finally:
        for attributes, kind, hooks in attached:
            attributes[kind] = hooks


def _of_torch(hook: Any) -> bool:
    # An object, such as that of a weight norm, has its class's module.
    return str(getattr(hook, "__module__", "")).split(".")[0] == "torch"


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _into_neuron(flow: _Flow, name: str, fed: dict[str, set[Source]], counts: dict[str, int]) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = args[:1] or list(kwargs.values())[:1]  # the others are its state
        sources = flow.of(current) - {_PARAMETER}
        fed.setdefault(name, set()).update(sources)
        counts[name] = max(counts.get(name, 0), len(sources))
        flow.feed(sources)
        flow.within = name

    return hook


def _recording(site: Site) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = next(iter((*args, *kwargs.values())), None)
        if not isinstance(current, Tensor) or current.is_meta or not current.numel():
            return
        steps = current if site.host.takes_sequences(module) else current[None]
        room = STEPS - len(site.currents)
        if room <= 0:
            return
        part = steps[:room].reshape(len(steps[:room]), -1)
        site.currents += part[:, :: -(-part.shape[1] // NEURONS)].to("cpu", torch.float32)

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
        flow.mark(out, sources)
        if kind != NEURON:
            return
        flow.within = ""
        # Its state, which is read by name in place of what it returns; not the input, should it have kept that.
        given = {id(value) for value in tree_leaves((args, kwargs))}
        state = {key: value for key, value in vars(module).items() if key not in ("_modules", "_parameters")}
        flow.mark([value for value in tree_leaves(state) if id(value) not in given], sources)

    return hook
