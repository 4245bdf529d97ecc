"""Programs that know nothing of QIF: their LIF classes build QIF neurons, in whichever hosts they import.

While a :class:`Patch` is on, the names in :data:`NAMES` are classes that take the LIF neuron's arguments, have a QIF
class for their base, and build a LIF neuron that is swapped at once. At that moment nothing is known of the network
around it. So when a network is called for the first time, its neurons become LIF again and
:func:`~qif_plugins.swap` decides on all of them together: which are fed by a normalization, and which read out.
"""

from __future__ import annotations

import copyreg
import importlib.util
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import nn

from .convert import SwapReport, swap
from .convert.find import neurons
from .convert.hosts import HOSTS, Host, Request
from .convert.rebuild import own_code, rebuild, replaced, resolve, restore
from .surrogate import Window
from .watch import Watch

__all__ = ["NAMES", "Patch"]

NAMES = {
    "spikingjelly.activation_based.neuron": ("IFNode", "LIFNode", "ParametricLIFNode"),
    "spikingjelly.clock_driven.neuron": (
        "IFNode", "LIFNode", "ParametricLIFNode", "MultiStepIFNode", "MultiStepLIFNode", "MultiStepParametricLIFNode",
    ),
    "snntorch": ("Leaky", "Lapicque", "RLeaky"),
}  # fmt: skip
"""Module -> the classes in it that are patched."""

_PACKAGES = {name.removesuffix(".neuron"): name for name in NAMES}
"""Package -> the module in it to patch, as soon as the package is there and before any other of its modules is:
these import one another, and the adapter needs them whole."""

_UNDECIDED = "_qif_undecided"
"""Attribute of a neuron that no network decided on yet; copies and pickles carry it."""


