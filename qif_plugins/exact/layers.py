"""Layers of continuous-time neurons as modules, to be stacked with ``nn.Sequential``.

The equations are in :func:`~qif_plugins.exact.functional.spiking_layer`. For the pseudospikes (arXiv 2309.14523), the
drive at the trial's end, D = I(T) + W·phase of the presynaptic neurons, becomes constant and large enough for further
spikes, with s(D) = scale · softplus(D / scale). (A neuron about to spike has phase 1, as if it had spiked.)

    QIF    τV' = (V - 1/2)² + s(D)                 period πτ/√s,   phase arccot((1/2 - V)/√s)/π
    theta  τV' = (V - 1/2)² + J - 1/4, V(T) + W·phase in V's place, the same formulas with s = J - 1/4
    LIF    τV' = -V + 1 + s(D + J)                 period τ log((1 + s)/s),   phase from V(T) likewise

A LIF spike can vanish in the middle of a trial; its spike times then jump in spite of the pseudospikes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import MAX_SPIKES, EndState, spiking_layer
from .spikes import Spikes


class SpikingLayer(nn.Module):
    """Base class of :class:`QIFLayer`, :class:`ThetaLayer` and :class:`LIFLayer`.

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
        pseudo_scale: Scale of the softplus in s(D), > 0. Default 10 for QIF, as in the code published with arXiv
            2309.14523, and 1 for LIF, whose pseudospikes at 10 all come within 0.14 τ. Unused by theta neurons.
        max_spikes: Spikes per sample before :class:`~qif_plugins.exact.functional.EventBudgetError`. Default 2^20.
        dtype: float64 (default) or float32, which is computed in float64 and rounded once.

    Weights are drawn from N(μ, μ²), μ = 2/√in_features. Before training,
    :func:`~qif_plugins.exact.initialise` scales them to a wanted activity on data. Those of theta neurons, which are
    active without input, are drawn from N(0, μ²/4).

    Raises:
        ValueError: ``duration``, ``tau`` or ``pseudo_scale`` is not positive, or a delay negative.
    """

    model: ClassVar[str]
    default_pseudo_scale: ClassVar[float] = 10.0

    def __init__(
        self, in_features: int, out_features: int, duration: float, tau: float = 1.0, *, recurrent: bool = False,
        recurrent_delay: float = 0.0, delay: float | None = None, synaptic_delays: bool = False,
        learn_v0: bool = False, pseudo_scale: float | None = None, max_spikes: int = MAX_SPIKES,
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
        spread = 1 / math.sqrt(in_features)
        mean = 0.0 if self.model == "theta" else 2 * spread
        self.weight = nn.Parameter(torch.randn(out_features, in_features, dtype=dtype) * (mean or spread) + mean)
        self.recurrent_weight = self.delay = self.v0 = None
        if recurrent:
            spread = 0.5 / math.sqrt(out_features)
            self.recurrent_weight = nn.Parameter(torch.randn(out_features, out_features, dtype=dtype) * spread)
        if delay is not None:
            shape = (out_features, in_features) if synaptic_delays else (in_features,)
            self.delay = nn.Parameter(torch.full(shape, float(delay), dtype=dtype))
        if learn_v0:
            rest = 0.5 if self.model == "theta" else 0.0
            self.v0 = nn.Parameter(torch.full((out_features,), rest, dtype=dtype))

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
        if spikes.channels != self.in_features:
            raise ValueError(f"the layer has {self.in_features} inputs, the spikes {spikes.channels} channels")
        recurrent = self.recurrent_weight is not None
        out = spiking_layer(
            self.model, spikes.times, spikes.indices, self.weight, self.duration, tau=self.tau,
            delay=None if self.delay is None else self.delay.clamp(min=0), recurrent_weight=self.recurrent_weight,
            recurrent_delay=self.weight.new_full((self.out_features,), self.recurrent_delay) if recurrent else None,
            v0=self.v0, current=self._current(), max_spikes=self.max_spikes,
        )  # fmt: skip
        drive = out.end.current.new_zeros(())
        if spikes.phase is not None:
            drive = drive + spikes.phase.to(self.weight.dtype) @ self.weight.t()
        if self.recurrent_weight is not None:
            drive = drive + self._continuation(out.end, drive)[0] @ self.recurrent_weight.t()
        phase, period = self._continuation(out.end, drive)
        return Spikes(out.times, out.indices, self.out_features, phase, period, self.duration)

    def _current(self) -> Tensor | float:
        return 0.0

    def _sufficient(self, drive: Tensor) -> Tensor:
        return self.pseudo_scale * F.softplus(drive / self.pseudo_scale)

    def _continuation(self, end: EndState, drive: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``phase`` and ``period`` of the pseudospikes, [B, N], from W·phase of the presynaptic neurons."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        shown = f"{self.in_features}, {self.out_features}, duration={self.duration:g}, tau={self.tau:g}"
        if self.recurrent_weight is not None:
            shown += f", recurrent_delay={self.recurrent_delay:g}"
        return shown + (f", delays={list(self.delay.shape)}" if self.delay is not None else "")


class QIFLayer(SpikingLayer):
    """Layer of QIF neurons, τV' = V(V - 1) + I. Its arguments are those of :class:`SpikingLayer`."""

    model = "qif"

    def _continuation(self, end: EndState, drive: Tensor) -> tuple[Tensor, Tensor]:
        assert end.q is not None
        root = self._sufficient(end.current + drive).sqrt()
        phase = torch.atan2(root * end.q, end.q / 2 - end.p) / math.pi
        return phase.to(root.dtype), self.tau * math.pi / root


class ThetaLayer(SpikingLayer):
    """Layer of theta neurons, τV' = V(V - 1) + J.

    Args:
        current: J > 1/4. Default 1.25.

    The other arguments are those of :class:`SpikingLayer`.

    Raises:
        ValueError: ``current`` is not above 1/4.
    """

    model = "theta"

    def __init__(
        self, in_features: int, out_features: int, duration: float, tau: float = 1.0, *, current: float = 1.25,
        **options: object,
    ) -> None:  # fmt: skip
        if not 0.25 < current < math.inf:
            raise ValueError(f"a theta neuron needs a constant current above 1/4 (it oscillates), got {current}")
        super().__init__(in_features, out_features, duration, tau, **options)  # type: ignore[arg-type]
        self.current = float(current)

    def _current(self) -> Tensor | float:
        return self.current

    def _continuation(self, end: EndState, drive: Tensor) -> tuple[Tensor, Tensor]:
        assert end.q is not None
        root = math.sqrt(self.current - 0.25)
        phase = (torch.atan2(root * end.q, -end.p - drive * end.q) / math.pi).to(self.weight.dtype)
        return phase, torch.full_like(phase, self.tau * math.pi / root)


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

    def _continuation(self, end: EndState, drive: Tensor) -> tuple[Tensor, Tensor]:
        above = self._sufficient(end.current + drive + self._current())
        period = torch.log1p(1 / above)
        # Below the reset the phase is negative: further from the next spike than just after one.
        left = torch.log1p((1 - end.v) / above)
        return 1 - left / period, self.tau * period
