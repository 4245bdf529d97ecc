"""Programs that know nothing of QIF: their LIF neurons become QIF neurons, in whichever hosts they import.

While a :class:`Patch` is on, the names in :data:`NAMES` are classes that build the host's LIF neuron, and take a QIF
neuron in its place for one of theirs. What the program sets on its neurons it sets on the host's own, with all that
the host makes of it. When a network is called for the first time, :func:`~qif_plugins.swap` decides on its neurons
together, as they are then, by following the arguments of that call: which are fed by a normalization, and which
read out.
"""

from __future__ import annotations

import contextlib
import copyreg
import dataclasses
import functools
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..neuron.surrogate import Window
from ..support.randomness import unchanged_randomness
from . import SwapReport, check_swappable, swap_found
from .find import Call, Site, Survey, neurons, survey
from .hosts import HOSTS, Host, Request
from .rebuild import replaced, resolve
from .trial import on_trial
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

_DECIDED = "_qif_run_decided"
"""Attribute of a LIF neuron that is to stay one: the number of modules of the network for which that was decided. In a
network of another size, which it has been built into since, it is decided again. Copies and pickles carry it."""

_STATE = ("v", "mem", "spk")
"""Attributes that the hosts keep of a neuron from step to step."""


class Patch:
    """Patches the hosts that are imported from now on, and those that are imported already.

    Args:
        say: Receives each line that reports what was done.
        dynamics: As in :func:`~qif_plugins.swap`.
        window: As in :func:`~qif_plugins.swap`.
        norm: As in :func:`~qif_plugins.swap`.
        readout: As in :func:`~qif_plugins.swap`.

    Attributes:
        patched: Module -> names that were patched in it.
        became: Number of neurons of each host class that became QIF.
        stayed: Number of neurons of networks that were called which stayed LIF.
        alone: Number of those that became QIF and were called outside any network.
        uncalled: Number of neurons that were built and are in no network that was called: LIF neurons.
        watch: Firing rates of the neurons in the networks that were called.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        dynamics: str = "auto",
        window: str | Window = "auto",
        norm: str = "keep",
        readout: str = "keep",
    ) -> None:
        self.say = say
        self.request = Request(dynamics, window)
        self.norm, self.readout = norm, readout
        self.patched: dict[str, list[str]] = {}
        self.became: Counter[str] = Counter()
        self.stayed: Counter[str] = Counter()
        self.alone: Counter[str] = Counter()
        self.uncalled: Counter[str] = Counter()
        self.watch = Watch()
        self._undo: list[Callable[[], None]] = []
        self._waiting: list[str] = []
        self._classes: dict[type[Any], type[Any]] = {}
        # By identity, and weakly: a network may compare equal to another, and goes when the program drops it.
        self._uncalled, self._stayed = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self._settled, self._running = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self._parents = WeakIdKeyDictionary()
        self._deciding = False

    def __enter__(self) -> Patch:
        sys.meta_path.insert(0, self)
        for hook in (
            nn.modules.module.register_module_module_registration_hook(self._registered),
            nn.modules.module.register_module_forward_pre_hook(self._calls),
            nn.modules.module.register_module_forward_hook(self._ran),
            nn.modules.module.register_module_forward_hook(self.watch.ran),
        ):
            self._undo.append(hook.remove)
        self._wrap(nn.Module, "__setstate__", self._copied)
        self._wrap(nn.Module, "compile", self._compiled)
        for module in NAMES:
            if module in sys.modules:
                self._patch(module)
        return self

    def __exit__(self, *error: object) -> None:
        sys.meta_path.remove(self)
        for step in reversed(self._undo):
            step()

    def _wrap(self, owner: Any, name: str, after: Callable[[Any], None]) -> None:
        """Have ``after`` called with the object after each call of its method ``name``."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            after(self)
            return result

        setattr(owner, name, wrapped)
        self._undo.append(lambda: setattr(owner, name, method))

    # -- patching --------------------------------------------------------------------------------

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Answer the import system: another finder provides a package to patch, which is patched once it has run."""
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
        importlib.import_module(HOSTS[module_name.split(".")[0]])  # while the names still are the host's own
        module = importlib.import_module(module_name)
        for name in NAMES[module_name]:
            original = getattr(module, name)
            setattr(module, name, self._stand_in(original))
            copyreg.pickle(original, _reduce)
            self._undo.append(functools.partial(self._put_back, module, name, original))
            self.patched.setdefault(module_name, []).append(name)
        names = ", ".join(NAMES[module_name])
        self.say(f"{names} of {module_name} now build QIF neurons, which are LIF until their network is called")

    @staticmethod
    def _put_back(module: Any, name: str, original: Any) -> None:
        setattr(module, name, original)
        copyreg.dispatch_table.pop(original, None)

    def _stand_in(self, original: type[Any]) -> type[Any]:
        """Make a class that builds ``original`` and counts the QIF neurons that become of its instances as its own."""

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

    # -- what the program builds -------------------------------------------------------------------

    def _kind(self, cls: type[Any]) -> str:
        """Return the name of the host's LIF class that ``cls`` is or extends; empty for one that does neither."""
        return next((base.__name__ for base in cls.__mro__ if base in self._classes), "")

    def _built(self, module: nn.Module) -> None:
        if self._aside():
            return
        if module not in self._uncalled:
            self._uncalled[module] = None
            self.uncalled[self._kind(type(module))] += 1
        self._ask_again()

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None and not self._aside():
            self._parents.setdefault(child, WeakIdKeyDictionary())[parent] = None
            self._ask_again()

    def _copied(self, module: nn.Module) -> None:
        """Register ``module`` after it was copied or unpickled, its children before it."""
        if self._aside():
            return
        for name, child in module._modules.items():
            self._registered(module, name, child)
        cls = type(module)
        if self._classes.get(vars(cls).get("stands_for", cls)) is cls:
            object.__setattr__(module, "__class__", vars(cls)["stands_for"])
        if self._kind(cls) and _DECIDED not in vars(module) and replaced(module) is None:
            self._built(module)

    def _compiled(self, module: Any) -> None:
        """After ``module.compile()``, have its neurons decided on before it is compiled, at its first call."""
        compiled = module._compiled_call_impl

        def first(*args: Any, **kwargs: Any) -> Any:
            self._first_call(module, Call(args, kwargs))
            module._compiled_call_impl = compiled
            return compiled(*args, **kwargs)

        first.compiles = True  # type: ignore[attr-defined]
        module._compiled_call_impl = first

    def _aside(self) -> bool:
        """Whether a swap is at work, and not the program."""
        return self._deciding or on_trial()

    def _ask_again(self) -> None:
        if self._settled:
            self._settled = WeakIdKeyDictionary()

    # -- the first call ----------------------------------------------------------------------------

    def _root(self, module: nn.Module) -> nn.Module:
        """Find the outermost module that contains ``module``, which is often called through a method of its network."""
        passed: list[nn.Module] = []
        while not any(module is one for one in passed):
            passed.append(module)
            for parent in list(self._parents.get(module, ())):
                if _holds(parent, module):
                    module = parent
                    break
        return module

    def _calls(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before any module runs, decide on the neurons of its network if this is the network's first call."""
        if torch.compiler.is_compiling() or self._aside() or module in self._settled:
            return
        if self._kind(type(module)) and replaced(module) is None:
            # PyTorch has chosen the forward that it is about to run: what it gives is replaced after it ran.
            self._running[module] = _state(module)
        else:
            self._first_call(module, Call(args, _keywords(module)))

    def _ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a neuron ran that was called by itself, make it QIF and do its first call again."""
        if torch.compiler.is_compiling() or module not in self._running:
            return None
        before, after = self._running.pop(module), _state(module)
        _set_state(module, before)
        call = Call(args, _keywords(module))
        self._first_call(module, call)
        if replaced(module) is None:
            _set_state(module, after)
            return None
        return module.forward(*call.args, **call.kwargs)

    def _first_call(self, module: nn.Module, call: Call) -> None:
        if module in self._settled:
            return
        self._settled[module] = None
        parents = [parent for parent in self._parents.get(module, ()) if _holds(parent, module)]
        if any(self._kind(type(parent)) or replaced(parent) is not None for parent in parents):
            return  # a neuron's surrogate, which the hosts' neurons share, or its recurrent layer
        if len(parents) > 1 and not neurons(module, self._hosts()):
            return  # it does not say which of the networks that share it runs
        root = self._root(module)
        if root is not module and root in self._settled:
            return
        self._settled[root] = None
        self._deciding = True
        try:
            # Tensors made in inference mode could not be trained later.
            with torch.inference_mode(False), unchanged_randomness(), _uncompiled(root):
                self._decide(_unwrapped(root), _unwrapped(module), call)
        finally:
            self._deciding = False

    def _decide(self, network: nn.Module, called: nn.Module, call: Call) -> None:
        sites = neurons(network, self._hosts())
        within = {id(part) for site in sites for part in site.module.modules()}
        size = len(sites) + sum(id(module) not in within for module in network.modules())
        mine = []
        for site in sites:
            module = site.module
            if site.neuron.role == "qif":
                record = replaced(module)
                if record is not None and module in self._uncalled:  # the program swapped it itself
                    self._count(module, self._kind(record.cls))
            elif self._kind(type(module)):
                mine.append(site)
        if all(vars(site.module).get(_DECIDED) == size for site in mine):
            return
        alone = mine[0].module is network
        before = [(site.module, self._kind(type(site.module)), _state(site.module)) for site in mine]
        if not alone:
            self.say(f"{type(network).__name__} is called for the first time:")
        found, report = self._swap(network, called, sites, call)
        if alone and report.left:
            self.say(f"a {report.left[0].was} stays LIF: {report.left[0].why}")
        elif not alone:
            for line in str(report).splitlines():
                self.say(f"  {line}")
        for module, kind, state in before:
            self._count(module, kind, alone)
            if replaced(module) is None:
                vars(module)[_DECIDED] = size
                continue
            vars(module).pop(_DECIDED, None)
            _set_state(module, {n: v for n, v in state.items() if not isinstance(v, Tensor) or v.numel()})
        if not alone:
            ours = {id(module) for module, *_ in before}
            for site in found.sites:
                if id(site.module) in ours and (replaced(site.module) is not None or site.reads_out):
                    self.watch.add(
                        site.name or type(network).__name__, site.module, reads_out=replaced(site.module) is None
                    )

    def _count(self, module: nn.Module, kind: str, alone: bool = False) -> None:
        if module in self._uncalled:
            del self._uncalled[module]
            self.uncalled[kind] -= 1
        if module in self._stayed:
            del self._stayed[module]
            self.stayed[kind] -= 1
        if replaced(module) is None:
            self._stayed[module] = None
            self.stayed[kind] += 1
        else:
            self.became[kind] += 1
            self.alone[kind] += alone

    def _hosts(self) -> list[Host]:
        names = {module.split(".")[0] for module in self.patched}
        return [importlib.import_module(HOSTS[name]).HOST for name in sorted(names)]

    # -- the swap ------------------------------------------------------------------------------------

    def _swap(self, network: nn.Module, called: nn.Module, sites: list[Site], call: Call) -> tuple[Survey, SwapReport]:
        readout, norm, request = self.readout, self.norm, self.request
        hosts = self._hosts()
        if all(site.neuron.reason for site in sites):
            found = Survey(sites, {})  # nothing is asked of the data's flow, so the network does not run once more
            return found, swap_found(found, request, norm, readout, hosts)
        if len(sites) == 1 and readout == "keep":
            # Left alone, it would leave nothing that is QIF.
            readout = "swap"
            if sites[0].module is not network and sites[0].neuron.role == "lif":
                self.say("  its one neuron is swapped although it may read out")
        try:
            check_swappable(network)
            found = self._survey(network, called, call, hosts)
            blind = found.blind if readout == "keep" else ""
        except ValueError as error:
            found, blind = Survey(sites, {}), str(error)
        if blind:
            self.say(f"  {blind}: every neuron is swapped, one that reads out, too")
            readout = "swap"
            for site in found.sites:
                site.reads_out = False
        if (blind or found.norms_blind) and request.dynamics == "auto":
            unknown = found.norms_blind or "what feeds them is not known"
            self.say(f"  {unknown}: each has the leak, the input gain and the surrogate of its LIF neuron")
            request, norm = dataclasses.replace(request, dynamics="lif"), "keep"
        return found, swap_found(found, request, norm, readout, hosts)

    def _survey(self, network: nn.Module, called: nn.Module, call: Call, hosts: Sequence[Host]) -> Survey:
        """Find the places of the neurons by the data flow of ``call``, if it shows them, else by registration order."""
        follow = network if called is network or _has_all(called, network, hosts) else None
        if follow is None:
            self.say("  a part of it is called by itself, which does not show what the network does with it")
            return survey(network, hosts)
        try:
            return survey(called, hosts, call)
        except ValueError as error:
            self.say(f"  its data flow could not be followed: {error}")
            return survey(network, hosts)


def _holds(parent: nn.Module, child: nn.Module) -> bool:
    return any(one is child for one in parent._modules.values())


def _has_all(part: nn.Module, network: nn.Module, hosts: Sequence[Host]) -> bool:
    """Whether whatever has weights in ``network``, and every neuron, is in ``part``."""
    inside = {id(module) for module in part.modules()} | {id(site.module) for site in neurons(part, hosts)}
    weights = (module for module in network.modules() if next(module.parameters(recurse=False), None) is not None)
    return all(id(module) in inside for module in (*weights, *(site.module for site in neurons(network, hosts))))


def _state(neuron: nn.Module) -> dict[str, Any]:
    """Return a neuron's state: what the program has set, and what is left of earlier steps."""
    return {name: getattr(neuron, name) for name in _STATE if hasattr(neuron, name)}


def _set_state(neuron: nn.Module, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        setattr(neuron, name, value)


def _keywords(module: nn.Module) -> dict[str, Any]:
    """Find the keyword arguments of the present call of ``module``, which PyTorch does not pass to global hooks."""
    frame = sys._getframe(1)
    for _ in range(6):
        if frame.f_back is None:
            break
        frame = frame.f_back
        if frame.f_locals.get("self") is module and isinstance(frame.f_locals.get("kwargs"), dict):
            return dict(frame.f_locals["kwargs"])
    return {}


@contextlib.contextmanager
def _uncompiled(network: nn.Module) -> Iterator[None]:
    """Inside, do not compile the parts of ``network`` that are to be compiled at their first call."""
    waiting: list[Any] = [m for m in network.modules() if hasattr(m._compiled_call_impl, "compiles")]
    calls = [module._compiled_call_impl for module in waiting]
    for module in waiting:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(waiting, calls, strict=True):
            module._compiled_call_impl = call


def _unwrapped(network: nn.Module) -> nn.Module:
    while (inner := getattr(network, "_orig_mod", None) or _wrapped(network)) is not None:
        network = inner
    return network


def _wrapped(network: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper for several devices."""
    wrapper = {cls.__name__ for cls in type(network).__mro__} & {"DistributedDataParallel", "DataParallel"}
    return network.module if wrapper else None  # type: ignore[return-value]


def _reduce(module: nn.Module) -> Any:
    """Pickle a LIF neuron by the name of its class, in whose place another stands now."""
    reduced: Any = module.__reduce_ex__(2)
    _, _, *rest = reduced
    return _new, (type(module).__module__, type(module).__qualname__), *rest


def _new(module: str, qualname: str) -> nn.Module:
    cls: Any = resolve(module, qualname)
    return cls.__new__(cls)
