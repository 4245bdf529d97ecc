"""Change a neuron's class in place, and back.

The object stays the same, so that everything that refers to it still does: parents that share it, lists, optimizers and
wrappers that hold its parameters. It keeps its training mode, hooks, parameters, buffers and children.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .hosts import Host, Neuron, Plan

_HELD = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_GENERIC = frozenset(vars(nn.Module())) - _HELD
"""The other attributes of every module, such as training mode and hooks."""
_RECORD = "_replaced"

HARMLESS = {
    "__init__", "extra_repr", "__repr__", "__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__dict__", "__weakref__",
    "stands_for",
}  # fmt: skip
"""Attributes that a subclass may define and still be swapped, since they are no code that a swap would lose. The last
one marks the classes of ``qif run``."""


def extended(cls: type[Any], classes: Iterable[type[Any]]) -> type[Any] | None:
    """Return the nearest of ``classes`` that ``cls`` is or extends; ``None`` if there is none."""
    # By identity: the class that `qif run` puts in the place of a host's class compares equal to it.
    return next((known for base in cls.__mro__ for known in classes if base is known), None)


def own_code(module: nn.Module, known: type[Any]) -> list[str]:
    """Name the methods of ``module``, defined by its class or set on itself, that differ from those of ``known``."""
    mro = type(module).__mro__
    names = {name for cls in mro[: mro.index(known)] for name in vars(cls)} - HARMLESS
    patched = {name for name in vars(module) if inspect.isroutine(getattr(known, name, None))}
    return sorted(names | patched)


def classify(module: nn.Module, known: type[Any] | None, neurons: tuple[type[Any], ...]) -> Neuron | None:
    """Classify a module of a host; ``None`` for one that is no neuron.

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
            f"class of qif_plugins.adapters instead of {known.__name__}, or replace the neuron by hand",
        )
    return Neuron("lif")


class Bound:
    """Placeholder for a method of the module itself among its recorded attributes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def resolve(self, module: nn.Module) -> Any:
        """Return the method of ``module``."""
        return getattr(module, self.name)


class Replaced:
    """Record of a neuron before :func:`rebuild`; an attribute of the new neuron, copied and pickled with it.

    The module keeps its parameters, buffers and children, except those that the new class replaces by its own.
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
        self.made: frozenset[str] = frozenset()
        self.settings: dict[str, Any] = {}
        self.own_tensors: dict[str, Tensor | None] = {}

    def became(self, module: nn.Module, plan: Plan, extra: Collection[str]) -> None:
        """Note the settings of the new neuron. A setting that differs later was changed by the user.

        Args:
            module: The QIF neuron.
            plan: How it was made.
            extra: Names of the attributes that no constructor sets.
        """
        self.made = frozenset([*vars(module), *module._parameters, *module._buffers, *module._modules])
        names = {_public(self.cls, name) for name in [*self.attributes, *self.own_children]}
        kept = {*extra, *plan.attributes}
        self.settings = {
            name: _setting(module, name)
            for name in names
            if (not name.startswith("_") or name in kept) and _has(module, name)
        }
        held = {**module._buffers, **module._parameters}
        self.own_tensors = {name: _copied(held.get(name)) for name in plan.own if name in self.own_buffers}

    def changes(self, module: nn.Module) -> dict[str, Any]:
        """Return the settings that were changed since on the QIF neuron and that the original neuron has as well."""
        return {
            name: getattr(module, name)
            for name, then in self.settings.items()
            if _has(module, name) and not _same(_setting(module, name), then)
        }

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if "<locals>" not in self.cls.__qualname__:
            # By name: under `qif run` that name refers to another class, so pickle would refuse.
            state["cls"] = (self.cls.__module__, self.cls.__qualname__)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["cls"], tuple):
            self.cls = resolve(*state["cls"])


def resolve(module: str, qualname: str) -> type[Any]:
    """Return the class of that name, even if ``qif run`` has put another in its place."""
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return vars(found).get("stands_for", found)


def replaced(module: nn.Module) -> Replaced | None:
    """Return the record of ``module`` before :func:`rebuild`; ``None`` if it was not rebuilt."""
    return vars(module).get(_RECORD)


def rebuild(module: nn.Module, host: Host, plan: Plan, remember: bool = True) -> Callable[[], None]:
    """Turn ``module`` into the neuron that ``plan`` describes. After an error the module is unchanged.

    Args:
        module: A neuron.
        host: Its host.
        plan: The new neuron.
        remember: Whether the module keeps a record of its old class and attributes, for :func:`restore`. Default True.

    Returns:
        A function that undoes the change.
    """
    before, undo = dict(vars(module)), undoing(module)
    at_rest, extra = host.snapshot(module)
    record = Replaced(module, {k: v for k, v in at_rest.items() if k not in _GENERIC and k not in _HELD})
    vars(module).clear()
    try:
        host.construct(module, plan)
        _take_over(module, before, plan, record)
        vars(module).update({name: value for name, value in extra.items() if name not in vars(module)})
        vars(module).update({name: before[name] for name in _GENERIC if name in before})
        vars(module).update(plan.attributes)
        if remember:
            vars(module)[_RECORD] = record
        host.update_derived(module)
        if remember:
            record.became(module, plan, extra)
    except BaseException:
        undo()
        raise
    return undo


