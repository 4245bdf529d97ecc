"""Layers of continuous-time neurons as modules, to be stacked with ``nn.Sequential``.

The equations are in :func:`~qif_plugins.exact.functional.spiking_layer`. For the pseudospikes (arXiv 2309.14523), the
drive at the trial's end, D = I(T) + W·phase of the presynaptic neurons, becomes constant and large enough for further
spikes, with s(D) = scale · softplus(D / scale). (A neuron about to spike has phase 1, as if it had spiked.)

    QIF    τV' = (V - 1/2)² + s(D)                 period πτ/√s,   phase arccot((1/2 - V)/√s)/π
    theta  τV' = (V - 1/2)² + J - 1/4, V(T) + W·phase in V's place, the same formulas with s = J - 1/4
    LIF    τV' = -V + 1 + s(D + J)                 period τ log((1 + s)/s),   phase from V(T) likewise
    oscillating LIF    τV' = -V + J, min(V(T) + W·phase, 1) in V's place, the same with s = J - 1

The phase that a QIF or LIF neuron of a recurrent layer sends to the others follows from V(T) alone, with D = 0, as in
the code published with arXiv 2309.14523: when a spike passes T, the currents of its receivers jump, and their phases
must not. Neurons without a current receive a spike in V; there the phase follows from V(T) and the inputs' phases, and
when a spike of the layer itself passes T, the pseudospikes of its receivers' receivers jump.

A LIF spike can vanish in the middle of a trial; its spike times then jump in spite of the pseudospikes.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adjoint import MODELS
from .continuation import continuation
from .functional import MAX_SPIKES, EndState, Traces, spiking_layer, spiking_traces
from .spikes import Spikes


class SpikingLayer(nn.Module):
    """Base class of :class:`QIFLayer`, :class:`ThetaLayer`, :class:`LIFLayer` and :class:`OscillatingLIFLayer`.

    Args:
        in_features: Number of inputs.
        out_features: Number N of neurons.
        duration: Trial length T, in the unit of the spike times.
        tau: Membrane time constant; the synapse's is half of it. Default 1.
        recurrent: Whether the neurons are connected to each other. Default False.
        recurrent_delay: Delay of those connections. Default 0.
        delay: Initial value of one learnable delay per input; negative values that an optimizer reaches count as 0.
            Default ``None``: no delays.
        synaptic_delays: Whether ``delay`` is one per synapse instead. Default False.
        learn_v0: Whether the initial membrane is learned. Default False.
        learn_i0: Whether the initial synaptic current, 0 at first, is learned. Default False.
        mask: [out_features, in_features] bool, which inputs reach which neurons. Default: all.
        recurrent_mask: [N, N] bool, which neurons (columns) reach which others (rows); needs ``recurrent``. With blocks
            of True, the layer is any graph of populations in one event loop. Default: all.
        pseudo_scale: Scale of the softplus in s(D), > 0. Default 10 for QIF, as in the code published with arXiv
            2309.14523, and 1 for LIF, whose pseudospikes at 10 all come within 0.14 τ. Unused by theta neurons.
        max_spikes: Spikes per sample before :class:`~qif_plugins.exact.functional.EventBudgetError`. Default 2^20.
        dtype: float64 (default) or float32, which is computed in float64 and rounded once.

    Weights are drawn from N(μ, μ²), μ = 2/√in_features. Before training,
    :func:`~qif_plugins.exact.initialise` scales them to a wanted activity on data. Those of theta neurons, which are
    active without input, are drawn from N(0, μ²/4).

    Raises:
        ValueError: ``duration``, ``tau`` or ``pseudo_scale`` is not positive, a delay is negative, a mask has another
            shape or type, or an option does not go with the others; the message says which.
    """

    model: ClassVar[str]
    oscillates: ClassVar[bool] = False
    mask: Tensor | None
    recurrent_mask: Tensor | None
    phase0: nn.Parameter | None
    default_pseudo_scale: ClassVar[float] = 10.0

    def __init__(
        self, in_features: int, out_features: int, duration: float, tau: float = 1.0, *, recurrent: bool = False,
        recurrent_delay: float = 0.0, delay: float | None = None, synaptic_delays: bool = False,
        learn_v0: bool = False, learn_i0: bool = False, mask: Tensor | None = None,
        recurrent_mask: Tensor | None = None, pseudo_scale: float | None = None, max_spikes: int = MAX_SPIKES,
        dtype: torch.dtype = torch.float64,
    ) -> None:  # fmt: skip
        super().__init__()
        pseudo_scale = self.default_pseudo_scale if pseudo_scale is None else pseudo_scale
        for name, value in (("duration", duration), ("tau", tau), ("pseudo_scale", pseudo_scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, value in (("delay", delay or 0.0), ("recurrent_delay", recurrent_delay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if synaptic_delays and (delay is None or recurrent):
            raise ValueError("synaptic_delays needs a delay to start from and no recurrence; pass delay=0.0 or drop it")
        self.in_features, self.out_features = in_features, out_features
        self.duration, self.tau, self.recurrent_delay = float(duration), float(tau), float(recurrent_delay)
        self.pseudo_scale, self.max_spikes = pseudo_scale, max_spikes
        if recurrent_mask is not None and not recurrent:
            raise ValueError("recurrent_mask is of recurrent connections; pass recurrent=True as well")
        masks = {
            "mask": (mask, (out_features, in_features)),
            "recurrent_mask": (recurrent_mask, (out_features, out_features)),
        }
        for which, (given, shape) in masks.items():
            if given is not None and (given.dtype != torch.bool or given.shape != shape):
                raise ValueError(f"{which} must be {list(shape)} bool, got {list(given.shape)} {given.dtype}")
            self.register_buffer(which, given)
        spread = 1 / math.sqrt(in_features)
        mean = 0.0 if self.oscillates else 2 * spread
        self.weight = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype) * (mean or spread) + mean)
        self.recurrent_weight = self.delay = self.v0 = self.i0 = self.phase0 = None
        if recurrent:
            spread = 0.5 / math.sqrt(out_features)
            self.recurrent_weight = nn.Parameter(torch.randn(out_features, out_features, dtype=dtype) * spread)
        if delay is not None:
            sizes = (out_features, in_features) if synaptic_delays else (in_features,)
            self.delay = nn.Parameter(torch.full(sizes, float(delay), dtype=dtype))
        if learn_v0:
            rest = 0.5 if self.model == "theta" else 0.0
            self.v0 = nn.Parameter(torch.full((out_features,), rest, dtype=dtype))
        if learn_i0 and self.oscillates:
            raise ValueError(f"{type(self).__name__} has no synaptic current to learn; pass learn_phase=True")
        if learn_i0:
            self.i0 = nn.Parameter(torch.zeros(out_features, dtype=dtype))
        with torch.no_grad():
            self.weight.copy_(self._connected(self.weight, mask))
            if self.recurrent_weight is not None:
                self.recurrent_weight.copy_(self._connected(self.recurrent_weight, recurrent_mask))

    def forward(self, spikes: Spikes) -> Spikes:
        """Compute the layer's spikes and their continuation beyond the trial.

        Args:
            spikes: Input trains with ``in_features`` channels; a preceding layer's output or :class:`Spikes`.

        Returns:
            Trains with ``out_features`` channels.

        Raises:
            ValueError: Wrong spike trains or parameters, see :func:`~qif_plugins.exact.functional.spiking_layer`.
            EventBudgetError: More than ``max_spikes`` spikes in one sample.
        """
        self._check_channels(spikes)
        options = self._options()
        out = spiking_layer(self.model, spikes.times, spikes.indices, duration=self.duration, **options)
        drive, current = None, self._current()
        if spikes.phase is not None:
            drive = spikes.phase.to(self.weight.dtype) @ options["weight"].t()
        if self.recurrent_weight is not None:
            alone = torch.zeros_like(out.end.current)
            if self.oscillates and drive is not None:
                alone = drive
            sent = self._continuation(out.end, alone, current)[0] @ options["recurrent_weight"].t()
            drive = sent if drive is None else drive + sent
        drive = out.end.current if drive is None else out.end.current + drive
        phase, period = self._continuation(out.end, drive, current)
        return Spikes(out.times, out.indices, self.out_features, phase, period, self.duration)

    def traces(self, spikes: Spikes, times: Tensor) -> Traces:
        """Compute every neuron's membrane and synaptic current at given times, exactly; without a gradient.

        Args:
            spikes: Input trains as for :meth:`forward`. For a layer in a stack, the output of the one before it.
            times: [P] times in [0, T], in any order. At the time of an event the state is that just after it.

        Returns:
            ``times``, and membranes and currents, [B, P, out_features]. Membranes of QIF and theta neurons are infinite
            at their spikes, so a plot needs limits.

        Raises:
            ValueError: Wrong spike trains or times.
        """
        self._check_channels(spikes)
        options = self._options()
        return spiking_traces(self.model, spikes.times, spikes.indices, duration=self.duration, at=times, **options)

    def _check_channels(self, spikes: Spikes) -> None:
        if spikes.channels != self.in_features:
            raise ValueError(f"the layer has {self.in_features} inputs, the spikes {spikes.channels} channels")

    @staticmethod
    def _connected(weight: Tensor, mask: Tensor | None) -> Tensor:
        return weight if mask is None else weight * mask

    def _options(self) -> dict[str, Any]:
        """Collect the arguments of :func:`spiking_layer` that the layer holds."""
        weight, recurrent, delay, phase0 = self.weight, self.recurrent_weight, self.delay, self.phase0
        options: dict[str, Any] = {
            "weight": self._connected(weight, self.mask), "tau": self.tau, "current": self._current(),
            "max_spikes": self.max_spikes, "v0": self.v0, "i0": self.i0,
        }  # fmt: skip
        if delay is not None:
            options["delay"] = delay.clamp(min=0)
        if phase0 is not None:
            options["phase0"] = phase0.clamp(0, 1)
        if recurrent is not None:
            options["recurrent_weight"] = self._connected(recurrent, self.recurrent_mask)
            options["recurrent_delay"] = weight.new_full((self.out_features,), self.recurrent_delay)
        return options

    def _current(self) -> Tensor | float:
        return 0.0

    def _continuation(self, end: EndState, drive: Tensor, current: Tensor | float) -> tuple[Tensor, Tensor]:
        """Compute ``phase`` and ``period`` of the pseudospikes, [B, N], from D."""
        constant = 0.0
        if isinstance(current, Tensor):
            drive = drive + current
        else:
            constant = current
        return continuation(MODELS[self.model], end.p, end.q, drive, constant, self.pseudo_scale, self.tau)

    def extra_repr(self) -> str:
        shown = f"{self.in_features}, {self.out_features}, duration={self.duration:g}, tau={self.tau:g}"
        if self.recurrent_weight is not None:
            shown += f", recurrent_delay={self.recurrent_delay:g}"
        return shown + (f", delays={list(self.delay.shape)}" if self.delay is not None else "")


class QIFLayer(SpikingLayer):
    """Layer of QIF neurons, τV' = V(V - 1) + I. Its arguments are those of :class:`SpikingLayer`."""

    model = "qif"


