"""Replace the hosts' LIF classes by stand-ins, in a program that knows nothing of QIF.

A stand-in builds the host's own LIF neuron. When a QIF neuron takes that neuron's place later, the stand-in still
counts it as its instance.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

from torch import nn

from .hosts import HOSTS, Host
from .rebuild import replaced, resolve

NAMES = {
    "spikingjelly.activation_based.neuron": ("IFNode", "LIFNode", "ParametricLIFNode"),
    "spikingjelly.clock_driven.neuron": (
        "IFNode", "LIFNode", "ParametricLIFNode", "MultiStepIFNode", "MultiStepLIFNode", "MultiStepParametricLIFNode",
    ),
    "snntorch": ("Leaky", "Lapicque", "RLeaky"),
}  # fmt: skip
"""Module -> the classes in it that are patched."""

_PACKAGES = {name.removesuffix(".neuron"): name for name in NAMES}
"""Package -> the module in it to patch. It is patched right after the package was imported and before any other of its
modules, because these import one another, and the adapter needs all of them complete."""


class StandIns:
    """Patches, inside a ``with`` block, the hosts that are imported already or will be.

    Args:
        built: Function that receives each neuron that a stand-in has built.
        say: Function that receives a line for each module that was patched.

    Attributes:
        patched: Module -> names that were patched in it.
    """

    def __init__(self, built: Callable[[nn.Module], None], say: Callable[[str], None]) -> None:
        self.patched: dict[str, list[str]] = {}
        self._built, self._say = built, say
        self._waiting: list[str] = []
        self._classes: dict[type[Any], type[Any]] = {}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> StandIns:
        sys.meta_path.insert(0, self)
        for module in NAMES:
            if module in sys.modules:
                self._patch(module)
        return self

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(self)
        for step in reversed(self._undo):
            step()

    def kind(self, cls: type[Any]) -> str:
        """Return the name of the host's LIF class that ``cls`` is or extends; empty if there is none."""
        return next((base.__name__ for base in cls.__mro__ if base in self._classes), "")

    def unmask(self, module: nn.Module) -> None:
        """Give a neuron that was copied or unpickled as a stand-in the host's own class."""
        cls = type(module)
        if self._classes.get(vars(cls).get("stands_for", cls)) is cls:
            object.__setattr__(module, "__class__", vars(cls)["stands_for"])

    def hosts(self) -> list[Host]:
        """Return the hosts that were patched."""
        names = {module.split(".")[0] for module in self.patched}
        return [importlib.import_module(HOSTS[name]).HOST for name in sorted(names)]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a package to patch by the other finders, and have it patched once it has been imported."""
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
        importlib.import_module(HOSTS[module_name.split(".")[0]])  # must import the host's own classes
        module = importlib.import_module(module_name)
        for name in NAMES[module_name]:
            original = getattr(module, name)
            setattr(module, name, self._stand_in(original))
            copyreg.pickle(original, _reduce)
            self._undo.append(functools.partial(self._put_back, module, name, original))
            self.patched.setdefault(module_name, []).append(name)
        names = ", ".join(NAMES[module_name])
        self._say(f"{names} of {module_name} now build QIF neurons, which are LIF until their network is called")

    @staticmethod
    def _put_back(module: Any, name: str, original: Any) -> None:
        setattr(module, name, original)
        copyreg.dispatch_table.pop(original, None)

    def _stand_in(self, original: type[Any]) -> type[Any]:
        """Make a class that builds ``original``, and that counts QIF neurons in the place of those as its instances."""

        class Meta(type(original)):  # type: ignore[misc]
            def __instancecheck__(cls, instance: Any) -> bool:
                if super().__instancecheck__(instance):
                    return True
                if not isinstance(instance, nn.Module):
                    return False
                record = replaced(instance)
                was = type(instance) if record is None else record.cls
                return issubclass(was, original if cls is stand_in else cls)

            # Programs also compare the class of a neuron, and look it up in tables.
            def __subclasscheck__(cls, subclass: type[Any]) -> bool:
                return super().__subclasscheck__(subclass) or (
                    "stands_for" in vars(cls) and issubclass(subclass, original)
                )

            def __eq__(cls, other: object) -> bool:
                return other is cls or ("stands_for" in vars(cls) and other is original)

            def __hash__(cls) -> int:
                return type.__hash__(vars(cls).get("stands_for", cls))

        @functools.wraps(original.__init__)
        def initialise(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if type(module) is stand_in:
                object.__setattr__(module, "__class__", original)
            original.__init__(module, *args, **kwargs)
            self._built(module)

        stand_in = Meta(
            original.__name__,
            (original,),
            {
                "__init__": initialise,
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
                "stands_for": original,
            },
        )
        self._classes[original] = stand_in
        return stand_in


def _reduce(module: nn.Module) -> Any:
    """Pickle a LIF neuron by the name of its class, which now refers to a stand-in."""
    reduced: Any = module.__reduce_ex__(2)
    _, _, *rest = reduced
    return _new, (type(module).__module__, type(module).__qualname__), *rest


def _new(module: str, qualname: str) -> nn.Module:
    cls: Any = resolve(module, qualname)
    return cls.__new__(cls)
