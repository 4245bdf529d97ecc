"""A QIF neuron that goes on learning the leak of the ``ParametricLIFNode`` in whose place it stands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.spikingjelly import QIFNode
from ..adapters.spikingjelly._common import QIFNeuron
from ..adapters.spikingjelly.parametric import FIXED, LEARNED, ParametricQIFNeuron
from ..neuron.following import WindowMemory
from ..neuron.parameters import QIFParameters

__all__ = ["LeakQIFNode", "LearnedLeak"]

MIN_LEAK = 1e-4
"""How near a learned leak may come to 0 and to 1: the matched map needs both apart, and float32 some distance."""


class LearnedLeak(ParametricQIFNeuron):
    """Mixed in before a QIFNode that was given a ``tau``.

    Its one parameter is that of ``ParametricLIFNode``: sigmoid(w) = 1/tau. The map matches the leak 1 - sigmoid(w)
    at every step, see :meth:`qif_plugins.QIFParameters.matching_lif`, and the window follows. Where
    ``decay_input`` scales the input by 1/tau, that is learned with it.
    """

    w: nn.Parameter
    _params: QIFParameters
    raw_names = ("w",)

    def _configure(self, params: QIFParameters, *args: Any) -> dict[str, Any]:
        return QIFNeuron._configure(self, params, *args)

    def _learn(self, channels: int | None = None) -> None:
        self.channels = None
        assert self.tau is not None
        self.w = nn.Parameter(torch.full((), -math.log(self.tau - 1)))  # in the default dtype, as any parameter
        self._window_memory = WindowMemory()
        self._window_changed()

    @property
    def dynamics(self) -> str:
        """``"lif"``: a leak is matched, the one learned."""
        return "lif"

    def _leak_tau(self) -> Any:
        return 1 / torch.sigmoid(self.w.detach().double())

    @property
    def params(self) -> QIFParameters:
        """The neuron as the core describes it; tensors with gradient."""
        if not self._has_raw():
            # The host's constructor runs before there are parameters.
            return self._params
        w = self.w.to(torch.promote_types(self.w.dtype, torch.float32))
        rate = torch.sigmoid(w).clamp(MIN_LEAK, 1 - MIN_LEAK)
        matched = self._matched(rate, self._params, checked=False)
        # The base class takes each of the three for a tensor; u1, the resting potential, is a number.
        numbers = matched.numbers()
        for name in LEARNED:
            number = numbers[name]
            if not isinstance(number, Tensor):
                numbers[name] = rate.new_full((), number)
        return QIFParameters.unchecked(**numbers, reset=matched.reset)

    def _matched(self, rate: Any, fixed: QIFParameters, checked: bool = True) -> QIFParameters:
        return QIFParameters.matching_lif(
            1 - rate,
            fixed.v_threshold,
            input_gain=1.0 if self.decay_input is False else rate,
            v_rest=0.0 if fixed.reset == "soft" else fixed.v_reset,  # type: ignore[arg-type]
            reset=fixed.reset,
            checked=checked,
        )

    @property
    def input_gain(self) -> Any:
        """Factor on the input, as learned so far where the input is decayed."""
        return self.params.input_gain

    def _numbers(self) -> tuple[Any, Any, Any]:
        params = self.params
        return params.a, params.u1, params.u2

    def __setattr__(self, name: str, value: Any) -> None:
        QIFNeuron.__setattr__(self, name, value)

    def _assign(self, name: str, value: Any, store: Callable[[], None]) -> None:
        if name == "decay_input" and value is not None:
            before = self.decay_input
            store()
            try:
                self._window_changed()
            except ValueError:
                self.__dict__["decay_input"] = before
                raise
            return
        self._refuse(name, value, "the leak is learned: tau is 1/sigmoid(w), and the map follows w", FIXED[:2])
        super()._assign(name, value, store)

    def _replace(self, **changes: Any) -> None:
        """Assign threshold or reset; the map goes on matching the leak."""
        if all(getattr(self._params, name) == value for name, value in changes.items()):
            return
        fixed = dataclasses.replace(self._params, **changes)
        self._params = self._matched(torch.sigmoid(self.w.detach().double()).item(), fixed)
        self._link = None
        self._window_changed()

    def _window_changed(self) -> None:
        if not self.w.is_meta:
            super()._window_changed()


class LeakQIFNode(LearnedLeak, QIFNode):
    """In the place of ``ParametricLIFNode``."""

    def __init__(self, tau: float = 2.0, decay_input: bool = True, **arguments: Any) -> None:
        super().__init__(tau, decay_input, **arguments)
        self._learn()


if find_spec("spikingjelly.clock_driven") is not None:
    from ..adapters.spikingjelly import clock_driven

    class ClockDrivenLeakQIFNode(LearnedLeak, clock_driven.QIFNode):
        """In the place of ``clock_driven``'s ``ParametricLIFNode``."""

        def __init__(self, tau: float = 2.0, decay_input: bool = True, **arguments: Any) -> None:
            super().__init__(tau, decay_input, **arguments)
            self._learn()

    class MultiStepLeakQIFNode(LearnedLeak, clock_driven.MultiStepQIFNode):
        """In the place of ``clock_driven``'s ``MultiStepParametricLIFNode``."""

        def __init__(self, tau: float = 2.0, decay_input: bool = True, **arguments: Any) -> None:
            super().__init__(tau, decay_input, **arguments)
            self._learn()
