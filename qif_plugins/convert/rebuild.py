"""Changing a neuron's class in place, and back.

The object stays, so that whatever refers to it still does: parents that share it, lists, optimizers and wrappers that
hold its parameters. It keeps its training mode, hooks, parameters, buffers and children.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .hosts import Host, Neuron, Plan

__all__ = ["Bound", "Replaced", "classify", "own_code", "rebuild", "replaced", "resolve", "restore"]

_HELD = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_GENERIC = frozenset(vars(nn.Module())) - _HELD
"""What every module has besides: training mode and hooks."""
_RECORD = "_replaced"

HARMLESS = {
    "__init__", "extra_repr", "__repr__", "__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__",
}  # fmt: skip
"""What a subclass may define without having code that a swap would lose."""


def own_code(module: nn.Module, known: type[Any]) -> list[str]:
    """What ``module`` does otherwise than the class ``known`` that it extends: methods of a subclass or of its own."""
    mro = type(module).__mro__
    names = {name for cls in mro[: mro.index(known)] for name in vars(cls)} - HARMLESS
    patched = {name for name in vars(module) if inspect.isroutine(getattr(known, name, None))}
    return sorted(names | patched)


def classify(module: nn.Module, known: type[Any] | None, neurons: tuple[type[Any], ...]) -> Neuron | None:
    """What a module that is none of ours is; ``None`` for one that is no neuron.

    Args:
        module: The module.
        known: The class of the host's LIF family that it extends, if any.
        neurons: The classes of all neurons of the host.
    """
    if known is None:
        return Neuron("other", "another neuron model") if isinstance(module, neurons) else None
    code = own_code(module, known)
    if code:
        return Neuron(
            "other",
            f"has code of its own ({', '.join(code)}), which a swap would lose; for QIF derive its class from the QIF "
            f"class of qif_plugins.adapters in place of {known.__name__}, or put such a neuron there by hand",
        )
    return Neuron("lif")


class Bound:
    """Stands for a method of the module itself among its recorded attributes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def resolve(self, module: nn.Module) -> Any:
        """The attribute's value on ``module``."""
        return getattr(module, self.name)


class Replaced:
    """What a neuron was. It is an attribute of the neuron that it became, and copies and pickles with it.

    Parameters, buffers and children stay with the module, except those that the new class has in their place.
    """

    def __init__(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        self.cls: type[Any] = type(module)
        self.attributes = {
            name: Bound(value.__name__) if inspect.ismethod(value) and value.__self__ is module else value
            for name, value in attributes.items()
        }
        self.parameters = list(module._parameters)
        self.buffers = list(module._buffers)
        self.non_persistent = set(module._non_persistent_buffers_set)
        self.children = list(module._modules)
        self.own_buffers: dict[str, Tensor] = {}
        self.own_children: dict[str, nn.Module | None] = {}
        self.idle: list[str] = []
        self.became: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if "<locals>" not in self.cls.__qualname__:
            # By name: under `qif run` another class stands at that name, which pickle would object to.
            state["cls"] = (self.cls.__module__, self.cls.__qualname__)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["cls"], tuple):
            self.cls = resolve(*state["cls"])


def resolve(module: str, qualname: str) -> type[Any]:
    """The class of that name, even where ``qif run`` has another stand for it."""
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return vars(found).get("stands_for", found)


def replaced(module: nn.Module) -> Replaced | None:
    """What ``module`` was before :func:`rebuild`, if it went through it."""
    return vars(module).get(_RECORD)