def restore(module: nn.Module, host: Host) -> None:
    """Turn ``module`` back into the neuron that it was before :func:`rebuild`.

    Changes that were made since on the QIF neuron stay, if the original neuron has the same attribute: settings,
    surrogate, parameters, buffers, children, the user's own attributes, hooks and training mode. Attributes that only
    a QIF neuron has, such as the map and the window, are dropped. A setting that :func:`rebuild` chose, such as the
    reset, returns to its old value unless it was changed since. The membrane starts at rest.
    """
    before = dict(vars(module))
    record: Replaced = before[_RECORD]
    changes = record.changes(module)
    made_since = {name for kind in ("_parameters", "_buffers", "_modules") for name in before[kind]} - record.made
    tensors = {**before["_buffers"], **before["_parameters"]}
    own = {
        name: _like(value, tensors.get(name))
        for name, value in record.own_buffers.items()
        if name not in record.own_tensors or _equal(tensors.get(name), record.own_tensors[name])
    }
    private = {name for name in before if name.startswith("_") and hasattr(type(module), name)}
    object.__setattr__(module, "__class__", record.cls)
    vars(module).clear()
    vars(module).update({name: before[name] for name in _GENERIC if name in before})
    names = [*record.parameters, *record.buffers]
    names += [name for name in tensors if name in made_since]
    values = {name: own.get(name, tensors.get(name)) for name in names}
    parameters = {n for n, v in values.items() if isinstance(v, nn.Parameter) or (v is None and n in record.parameters)}
    children = {name: record.own_children.get(name, before["_modules"].get(name)) for name in record.children}
    children |= {name: child for name, child in before["_modules"].items() if name in made_since}
    vars(module).update(
        _parameters={name: value for name, value in values.items() if name in parameters},
        _buffers={name: value for name, value in values.items() if name not in parameters},
        _modules=children,
        _non_persistent_buffers_set=record.non_persistent | (before["_non_persistent_buffers_set"] & made_since),
    )
    for name, value in record.attributes.items():
        if name not in values and name not in children:
            vars(module)[name] = value.resolve(module) if hasattr(value, "resolve") else value
    vars(module).update({n: v for n, v in before.items() if n not in record.made | private | changes.keys()})
    for name in record.idle:
        if (parameter := module._parameters.get(name)) is not None:
            parameter.requires_grad_(True)
    host.assign(module, changes)


def _take_over(module: nn.Module, before: dict[str, Any], plan: Plan, record: Replaced) -> None:
    """Replace the parameters, buffers and children that the new constructor made by those of the neuron."""
    tensors: dict[str, Tensor | None] = {**before["_buffers"], **before["_parameters"]}
    some = next((t for t in tensors.values() if t is not None), None)
    names = [*module._parameters, *module._buffers]
    transient = (record.non_persistent | module._non_persistent_buffers_set) & {*names}
    for name in names:
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
            if name in record.non_persistent:
                module._non_persistent_buffers_set.add(name)
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
    """Move ``value`` to the device of ``other``."""
    if value is None or other is None or value.device == other.device:
        return value
    moved = value.to(other.device)
    return nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved


def _public(cls: type[Any], name: str) -> str:
    """Return the name by which users set the attribute ``name``: that of its property, if there is one."""
    return name[1:] if name.startswith("_") and isinstance(getattr(cls, name[1:], None), property) else name


def _has(module: nn.Module, name: str) -> bool:
    return f"_{name}" in vars(module) or hasattr(module, name)


def _setting(module: nn.Module, name: str) -> Any:
    """Return the value that was set as ``name``, not what a property makes of it."""
    return vars(module)[f"_{name}"] if f"_{name}" in vars(module) else getattr(module, name)


def _same(now: Any, then: Any) -> bool:
    if now is then or isinstance(now, Tensor) or isinstance(then, Tensor):
        return now is then
    try:
        return type(now) is type(then) and bool(now == then)
    except (TypeError, ValueError, RuntimeError):  # values that compare element by element
        return False


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


def _equal(now: Tensor | None, then: Tensor | None) -> bool:
    if now is None or then is None or now.is_meta or then.is_meta:
        return now is then or (now is not None and then is not None)
    return now.shape == then.shape and torch.equal(now.detach().to(then), then)


def undoing(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives ``module`` its present class and attributes back; tensors keep their values."""
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
