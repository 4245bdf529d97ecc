"""How a swap changes what reaches a neuron and how often it fires, for the report.

Both neurons are run on the same currents for a few steps: those that its norm hands it (mean and deviation of a norm's
output are its bias and weight), else those that arrived with ``example_input``, else normal ones of the scale that
windows assume, whose deviation is the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron.parameters import QIFParameters
from .walk import Site

__all__ = ["Dynamics", "compared", "leaky", "mean_of", "quadratic", "regime"]

STEPS, NEURONS = 16, 4096
FACTOR = 2.0
"""A firing rate that changes by more than this is told."""
SATURATED = 0.9
"""Spikes a step above which a layer hardly depends on its input."""
SILENT = 0.01
"""Spikes a step of which no more is said: with fewer before and after, nothing much happens there."""


@dataclass(frozen=True)
class Dynamics:
    """What decides a neuron's firing rate; h[t+1] = (charge(h[t]) or, after a spike, fired(h[t])) + gain x[t+1].

    Attributes:
        gain: Factor on the input.
        threshold: Threshold θ.
        start: Membrane before the first step.
        charge: What is left of a membrane one step on.
        fired: What is left of one that spiked.
    """

    gain: float
    threshold: float
    start: float
    charge: Callable[[Tensor], Tensor]
    fired: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def rate(self, currents: Tensor) -> float:
        """Spikes per neuron and step under ``currents`` ``[T, N]``."""
        left = self.charge(torch.full_like(currents[0], self.start))
        spikes = 0.0
        for x in currents:
            h = left + self.gain * x
            fires = h >= self.threshold
            spikes += fires.float().mean().item()
            left = torch.where(fires, self.fired(h), self.charge(h))
        return spikes / len(currents)


def leaky(beta: Any, gain: Any, threshold: Any, v_reset: Any = 0.0, rest: Any = 0.0, subtracted: Any = 0.0) -> Dynamics:
    """LIF with leak β towards ``rest``; numbers of several values stand for their mean.

    Args:
        beta: Leak β.
        gain: Factor on the input.
        threshold: Threshold θ.
        v_reset: Membrane after a spike; ``None`` subtracts.
        rest: Potential that it leaks to, and starts at.
        subtracted: What a spike takes away once the leak is through, where ``v_reset`` is ``None``.
    """
    beta, gain, threshold, rest, subtracted = (mean_of(value) for value in (beta, gain, threshold, rest, subtracted))
    after = None if v_reset is None else mean_of(v_reset)

    def charge(v: Tensor) -> Tensor:
        return rest + beta * (v - rest)

    def fired(h: Tensor) -> Tensor:
        return charge(h) - subtracted if after is None else charge(torch.full_like(h, after))

    return Dynamics(gain, threshold, rest, charge, fired)


def quadratic(params: QIFParameters, scale: Any = 1.0) -> Dynamics:
    """QIF; numbers of several values stand for their mean.

    Args:
        params: The neuron.
        scale: Factor on the input before it.
    """
    one = QIFParameters.unchecked(**{n: mean_of(v) for n, v in params.numbers().items()}, reset=params.reset)
    start: Any = one.v_reset if one.reset == "hard" else 0.0

    def fired(h: Tensor) -> Tensor:
        return one.map(torch.full_like(h, start)) if one.reset == "hard" else one.map(h - one.v_threshold)

    return Dynamics(mean_of(one.input_gain) * mean_of(scale), mean_of(one.v_threshold), start, one.map, fired)


@dataclass(frozen=True)
class Regime:
    """A neuron and the currents that it is looked at under.

    Attributes:
        dynamics: The neuron.
        currents: ``[T, N]``.
        source: Where they come from.
    """

    dynamics: Dynamics
    currents: Tensor
    source: str


def regime(site: Site, norms: Mapping[str, nn.Module], before: Regime | None = None) -> Regime | None:
    """How the neuron at ``site`` is driven; ``None`` where its numbers have no values yet.

    Args:
        site: Its place.
        norms: The model's norms, by name.
        before: The same before the swap, whose currents stay where no norm decides on them.
    """
    if any(t.is_meta for t in (*site.module.parameters(), *site.module.buffers())):
        return None
    dynamics = site.host.dynamics(site.module)
    moments = [_moments(norms[name]) for name in site.norms]
    found = [both for both in moments if both is not None]
    if found and len(found) == len(moments):
        others = [*site.weights, *site.direct]
        without = f", without what {', '.join(others)} adds" if others else ""
        return Regime(dynamics, _normal(found), f"at the moments of {', '.join(site.norms)}{without}")
    if before is not None:
        return Regime(dynamics, before.currents, before.source)
    if site.currents:
        steps = [step for step in site.currents if step.shape == site.currents[0].shape]
        return Regime(dynamics, torch.stack(steps), "measured on example_input")
    scale = torch.tensor([dynamics.threshold / (dynamics.gain or 1.0)], dtype=torch.float32, device="cpu")
    source = "under a current of mean 0 whose deviation is the threshold"
    return Regime(dynamics, _normal([(torch.zeros_like(scale), scale.abs())]), source)


def compared(before: Regime | None, after: Regime | None, normed: bool) -> tuple[tuple[float, float] | None, list[str]]:
    """Compare a neuron before and after the swap.

    Args:
        before: The LIF neuron; ``None`` where its numbers have no values yet, or it is no LIF neuron.
        after: The neuron in its place.
        normed: Whether a norm feeds it.

    Returns:
        The expected rates before and after, spikes a neuron and step, and what there is to say about gain and rates: a
        gain that changed, a rate that changed by more than a factor of two, a layer that saturates or falls silent.
    """
    if before is None or after is None:
        return None, []
    for one in (before, after):
        if not one.currents.isfinite().all():
            return None, [f"WARNING: its input has NaN or infinite values, so that no rate is expected ({one.source})"]
    said = []
    gain, new_gain = before.dynamics.gain, after.dynamics.gain
    if changed_gain := abs(new_gain - gain) > 1e-3 * abs(gain):
        said.append(f"input gain {new_gain:.4g} instead of LIF's {gain:.4g}")
    was, now = before.dynamics.rate(before.currents), after.dynamics.rate(after.currents)
    if max(was, now) >= SILENT and max(was, now) > FACTOR * min(was, now):
        more = "more" if now > was else "less"
        said.append(f"expected firing rate {now:.2g} instead of {was:.2g} a step, so it spikes {more} ({after.source})")
        if changed_gain and was < now <= SATURATED:
            said.append(
                "intended: with an input gain of 1 the norm's scale reaches the neuron; swap(model, dynamics='lif') "
                "keeps LIF's gain"
                if normed and new_gain == 1
                else f"pass input_gain={gain:.4g} to keep LIF's"
            )
    if now > SATURATED >= was:
        said.append(
            "WARNING: saturated, it spikes in nearly every step whatever arrives; swap(model, dynamics='lif') keeps "
            "LIF's gain, a higher v_threshold lowers the rate"
        )
    if now < SILENT <= was:
        said.append(
            "WARNING: silent, hardly a neuron spikes; a norm before it brings its input to the threshold's scale, a "
            "lower v_threshold raises the rate"
        )
    return (was, now), said


def _moments(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of a norm's output, by channel; ``None`` where its parameters do not tell."""
    if isinstance(norm, nn.LocalResponseNorm):
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if any(t is not None and t.is_meta for t in (weight, bias)):
        return None
    std = torch.ones(1, dtype=torch.float32, device="cpu") if weight is None else _plain(weight).abs()
    return (torch.zeros_like(std) if bias is None else _plain(bias)), std


def _normal(moments: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Currents ``[T, N]`` that are the sum of normal ones of these means and deviations, independent in time."""
    if len({len(std) for _, std in moments}) > 1:
        moments = [(mean.mean()[None], std.square().mean().sqrt()[None]) for mean, std in moments]
    mean = torch.stack([mean for mean, _ in moments]).sum(0)
    std = torch.stack([std for _, std in moments]).square().sum(0).sqrt()
    size = (STEPS, max(1, NEURONS // len(std)), len(std))
    draws = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return (mean + std * draws).flatten(1)


def _plain(values: Tensor) -> Tensor:
    return values.detach().flatten().to("cpu", torch.float32)


def mean_of(value: Any) -> float:
    """A number; of a tensor its mean."""
    return value.detach().double().mean().item() if isinstance(value, Tensor) else float(value)
