"""Publish the QIF neurons inside the host frameworks.

:func:`register` adds names and registry entries to the hosts and never replaces one; :func:`unregister` removes exactly
those:

* SpikingJelly: ``spikingjelly.activation_based.neuron.AnalyticQIFNode``, and in 2.x entries in the registries of
  ``distributed.vision``, which resolve the class paths in its configurations;
* snnTorch: ``snntorch.QIF``.

Everything else in the hosts dispatches on base classes, which the QIF neurons share.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..support.names import check_known

logger = logging.getLogger("qif_plugins")


class _Entry(NamedTuple):
    """One name to add: ``table[key] = value``."""

    table: dict[str, Any]
    key: str
    value: Any
    place: str


class _Host(NamedTuple):
    """One host framework.

    Attributes:
        newest_tested: Its newest version with which the neurons were tested.
        needs: Objects that the neurons need of it, as ``module:attribute``, with the arguments that these must take.
        entries: Yields the names to add.
    """

    newest_tested: str
    needs: dict[str, tuple[str, ...]]
    entries: Callable[[], Iterator[_Entry]]


def register(*hosts: str) -> None:
    """Publish the QIF neurons in the hosts.

    Afterwards ``spikingjelly.activation_based.neuron.AnalyticQIFNode`` and ``snntorch.QIF`` exist. A second call
    changes nothing. After an error nothing has been published.

    Args:
        *hosts: ``"spikingjelly"``, ``"snntorch"`` or both. Default: every host that is installed.

    Raises:
        ValueError: Unknown host.
        ModuleNotFoundError: One of ``hosts`` is not installed, or no host is. The message says what to install.
        RuntimeError: A host lacks interfaces that the neurons need, or has one of the names already. The message names
            them.
    """
    installed = _installed(hosts)
    for host in installed:
        _refuse(host, [*_absent(_HOSTS[host].needs)])
    entries = [entry for host in installed for entry in _HOSTS[host].entries()]
    for entry in entries:
        if entry.table.get(entry.key, entry.value) is not entry.value:
            raise RuntimeError(
                f"{entry.place} exists already, as {entry.table[entry.key]!r}, and is not replaced; "
                "use the neuron from qif_plugins.adapters instead"
            )
    for host in installed:
        _warn_of_newer(host)
    for entry in entries:
        if entry.key not in entry.table:
            entry.table[entry.key] = entry.value
            _added.append(entry)
            logger.info("qif_plugins: registered %s", entry.place)


def unregister() -> None:
    """Remove the names that :func:`register` added, unless they were assigned anew since; change nothing else."""
    while _added:
        entry = _added.pop()
        if entry.table.get(entry.key) is entry.value:
            del entry.table[entry.key]


def _installed(hosts: tuple[str, ...]) -> list[str]:
    """Return ``hosts`` or, if it is empty, all hosts that are installed."""
    check_known("host", _HOSTS, *hosts)
    installed = [host for host in hosts or _HOSTS if importlib.util.find_spec(host) is not None]
    missing = [host for host in hosts if host not in installed]
    if missing or not installed:
        names = missing or list(_HOSTS)
        raise ModuleNotFoundError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not installed; install with: "
            + " or ".join(f"pip install 'qif-plugins[{name}]'" for name in names)
        )
    return installed


def _absent(needs: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the names in ``needs`` that are missing."""
    for place, arguments in needs.items():
        name = place.replace(":", ".")
        try:
            found = pkgutil.resolve_name(place)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            yield name
        except AttributeError:
            yield name
        else:
            taken = inspect.signature(found).parameters if arguments else {}
            yield from (f"{name}(..., {argument})" for argument in arguments if argument not in taken)


def _refuse(host: str, absent: list[str]) -> None:
    if absent:
        raise RuntimeError(
            f"{host} {_version(host)} lacks what the QIF neurons need: {', '.join(absent)}. Nothing was registered; "
            f"tested versions go up to {_HOSTS[host].newest_tested}."
        )


def _warn_of_newer(host: str) -> None:
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
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def _spikingjelly_entries() -> Iterator[_Entry]:
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    ours = importlib.import_module("qif_plugins.adapters.spikingjelly")
    yield _Entry(vars(neuron), "AnalyticQIFNode", ours.QIFNode, "spikingjelly.activation_based.neuron.AnalyticQIFNode")
    distributed = "spikingjelly.activation_based.distributed"
    if importlib.util.find_spec(distributed) is None or importlib.util.find_spec(f"{distributed}.vision") is None:
        return
    # Its register functions have no inverse, so the tables are changed directly.
    config = f"{distributed}.vision.config"
    for table, classes in (
        ("_NEURON_REGISTRY", (ours.QIFNode, ours.ParametricQIFNode)),
        ("_SURROGATE_REGISTRY", (ours.AnalyticWindow, ours.AnalyticGaussian)),
    ):
        _refuse("spikingjelly", [*_absent({f"{config}:{table}": ()})])
        for cls in classes:
            for module in (ours.__name__, cls.__module__):
                path = f"{module}.{cls.__qualname__}"
                yield _Entry(pkgutil.resolve_name(f"{config}:{table}"), path, cls, f"{config}.{table}[{path!r}]")


def _snntorch_entries() -> Iterator[_Entry]:
    snntorch = importlib.import_module("snntorch")
    yield _Entry(vars(snntorch), "QIF", importlib.import_module("qif_plugins.adapters.snntorch").QIF, "snntorch.QIF")


_added: list[_Entry] = []
_warned: set[str] = set()

_JELLY = "spikingjelly.activation_based"
_HOSTS = {
    "spikingjelly": _Host(
        "2.0.0",
        dict.fromkeys(
            (
                f"{_JELLY}.base:MemoryModule.register_memory", f"{_JELLY}.neuron:BaseNode",
                f"{_JELLY}.surrogate:SurrogateFunctionBase", f"{_JELLY}.surrogate:ATan", f"{_JELLY}.surrogate:Sigmoid",
                f"{_JELLY}.functional:reset_net", f"{_JELLY}.functional:set_step_mode",
                f"{_JELLY}.functional:detach_net",
            ),
            (),
        )
        | {
            f"{_JELLY}.neuron:LIFNode": (
                "tau", "decay_input", "v_threshold", "v_reset", "surrogate_function", "detach_reset", "step_mode",
                "store_v_seq",
            ),
        },
        _spikingjelly_entries,
    ),
    "snntorch": _Host(
        "1.0.0",
        dict.fromkeys(
            (
                "snntorch:Leaky.reset_mem", "snntorch:Leaky.detach_hidden", "snntorch:Leaky.reset_hidden",
                "snntorch:SpikingNeuron.instances", "snntorch:SpikingNeuron.reset_dict", "snntorch.utils:reset",
            ),
            (),
        )
        | {
            "snntorch:Leaky": (
                "beta", "threshold", "spike_grad", "surrogate_disable", "init_hidden", "inhibition", "learn_beta",
                "learn_threshold", "reset_mechanism", "state_quant", "output", "graded_spikes_factor",
                "learn_graded_spikes_factor", "reset_delay",
            ),
        },
        _snntorch_entries,
    ),
}  # fmt: skip