class Patch:
    """Patches the hosts that are imported from now on, and those that were.

    Args:
        say: Called with each line of the account.
        dynamics, window, norm, readout: As in :func:`~qif_plugins.swap`.

    Attributes:
        patched: Module -> names that were patched in it.
        built: How many neurons of each host class were built as QIF.
        stayed: How many neurons were built as LIF, or became it again since they read out.
        unseen: How many of those built were in no network that was called.
        ran: Whether a QIF neuron ran, or a network that has one.
        watch: How often the neurons of the networks that were called spike.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        dynamics: str = "auto",
        window: str | Window = "unbiased",
        norm: str = "keep",
        readout: str = "keep",
    ) -> None:
        self.say = say
        self.choices: dict[str, Any] = {"dynamics": dynamics, "window": window, "norm": norm, "readout": readout}
        self.patched: dict[str, list[str]] = {}
        self.built: Counter[str] = Counter()
        self.stayed: Counter[str] = Counter()
        self._originals: list[tuple[Any, str, Any]] = []
        self._waiting: list[str] = []
        self._built_as: weakref.WeakKeyDictionary[nn.Module, type[Any]] = weakref.WeakKeyDictionary()
        self.unseen: Counter[str] = Counter()
        self.ran = False
        self.watch = Watch()
        self._made: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._parents: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()
        self._settled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hooks: list[Any] = []

    def __enter__(self) -> Patch:
        sys.meta_path.insert(0, self)
        self._hooks = [
            nn.modules.module.register_module_module_registration_hook(self._registered),
            nn.modules.module.register_module_forward_pre_hook(self._called),
            nn.modules.module.register_module_forward_hook(self.watch.ran),
        ]
        for module in NAMES:
            if module in sys.modules:
                self._patch(module)
        return self

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(self)
        for module, name, original in self._originals:
            setattr(module, name, original)
            copyreg.dispatch_table.pop(original, None)
        for hook in self._hooks:
            hook.remove()

    # -- patching --------------------------------------------------------------------------------

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The import system's question: a package to patch comes from whoever has it, and is patched once it ran."""
        module_name = _PACKAGES.get(name)
        if module_name is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                self._patch(module_name)

            loader.exec_module = exec_module
        return spec

    def _patch(self, module_name: str) -> None:
        self._waiting.append(module_name)
        if len(self._waiting) > 1:
            return  # imported by the adapter that is being imported for another
        while self._waiting:
            self._patch_one(self._waiting[0])
            self._waiting.pop(0)

    def _patch_one(self, module_name: str) -> None:
        adapter: Any = importlib.import_module(HOSTS[module_name.split(".")[0]])
        module = importlib.import_module(module_name)
        for name in NAMES[module_name]:
            original = getattr(module, name)
            setattr(module, name, self._stand_in(original, adapter.TARGETS[original], adapter.HOST))
            copyreg.pickle(original, _reduce)
            self._originals.append((module, name, original))
            self.patched.setdefault(module_name, []).append(name)
        self.say(f"{', '.join(NAMES[module_name])} of {module_name} now build QIF neurons")

    def _stand_in(self, original: type[Any], target: type[Any], host: Host) -> type[Any]:
        """A class that takes the arguments of ``original`` and builds what replaces it."""

        built_as = self._built_as

        class Meta(type(target)):  # type: ignore[misc]
            def __instancecheck__(cls, instance: Any) -> bool:
                if super().__instancecheck__(instance):
                    return True
                if not isinstance(instance, nn.Module):
                    return False
                record = replaced(instance)
                was = type(instance) if record is None else record.cls
                return issubclass(built_as.get(instance, object), cls) or (
                    cls is stand_in and issubclass(was, original)
                )

        def initialise(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            cls = type(module)
            object.__setattr__(module, "__class__", original)
            original.__init__(module, *args, **kwargs)
            self._build(module, host, cls, stand_in)

        stand_in = Meta(
            original.__name__,
            (target,),
            {
                "__init__": initialise,
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
                "__signature__": inspect.signature(original),
                "stands_for": original,
            },
        )
        return stand_in

    # -- building --------------------------------------------------------------------------------

    def _build(self, module: nn.Module, host: Host, cls: type[Any], stand_in: type[Any]) -> None:
        """Swap a LIF neuron that was just built through ``cls``, for its own leak."""
        name = type(module).__name__
        try:
            rebuild(module, host, host.plan(module, Request(window=self.choices["window"]), normalized=False))
        except ValueError as error:
            if cls is not stand_in:
                raise
            self.stayed[name] += 1
            self.say(f"a {name} stays LIF: {error}")
            return
        self.built[name] += 1
        if cls is not stand_in:
            object.__setattr__(module, "__class__", cls)
            if own_code(module, stand_in):
                return  # what it does on top of the QIF neuron is not to be lost
            self._built_as[module] = cls
        vars(module)[_UNDECIDED] = True
        self._settled.clear()
        self._made.add(module)
        self.unseen[name] += 1

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            self._settled.clear()
            self._parents.setdefault(child, weakref.WeakSet()).add(parent)

    def _root(self, module: nn.Module) -> nn.Module:
        """The outermost module that has ``module``, which is often called through a method of its network."""
        passed: list[nn.Module] = []
        while not any(module is one for one in passed):
            passed.append(module)
            for parent in self._parents.get(module, ()):
                if any(child is module for child in parent._modules.values()):
                    module = parent
                    break
        return module

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before any module runs: the first call in a network with undecided neurons decides on them."""
        if torch.compiler.is_compiling() or module in self._seen:
            return
        self._seen.add(module)
        root = self._root(module)
        mine = []
        if root not in self._settled:
            mine = [site.module for site in neurons(root, self._hosts()) if vars(site.module).get(_UNDECIDED)]
            self._settled.add(root)
        if module in mine and root is module:
            del vars(module)[_UNDECIDED]  # called on its own, as in a script without a network
        elif mine:
            self._decide(root, mine, module, args)
        self.ran = self.ran or replaced(module) is not None

    def _decide(self, root: nn.Module, mine: Sequence[nn.Module], called: nn.Module, args: tuple[Any, ...]) -> None:
        for neuron in mine:
            del vars(neuron)[_UNDECIDED]
            name = replaced(neuron).cls.__name__  # type: ignore[union-attr]
            if neuron in self._made:
                self.unseen[name] -= 1
            else:
                self.built[name] += 1  # a copy
        network = _unwrapped(root)
        undo = [restore(neuron) for neuron in mine]
        self.say(f"{type(network).__name__} is called for the first time:")
        try:
            report = self._swap(network, mine, _unwrapped(called), args)
        except ValueError as error:
            for step in reversed(undo):
                step()
            self.ran = True
            many = f"{len(mine)} neurons stay as they were" if len(mine) > 1 else "one neuron stays as it was"
            self.say(f"its {many} built, QIF with the leak of LIF: {error}")
            return
        for line in str(report).splitlines():
            self.say(f"  {line}")
        names = {id(site.module): site.name for site in neurons(network, self._hosts())}
        for neuron in mine:
            self.watch.add(names[id(neuron)] or type(network).__name__, neuron, reads_out=replaced(neuron) is None)
            if replaced(neuron) is None:
                name = type(neuron).__name__
                self.built[name] -= 1
                self.stayed[name] += 1
            else:
                self.ran = True

    def _hosts(self) -> list[Host]:
        names = {module.split(".")[0] for module in self.patched}
        return [importlib.import_module(HOSTS[name]).HOST for name in sorted(names)]

    def _swap(
        self, network: nn.Module, mine: Sequence[nn.Module], called: nn.Module, args: tuple[Any, ...]
    ) -> SwapReport:
        choices = dict(self.choices)
        if len(neurons(network, self._hosts())) == 1 and choices["readout"] == "keep":
            # Left alone, it would leave nothing that is QIF.
            choices["readout"] = "swap"
            self.say("  its one neuron is swapped although it may read out")
        try:
            return swap(network, **choices)
        except ValueError as error:
            if "example_input" not in str(error):
                raise
            inside = [site.module for site in neurons(called, self._hosts())]
            if not all(any(neuron is one for one in inside) for neuron in mine):
                raise  # a part was called through a method of the network, whose argument is not known
            return swap(called, **choices, example_input=args)


def _unwrapped(network: nn.Module) -> nn.Module:
    while (inner := getattr(network, "_orig_mod", None) or _wrapped(network)) is not None:
        network = inner
    return network


def _wrapped(network: nn.Module) -> nn.Module | None:
    """The module inside a wrapper for several devices."""
    wrapper = {cls.__name__ for cls in type(network).__mro__} & {"DistributedDataParallel", "DataParallel"}
    return network.module if wrapper else None  # type: ignore[return-value]


def _reduce(module: nn.Module) -> Any:
    """A LIF neuron's pickle, which names a class that something else stands for now."""
    reduced: Any = module.__reduce_ex__(2)
    _, _, *rest = reduced
    return _new, (type(module).__module__, type(module).__qualname__), *rest


def _new(module: str, qualname: str) -> nn.Module:
    cls: Any = resolve(module, qualname)
    return cls.__new__(cls)