class _OscillatingLayer(SpikingLayer):
    """Layer of neurons that oscillate without input, and have no synaptic current."""

    oscillates = True
    lowest: ClassVar[float]

    def __init__(
        self, in_features: int, out_features: int, duration: float, tau: float = 1.0, *, current: float = 1.25,
        learn_phase: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        if not self.lowest < current < math.inf:
            raise ValueError(
                f"{type(self).__name__} needs a constant current above {Fraction(self.lowest)} (it oscillates), "
                f"got {current}"
            )
        if learn_phase and options.get("learn_v0"):
            raise ValueError("learn_v0 and learn_phase learn the same; pass one of them")
        super().__init__(in_features, out_features, duration, tau, **options)
        self.current = float(current)
        if learn_phase:
            self.phase0 = nn.Parameter(torch.full_like(self.weight[:, 0], 0.5, requires_grad=False))

    def _current(self) -> Tensor | float:
        return self.current


class ThetaLayer(_OscillatingLayer):
    """Layer of theta neurons, τV' = V(V - 1) + J.

    Args:
        current: J > 1/4. Default 1.25.
        learn_phase: Whether the initial phase ``phase0``, 1/2 at first, is learned: the share of its period that a
            neuron is through at t = 0. Values outside [0, 1] that an optimizer reaches count as 0 or 1. Default False.

    The other arguments are those of :class:`SpikingLayer`.

    Raises:
        ValueError: ``current`` is not above 1/4.
    """

    model = "theta"
    lowest = 0.25


class OscillatingLIFLayer(_OscillatingLayer):
    """Layer of LIF neurons that spike without input, τV' = -V + J, spike at 1, reset to 0.

    An input spike adds its weight to V, at most up to the threshold, where the neuron spikes at once. Spikes appear and
    vanish at the trial's end alone, but times jump where an input arrives just as the neuron spikes: just before, the
    reset discards it, or it delays the spike. The neuron is one of those in the code published with arXiv 2309.14523.

    Args:
        current: J > 1. Default 1.25.
        learn_phase: As for :class:`ThetaLayer`, but without it neurons start at the reset, V = 0.

    The other arguments are those of :class:`SpikingLayer`.

    Raises:
        ValueError: ``current`` is not above 1.
    """

    model = "olif"
    lowest = 1.0


class LIFLayer(SpikingLayer):
    """Layer of LIF neurons, τV' = -V + I + J.

    Args:
        learn_current: Whether J, [N], is learned, starting from 0. Default False: J = 0.

    The other arguments are those of :class:`SpikingLayer`.
    """

    model = "lif"
    default_pseudo_scale = 1.0

    def __init__(
        self, in_features: int, out_features: int, duration: float, tau: float = 1.0, *, learn_current: bool = False,
        **options: object,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, duration, tau, **options)  # type: ignore[arg-type]
        self.current = nn.Parameter(self.weight.new_zeros(out_features)) if learn_current else None

    def _current(self) -> Tensor | float:
        return 0.0 if self.current is None else self.current