def rebuild(module: nn.Module, host: Host, plan: Plan) -> Callable[[], None]:
    """Make a QIF neuron of ``module``.

    Returns:
        A function that undoes it. After an error it is undone already.
    """
    before, undo = dict(vars(module)), _undoing(module)
    at_rest, extra = host.snapshot(module)
    record = Replaced(module, {k: v for k, v in at_rest.items() if k not in _GENERIC and k not in _HELD})
    vars(module).clear()
    try:
        host.construct(module, plan)
        _take_over(module, before, plan, record)
        vars(module).update({name: value for name, value in extra.items() if name not in vars(module)})
        vars(module).update({name: before[name] for name in _GENERIC if name in before})
        vars(module).update(plan.attributes, **{_RECORD: record})
        host.settle(module)
        record.became = frozenset(vars(module))
    except BaseException:
        undo()
        raise
    return undo


def restore(module: nn.Module) -> Callable[[], None]:
    """Make ``module`` what it was before :func:`rebuild`, with its present tensors, hooks and training mode.

    Returns:
        A function that undoes it.
    """
    before, undo = dict(vars(module)), _undoing(module)
    record: Replaced = before[_RECORD]
    tensors = {**before["_buffers"], **before["_parameters"]}
    object.__setattr__(module, "__class__", record.cls)
    own = {name: _like(value, tensors.get(name)) for name, value in record.own_buffers.items()}
    vars(module).clear()
    vars(module).update({name: before[name] for name in _GENERIC if name in before})
    vars(module).update(
        _parameters={name: tensors[name] for name in record.parameters},
        _buffers={name: own.get(name, tensors.get(name)) for name in record.buffers},
        _modules={name: record.own_children.get(name, before["_modules"].get(name)) for name in record.children},
        _non_persistent_buffers_set=record.non_persistent,
    )
    for name, value in record.attributes.items():
        vars(module)[name] = value.resolve(module) if hasattr(value, "resolve") else value
    since = {name: v for name, v in before.items() if name not in record.became and not name.startswith("_")}
    vars(module).update(since)
    for name in record.idle:
        module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]
    return undo


def _take_over(module: nn.Module, before: dict[str, Any], plan: Plan, record: Replaced) -> None:
    """Parameters, buffers and children that the neuron had, in the places of those that its constructor made."""
    tensors: dict[str, Tensor | None] = {**before["_buffers"], **before["_parameters"]}
    some = next((t for t in tensors.values() if t is not None), None)
    transient = record.non_persistent | module._non_persistent_buffers_set
    for name in [*module._parameters, *module._buffers]:
        kind = module._parameters if name in module._parameters else module._buffers
        if name not in tensors or name in plan.own or name in transient:
            kind[name] = _like(kind[name], tensors.get(name, some))  # type: ignore[assignment]
        else:
            del kind[name]
    for name, tensor in tensors.items():
        if name in transient or name in plan.own:
            value = None if tensor is None else tensor.detach().clone() if name in plan.own else tensor.new_zeros(0)
            record.own_buffers[name] = value  # type: ignore[assignment]
        elif name in before["_parameters"]:
            module._parameters[name] = tensor  # type: ignore[assignment]
        else:
            module._buffers[name] = tensor
    for name in plan.idle:
        parameter = module._parameters[name]
        if parameter is not None and parameter.requires_grad:
            parameter.requires_grad_(False)
            record.idle.append(name)
    for made in module._modules.values():
        if made is not None:
            made.train(before["training"])
    for name, child in before["_modules"].items():
        if name in module._modules:
            record.own_children[name] = child
        else:
            module._modules[name] = child


def _like(value: Tensor | None, other: Tensor | None) -> Tensor | None:
    """``value`` on the device of ``other``."""
    if value is None or other is None or value.device == other.device:
        return value
    moved = value.to(other.device)
    return nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved


def _undoing(module: nn.Module) -> Callable[[], None]:
    cls, attributes = type(module), dict(vars(module))
    held = {name: attributes[name].copy() for name in _HELD}
    wants_grad = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]

    def undo() -> None:
        object.__setattr__(module, "__class__", cls)
        vars(module).clear()
        vars(module).update(attributes, **held)
        for parameter, flag in wants_grad:
            parameter.requires_grad_(flag)

    return undo
