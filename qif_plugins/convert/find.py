"""Find the places of a model's neurons: which modules feed each neuron, and which neurons read out.

With an example input, a copy of the model runs on it, see :mod:`~qif_plugins.convert.flow`. Without one, the order in
which the modules were registered decides, as far as it can, see :mod:`~qif_plugins.convert.order`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .flow import trace
from .hosts import Host
from .order import place
from .trial import Call
from .walk import NORMS, Site, neurons, walk

_LIKE_A_NEURON = re.compile(r"LIF|IF(?![a-z])|[Ss]pik(e|ing)|[Nn]euron")


@dataclass
class Survey:
    """The neurons of a model, in order, and their places.

    Attributes:
        sites: One for each neuron.
        norms: The normalizations, by name.
        readout_unknown: The reason why the readout is unknown; empty if it is known.
        norms_unknown: The reason why it is unknown which neurons the normalizations feed; empty if it is known.
        handwritten: Classes that belong to no host but are named like a neuron.
        example: The model and the call that showed its data flow; ``None`` without one.
    """

    sites: list[Site]
    norms: dict[str, nn.Module]
    readout_unknown: str = ""
    norms_unknown: str = ""
    handwritten: Sequence[str] = ()
    example: tuple[nn.Module, Call] | None = None

    @property
    def depth(self) -> int:
        """Largest :attr:`~qif_plugins.convert.walk.Site.depth` of the neurons; 0 if it is unknown."""
        return max((site.depth for site in self.sites), default=0)


def survey(model: nn.Module, hosts: Sequence[Host], example_input: Any = None) -> Survey:
    """Find the neurons and their places.

    Args:
        model: Any module.
        hosts: The hosts whose neurons to look for.
        example_input: The model's argument, a tuple of them, a dict of them by name, or a
            :class:`~qif_plugins.convert.trial.Call`; ``None`` to go by the registration order.

    Raises:
        ValueError: The model does not run on the example input, or its copy cannot be made.
    """
    sites = neurons(model, hosts)
    if not sites:
        names = {type(module).__name__ for module in model.modules()}
        return Survey([], {}, handwritten=sorted(name for name in names if _LIKE_A_NEURON.search(name)))
    norms = {name: m for name, m, found in walk(model, hosts) if not found and isinstance(m, NORMS)}
    if len(sites) == 1 and sites[0].module is model:
        sites[0].how = "the model is the neuron"
        return Survey(sites, norms)
    if example_input is not None:
        call = Call.of(example_input, model)
        trace(model, hosts, sites, call)
        return Survey(sites, norms, example=(model, call))
    return Survey(sites, norms, *place(model, hosts, sites))
