"""Walk through a model's neurons, norms and weight layers in the order in which they were registered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .hosts import Host, Neuron

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, *filter(None, [getattr(nn, "RMSNorm", None)]))

NEURON, NORM, WEIGHT, OTHER = "neuron", "norm", "weight", "other"

Found = tuple[Host, Neuron]


@dataclass
class Site:
    """One neuron of a model.

    Attributes:
        name: Its first name in the model.
        module: The neuron.
        host: Its host.
        neuron: Its kind.
        norms: Names of the normalizations that feed it.
        norms_known: Whether it is known which modules feed it.
        weights: Names of the weight layers that feed it with no norm between; for a parameter that a function uses,
            ``aten.`` and the operator's name. Found by data flow only.
        direct: Names of the neurons that feed it with no weight or norm between, and ``"input"`` for the model's input.
            Found by data flow only.
        depth: Number of neurons in a row from the model's input up to and including this one, on the path with the
            fewest neurons, such as one through shortcuts; 0 if it is unknown. Paths through a mask do not count. If
            the path goes through a neuron several times, each call counts for a neuron that takes sequences. For one
            that takes one time step per call, each different set of layers that feed it counts, because its calls on
            its own output are steps in time.
        sources: Number of paths that add up to its input; 1 if it is unknown.
        reads_out: Whether it feeds the model's output with no weight between, or feeds nothing, so that only its state
            can be read.
        how: The way in which ``norms`` and ``reads_out`` were found.
        guess: Whether they were guessed, because modules need not run in the order in which they were registered.
    """

    name: str
    module: nn.Module
    host: Host
    neuron: Neuron
    norms: list[str] = field(default_factory=list)
    norms_known: bool = True
    weights: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)
    depth: int = 0
    sources: int = 1
    reads_out: bool = False
    how: str = ""
    guess: bool = False


def neurons(model: nn.Module, hosts: Sequence[Host]) -> list[Site]:
    """Find every neuron of the model once, also in plain Python lists, tuples and dicts of its modules."""
    return [Site(name, module, *found) for name, module, found in walk(model, hosts) if found]


def kind_of(module: nn.Module, found: Found | None) -> str:
    """Return whether a module is a neuron, a norm, a weight layer or none of these.

    Args:
        module: The module.
        found: Its host and kind as :func:`walk` yields them; ``None`` if it is no neuron.
    """
    if found:
        return NEURON
    if isinstance(module, NORMS):
        return NORM
    is_leaf = next(module.children(), None) is None
    return WEIGHT if is_leaf and next(module.parameters(), None) is not None else OTHER


def walk(model: nn.Module, hosts: Sequence[Host]) -> Iterator[tuple[str, nn.Module, Found | None]]:
    """Yield every module once, in registration order, without the modules inside a neuron."""
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
