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
        norms_known: Whether it is known what feeds it.
        weights: Names of the weight layers that feed it with no norm between; ``aten.`` and an operator's name for a
            parameter that a function uses. Known by data flow only, as is ``direct``.
        direct: Names of the neurons that feed it with no weight or norm between, and ``"input"`` for the model's input.
        depth: Number of neurons in a row from the model's input to its output, itself included, over the way with the
            fewest of them, such as that through shortcuts; 0 where that is not known. A way through a mask does not
            count. A neuron that takes sequences counts once for each call in that row. One that takes one time step a
            call counts once for each set of layers that feed it, as its calls on its own output are steps in time.
        sources: Number of paths that its input comes over, where that is known, else 1.
        reads_out: Whether it feeds the model's output, with no weight between, or nothing at all, so that only its
            state can be what is read.
        how: The way in which ``norms`` and ``reads_out`` were found.
        guess: Whether they were guessed, since modules need not run in the order in which they were registered.
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
    """Tell a neuron, norm or weight layer from other modules; ``found`` is what :func:`walk` yields with it."""
    if found:
        return NEURON
    if isinstance(module, NORMS):
        return NORM
    is_leaf = next(module.children(), None) is None
    return WEIGHT if is_leaf and next(module.parameters(), None) is not None else OTHER


def walk(model: nn.Module, hosts: Sequence[Host]) -> Iterator[tuple[str, nn.Module, Found | None]]:
    """Yield every module once, in registration order, but nothing inside a neuron."""
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
