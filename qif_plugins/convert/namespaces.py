"""Publishing the neurons inside the host frameworks.

:func:`register` adds names and registry entries to the hosts, never replaces one, and :func:`unregister`
takes away exactly what it added. What is published:

* SpikingJelly: ``spikingjelly.activation_based.neuron.AnalyticQIFNode``, and in 2.x the entries of
  ``distributed.vision``'s registries, which resolve the class paths in its configurations;
* snnTorch: ``snntorch.QIF``.

Everything else in the hosts dispatches on base classes that the neurons have.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..support.names import unknown

__all__ = ["register", "unregister"]

logger = logging.getLogger("qif_plugins")


class _Entry(NamedTuple):
    """One name to add: ``table[key] = value``."""

    table: dict[str, Any]
    key: str
    value: Any
    place: str


class _Host(NamedTuple):
    newest_tested: str
    interfaces: dict[str, tuple[str, ...]]
    """What must be there: module -> attributes, dotted where they are attributes of a class."""
    arguments: dict[str, tuple[str, ...]]
    """Callable -> the arguments it must take."""
    entries: Callable[[], Iterator[_Entry]]


def register(*hosts: str) -> None:
    """Publish the QIF neurons in the hosts.

    Afterwards ``spikingjelly.activation_based.neuron.AnalyticQIFNode`` and ``snntorch.QIF`` exist. Calling it again
    changes nothing. Either every host is registered or, on an error, none.

    Args:
        *hosts: ``"spikingjelly"``, ``"snntorch"``; left out, every one that is installed.

    Raises:
        ValueError: Unknown host.
        ModuleNotFoundError: A host that is not installed; left out, none is. Says what to install.
        RuntimeError: A host lacks interfaces that the neurons need (named), or has one of the names already.
    """
    for host in hosts:
        if host not in _HOSTS:
            raise ValueError(unknown("host", host, _HOSTS))
    installed = [host for host in hosts or _HOSTS if importlib.util.find_spec(host) is not None]
    missing = [host for host in hosts if host not in installed]
    if missing or not installed:
        names = missing or list(_HOSTS)
        raise ModuleNotFoundError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not installed; install with: "
            + " or ".join(f"pip install 'qif-plugins[{name}]'" for name in names)
        )
    for host in installed:
        _check_interfaces(host)
    entries = [entry for host in installed for entry in _HOSTS[host].entries()]
    for entry in entries:
        if entry.table.get(entry.key, entry.value) is not entry.value:
            raise RuntimeError(
                f"{entry.place} exists already, as {entry.table[entry.key]!r}, and is not shadowed; "
                "use the neuron from qif_plugins.adapters instead"
            )
    for host in installed:
        _check_version(host)
    for entry in entries:
        if entry.key not in entry.table:
            entry.table[entry.key] = entry.value
            _added.append(entry)
            logger.info("qif_plugins: registered %s", entry.place)


def unregister() -> None:
    """Take away what :func:`register` added; everything else, before it or since, stays as it is."""
    while _added:
        entry = _added.pop()
        if entry.table.get(entry.key) is entry.value:
            del entry.table[entry.key]


def _check_interfaces(host: str) -> None:
    absent = []
    for module_name, names in _HOSTS[host].interfaces.items():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise
            absent.append(module_name)
            continue
        absent += [f"{module_name}.{name}" for name in names if not _has(module, name)]
    if not absent:
        for place, arguments in _HOSTS[host].arguments.items():
            module_name, name = place.rsplit(".", 1)
            taken = inspect.signature(getattr(importlib.import_module(module_name), name)).parameters
            absent += [f"{place}(..., {argument})" for argument in arguments if argument not in taken]
    if absent:
        raise RuntimeError(
            f"{host} {_version(host)} lacks what the QIF neurons need: {', '.join(absent)}. Nothing was registered; "
            f"tested versions go up to {_HOSTS[host].newest_tested}."
        )


def _has(module: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def _check_version(host: str) -> None:
    newest = _HOSTS[host].newest_tested
    if _numbers(_version(host)) > _numbers(newest) and host not in _warned:
        _warned.add(host)
        warnings.warn(
            f"{host} {_version(host)} is newer than {newest}, the newest that qif-plugins was tested with",
            stacklevel=3,
        )


def _version(host: str) -> str:
    try:
        return importlib.metadata.version(host)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"  # a source tree on the path


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"[0-9.]*", version)
    return tuple(int(part) for part in (release.group() if release else "").split(".") if part)


def _spikingjelly_entries() -> Iterator[_Entry]:
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    ours = importlib.import_module("qif_plugins.adapters.spikingjelly")
    yield _Entry(vars(neuron), "AnalyticQIFNode", ours.QIFNode, "spikingjelly.activation_based.neuron.AnalyticQIFNode")
    name = "spikingjelly.activation_based.distributed"
    if importlib.util.find_spec(name) is None or importlib.util.find_spec(f"{name}.vision") is None:
        return
    # Its register functions have no inverse, hence the tables themselves.
    config = importlib.import_module(f"{name}.vision.config")
    for table, classes in (
        ("_NEURON_REGISTRY", (ours.QIFNode, ours.ParametricQIFNode)),
        ("_SURROGATE_REGISTRY", (ours.AnalyticWindow, ours.AnalyticGaussian)),
    ):
        if not isinstance(getattr(config, table, None), dict):
            raise RuntimeError(
                f"spikingjelly {_version('spikingjelly')} lacks what the QIF neurons need: {config.__name__}.{table}. "
                "Nothing was registered."
            )
        for cls in classes:
            for module in (ours.__name__, cls.__module__):
                path = f"{module}.{cls.__qualname__}"
                yield _Entry(getattr(config, table), path, cls, f"{config.__name__}.{table}[{path!r}]")


def _snntorch_entries() -> Iterator[_Entry]:
    snntorch = importlib.import_module("snntorch")
    yield _Entry(vars(snntorch), "QIF", importlib.import_module("qif_plugins.adapters.snntorch").QIF, "snntorch.QIF")


_added: list[_Entry] = []
_warned: set[str] = set()

_HOSTS = {
    "spikingjelly": _Host(
        newest_tested="2.0.0",
        interfaces={
            "spikingjelly.activation_based.base": ("MemoryModule.register_memory",),
            "spikingjelly.activation_based.neuron": ("BaseNode", "LIFNode"),
            "spikingjelly.activation_based.surrogate": ("SurrogateFunctionBase", "ATan", "Sigmoid"),
            "spikingjelly.activation_based.functional": ("reset_net", "set_step_mode", "detach_net"),
        },
        arguments={
            "spikingjelly.activation_based.neuron.LIFNode": (
                "tau", "decay_input", "v_threshold", "v_reset", "surrogate_function", "detach_reset", "step_mode",
                "store_v_seq",
            ),
        },
        entries=_spikingjelly_entries,
    ),
    "snntorch": _Host(
        newest_tested="1.0.0",
        interfaces={
            "snntorch": (
                "Leaky.reset_mem", "Leaky.detach_hidden", "Leaky.reset_hidden", "SpikingNeuron.instances",
                "SpikingNeuron.reset_dict",
            ),
            "snntorch.utils": ("reset",),
        },
        arguments={
            "snntorch.Leaky": (
                "beta", "threshold", "spike_grad", "surrogate_disable", "init_hidden", "inhibition", "learn_beta",
                "learn_threshold", "reset_mechanism", "state_quant", "output", "graded_spikes_factor",
                "learn_graded_spikes_factor", "reset_delay",
            ),
        },
        entries=_snntorch_entries,
    ),
}  # fmt: skip
