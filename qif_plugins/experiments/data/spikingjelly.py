"""Import SpikingJelly's data sets, even if its package of data sets cannot be imported.

``spikingjelly.datasets`` of 2.x imports every data set it has, and with them torchaudio, which refuses to load beside a
PyTorch built for another CUDA version: an unpinned install of the two is enough. The data set that is wanted may
need none of that.
"""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType

__all__ = ["dataset_module"]

_PACKAGE = "spikingjelly.datasets"
_lock = threading.RLock()


def dataset_module(name: str) -> ModuleType:
    """Import a module of ``spikingjelly.datasets``.

    If the usual import fails, the module is imported without its package's ``__init__``: no other data set is imported,
    and ``import spikingjelly.datasets`` fails or works afterwards as it did before.

    Args:
        name: Such as ``"shd"`` (``SpikingHeidelbergDigits``) or ``"cifar10_dvs"`` (``CIFAR10DVS``).

    Returns:
        The module. Imported by itself, its objects cannot be unpickled in a process that was started afresh, so a
        ``DataLoader`` with workers needs them forked.

    Raises:
        ImportError: SpikingJelly, or a package that this module needs, is missing.
    """
    with _lock:
        try:
            return importlib.import_module(f"{_PACKAGE}.{name}")
        except Exception as error:
            # Not only ImportError: torchaudio raises RuntimeError for the wrong CUDA version, OSError for symbols.
            try:
                return _by_itself(name)
            except Exception as own:
                raise ImportError(
                    f"{_PACKAGE}.{name} does not import ({own}); install SpikingJelly and what it reads files with: "
                    f"pip install 'qif-plugins[spikingjelly,run]'"
                ) from error


def _by_itself(name: str) -> ModuleType:
    host = importlib.import_module("spikingjelly")
    package = ModuleType(_PACKAGE)
    package.__path__ = [f"{folder}/datasets" for folder in host.__path__]
    imported = sys.modules.setdefault(_PACKAGE, package)
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    finally:
        if imported is package:
            del sys.modules[_PACKAGE]
