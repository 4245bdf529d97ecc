"""A QIF neuron that replaces a ``ParametricLIFNode`` and goes on learning its leak."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.spikingjelly import QIFNode
from ..adapters.spikingjelly.parametric import LearnedMap
from ..neuron.arguments import NodeArguments
from ..neuron.module import undone_on_error
from ..neuron.parameters import QIFParameters

MIN_LEAK = 1e-4
"""Least distance of a learned leak from 0 and from 1, where no map matches it; large enough for float32."""


class LearnedLeak(LearnedMap):
    """Mixin for a QIFNode that learns the leak which its map matches.

    Its only parameter w is that of ``ParametricLIFNode``: sigmoid(w) = 1/tau. At every step the map matches the leak
    1 - sigmoid(w), see :meth:`qif_plugins.QIFParameters.matching_lif`, and the window follows. With ``decay_input``
    the input gain is sigmoid(w) and is learned along with the leak, unless ``input_gain`` is given;
    assigning ``None`` to that takes it back.
    """

    w: nn.Parameter
    _params: QIFParameters
    _arguments: NodeArguments
    raw_names = ("w",)
    unassigned = "the leak is learned: tau is 1/sigmoid(w), and the map follows w"

    def __init__(self, tau: float = 2.0, decay_input: bool = True, **arguments: Any) -> None:
        super().__init__(tau, decay_input, **arguments)
        assert self.tau is not None
        self.w = nn.Parameter(torch.full((), -math.log(self.tau - 1)))  # in the default dtype, as any parameter
        self._window_changed()

    def _matched_tau(self) -> Any:
        return 1 / self._rate(self.w.detach().double())

    def _learned_params(self) -> QIFParameters:
        return self._matched(self._rate(self.w.to(torch.promote_types(self.w.dtype, torch.float32))), self._params)

    @staticmethod
    def _rate(w: Tensor) -> Tensor:
        """Compute 1/tau, clamped to the range in which a map matches it."""
        return torch.sigmoid(w).clamp(MIN_LEAK, 1 - MIN_LEAK)

    def _matched(self, rate: Any, fixed: QIFParameters, checked: bool = False) -> QIFParameters:
        follows = 1.0 if self.decay_input is False else rate
        gain = self._arguments.input_gain
        return QIFParameters.matching_lif(
            1 - rate,
            fixed.v_threshold,
            input_gain=follows if gain is None else gain,
            v_rest=0.0 if fixed.reset == "soft" else fixed.v_reset,  # type: ignore[arg-type]
            reset=fixed.reset,
            rebound=self._arguments.map.rebound,
            checked=checked,
        )

    def _assign(self, name: str, value: Any, store: Callable[[Any], None]) -> None:
        if (name, value is None) not in (("decay_input", False), ("input_gain", True)):
            super()._assign(name, value, store)
            return
        with undone_on_error(self):
            if value is None:
                self._arguments = dataclasses.replace(self._arguments, input_gain=None)
            else:
                store(bool(value))
            self._window_changed()

    def _replace(self, **changes: Any) -> None:
        """Assign a threshold, a reset or an input gain; the map still matches the leak."""
        fixed = dataclasses.replace(self._params, **changes)
        rest = None if fixed.reset == "soft" else fixed.v_reset
        self._arguments = self._arguments.resting_at(rest, self._open_to_leak)
        if "input_gain" in changes:
            self._arguments = dataclasses.replace(self._arguments, input_gain=changes["input_gain"])
        self._params = self._matched(self._rate(self.w.detach().double()).item(), fixed, checked=True)
        self._window_changed()

    def _window_changed(self) -> None:
        if not self.w.is_meta:
            super()._window_changed()


class LeakQIFNode(LearnedLeak, QIFNode):
    """QIFNode that replaces ``ParametricLIFNode``."""


if find_spec("spikingjelly.clock_driven") is not None:
    from ..adapters.spikingjelly import clock_driven

    class ClockDrivenLeakQIFNode(LearnedLeak, clock_driven.QIFNode):
        """QIFNode that replaces ``clock_driven``'s ``ParametricLIFNode``."""

    class MultiStepLeakQIFNode(LearnedLeak, clock_driven.MultiStepQIFNode):
        """QIFNode that replaces ``clock_driven``'s ``MultiStepParametricLIFNode``."""
