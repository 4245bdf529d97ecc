"""Refuse to export a QIF neuron to NIR."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from qif_plugins.neuron.module import NO_NIR

from .neuron import QIF


def refuse_export() -> None:
    """Make ``snntorch.export_nir`` raise for a QIF, which it would export as the LIF neuron that it inherits from."""
    if find_spec("nir") is None or find_spec("nirtorch") is None:
        return
    from snntorch import export_nir

    host = getattr(export_nir, "_extract_snntorch_module", None)
    if host is None:  # private, so a later snnTorch may rename it; the neurons do not depend on it
        return

    def extract(module: nn.Module) -> Any:
        if isinstance(module, QIF):
            raise NotImplementedError(NO_NIR)
        return host(module)

    export_nir._extract_snntorch_module = extract
