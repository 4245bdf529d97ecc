"""Swap the neurons of each network in a program that knows nothing of QIF, when the network is called first.

Until then the program has the host's own neurons, so whatever it sets on them takes effect. At the first call
:func:`~qif_plugins.swap` decides on all neurons of the network together. It follows the arguments of that call through
the network to find which neurons a normalization feeds, and which read out.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..neuron.module import GAIN
from ..neuron.surrogate import Window
from ..support.randomness import unchanged_randomness
from . import SwapReport, check_swappable, swap_found
from .find import Survey, survey
from .hosts import LOADED_GAIN, Host, Request
from .rebuild import replaced
from .report import RUN
from .standins import StandIns
from .trial import Call, on_trial, unwrapped
from .walk import Site, neurons
from .watch import Watch

_DECIDED = "_qif_run_decided"
"""Attribute of a LIF neuron that stays LIF: the number of modules of the network for which that was decided. If it has
become part of a network of another size since, the decision is made again. Copies and pickles keep the attribute."""

_STATE = ("v", "mem", "spk")
"""Attributes in which the hosts keep a neuron's state from step to step."""


class Patch:
    """Patches, inside a ``with`` block, the hosts that are imported already or will be.

    Args:
        say: Function that receives each line of the report.
        dynamics: As in :func:`~qif_plugins.swap`.
        window: As in :func:`~qif_plugins.swap`.
        norm: As in :func:`~qif_plugins.swap`.
        readout: As in :func:`~qif_plugins.swap`.

    Attributes:
        patched: Module -> names that were patched in it.
        became: Number of neurons of each host class that became QIF.
        stayed: Number of neurons that stayed LIF in networks that were called.
        alone: Number of neurons that became QIF and were called outside any network.
        uncalled: Number of LIF neurons that were built but are in no network that was called.
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
        self.request = Request(dynamics, window, terms=RUN)
        self.norm, self.readout = norm, readout
        self.became: Counter[str] = Counter()
        self.stayed: Counter[str] = Counter()
        self.alone: Counter[str] = Counter()
        self.uncalled: Counter[str] = Counter()
        self.watch = Watch()
        self._standins = StandIns(self._built, say)
        self.patched = self._standins.patched
        self._undo = contextlib.ExitStack()
        # By identity, since a network may compare equal to another; weakly, so that the program can drop it.
        self._uncalled, self._stayed = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self._settled, self._running = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self._parents = WeakIdKeyDictionary()
        self._deciding = False

    def __enter__(self) -> Patch:
        for hook in (
            nn.modules.module.register_module_module_registration_hook(self._registered),
            nn.modules.module.register_module_forward_pre_hook(self._calls),
            nn.modules.module.register_module_forward_hook(self._ran),
            nn.modules.module.register_module_forward_hook(self.watch.ran),
        ):
            self._undo.callback(hook.remove)
        self._wrap(nn.Module, "__setstate__", self._copied)
        self._wrap(nn.Module, "compile", self._compiled)
        self._wrap(nn.Module, "_load_from_state_dict", self._loaded)
        self._undo.enter_context(self._standins)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _wrap(self, owner: Any, name: str, after: Callable[..., None]) -> None:
        """Have ``after`` called with the object and the arguments after each call of its method ``name``."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            after(self, *args)
            return result

        setattr(owner, name, wrapped)
        self._undo.callback(setattr, owner, name, method)

    # -- what the program builds -------------------------------------------------------------------

    def _built(self, module: nn.Module) -> None:
        if self._aside():
            return
        if module not in self._uncalled:
            self._uncalled[module] = None
            self.uncalled[self._standins.kind(type(module))] += 1
        self._ask_again()

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None and not self._aside():
            self._parents.setdefault(child, WeakIdKeyDictionary())[parent] = None
            self._ask_again()

    def _copied(self, module: nn.Module, state: Any) -> None:
        """Register ``module`` after it was copied or unpickled; its children were registered before."""
        if self._aside():
            return
        for name, child in module._modules.items():
            self._registered(module, name, child)
        self._standins.unmask(module)
        if self._standins.kind(type(module)) and _DECIDED not in vars(module) and replaced(module) is None:
            self._built(module)

    def _compiled(self, module: Any, *options: Any) -> None:
        """After ``module.compile()``, have its neurons swapped at its first call, before it is compiled."""
        compiled = module._compiled_call_impl

        def first(*args: Any, **kwargs: Any) -> Any:
            self._first_call(module, Call(args, kwargs))
            module._compiled_call_impl = compiled
            return compiled(*args, **kwargs)

        first.compiles = True  # type: ignore[attr-defined]
        module._compiled_call_impl = first

    def _loaded(self, module: nn.Module, state: Any, prefix: str, metadata: Mapping[str, Any], *others: Any) -> None:
        """Note the input gain of the QIF neuron whose checkpoint a LIF neuron loads."""
        if self._standins.kind(type(module)):
            vars(module)[LOADED_GAIN] = metadata.get(GAIN, {})  # empty for a LIF neuron's checkpoint, which may follow

    def _aside(self) -> bool:
        """Return whether a swap is running now, and not the program itself."""
        return self._deciding or on_trial()

    def _ask_again(self) -> None:
        if self._settled:
            self._settled = WeakIdKeyDictionary()

    # -- the first call ----------------------------------------------------------------------------

    def _root(self, module: nn.Module) -> nn.Module:
        """Find the outermost module that contains ``module``; often a method of the network calls a part directly."""
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
        if self._standins.kind(type(module)) and replaced(module) is None:
            # PyTorch has already chosen the forward that it will run, so the output is replaced afterwards.
            self._running[module] = _state(module)
        else:
            self._first_call(module, Call(args, _keywords(module)))

    def _ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a neuron that was called by itself has run, make it QIF and repeat its first call."""
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
        if any(self._standins.kind(type(parent)) or replaced(parent) is not None for parent in parents):
            return  # a neuron's surrogate, which the hosts' neurons share, or its recurrent layer
        if len(parents) > 1 and not neurons(module, self._standins.hosts()):
            return  # several networks share it, and it is unknown which one runs
        root = self._root(module)
        if root is not module and root in self._settled:
            return
        self._settled[root] = None
        self._deciding = True
        try:
            # Tensors made in inference mode could not be trained later.
            with torch.inference_mode(False), unchanged_randomness(), _uncompiled(root):
                self._decide(unwrapped(root), unwrapped(module), call)
        finally:
            self._deciding = False

    def _decide(self, network: nn.Module, called: nn.Module, call: Call) -> None:
        sites = neurons(network, self._standins.hosts())
        within = {id(part) for site in sites for part in site.module.modules()}
        size = len(sites) + sum(id(module) not in within for module in network.modules())
        mine = []
        for site in sites:
            module = site.module
            if site.neuron.role == "qif":
                record = replaced(module)
                if record is not None and module in self._uncalled:  # the program swapped it itself
                    self._count(module, self._standins.kind(record.cls))
            elif self._standins.kind(type(module)):
                mine.append(site)
        if all(vars(site.module).get(_DECIDED) == size for site in mine):
            return
        alone = mine[0].module is network
        before = [(site.module, self._standins.kind(type(site.module)), _state(site.module)) for site in mine]
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

    # -- the swap ------------------------------------------------------------------------------------

    def _swap(self, network: nn.Module, called: nn.Module, sites: list[Site], call: Call) -> tuple[Survey, SwapReport]:
        readout, norm, request = self.readout, self.norm, self.request
        hosts = self._standins.hosts()
        if all(site.neuron.reason for site in sites):
            found = Survey(sites, {})  # there is nothing to swap, so the network need not run once more
            return found, swap_found(found, request, norm, readout, hosts)
        if len(sites) == 1 and readout == "keep":
            # If it were left alone, the network would have no QIF neuron.
            readout = "swap"
            if sites[0].module is not network and sites[0].neuron.role == "lif":
                self.say("  its one neuron is swapped although it may read out")
        try:
            check_swappable(network)
            found = self._survey(network, called, call, hosts)
            unknown = found.readout_unknown if readout == "keep" else ""
        except ValueError as error:
            found, unknown = Survey(sites, {}), str(error)
        if unknown:
            self.say(f"  {unknown}: every neuron is swapped, including one that reads out")
            readout = "swap"
            for site in found.sites:
                site.reads_out = False
        if (unknown or found.norms_unknown) and request.dynamics == "auto":
            why = found.norms_unknown or "it is not known what feeds them"
            self.say(f"  {why}: each has the leak, the input gain and the surrogate of its LIF neuron")
            norm = "keep"
            for site in found.sites:
                site.norms, site.norms_known = [], False
        return found, swap_found(found, request, norm, readout, hosts)

    def _survey(self, network: nn.Module, called: nn.Module, call: Call, hosts: Sequence[Host]) -> Survey:
        """Find the places of the neurons by the data flow of ``call``, if it shows them, else by registration order."""
        follow = network if called is network or _has_all(called, network, hosts) else None
        if follow is None:
            self.say("  only a part of it is called, which does not show the data flow of the whole network")
            return survey(network, hosts)
        try:
            return survey(called, hosts, call)
        except ValueError as error:
            self.say(f"  its data flow could not be followed: {error}")
            return survey(network, hosts)


def _holds(parent: nn.Module, child: nn.Module) -> bool:
    return any(one is child for one in parent._modules.values())


def _has_all(part: nn.Module, network: nn.Module, hosts: Sequence[Host]) -> bool:
    """Return whether ``part`` contains every neuron of ``network`` and every module that has weights."""
    inside = {id(module) for module in part.modules()} | {id(site.module) for site in neurons(part, hosts)}
    weights = (module for module in network.modules() if next(module.parameters(recurse=False), None) is not None)
    return all(id(module) in inside for module in (*weights, *(site.module for site in neurons(network, hosts))))


def _state(neuron: nn.Module) -> dict[str, Any]:
    """Return a neuron's state, which the program may have set or earlier steps have left."""
    return {name: getattr(neuron, name) for name in _STATE if hasattr(neuron, name)}


def _set_state(neuron: nn.Module, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        setattr(neuron, name, value)


def _keywords(module: nn.Module) -> dict[str, Any]:
    """Find the keyword arguments of the current call of ``module``, which PyTorch does not pass to global hooks."""
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
    """Run the parts of ``network`` uncompiled inside, even those that would be compiled at their first call."""
    waiting: list[Any] = [m for m in network.modules() if hasattr(m._compiled_call_impl, "compiles")]
    calls = [module._compiled_call_impl for module in waiting]
    for module in waiting:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(waiting, calls, strict=True):
            module._compiled_call_impl = call
