"""Find how a swap changes the input gain and the firing rate of each neuron, for the report.

With an example, copies of the model run on it before and after the swap, and their spikes are counted. Without one,
the LIF and the QIF neuron each run alone for a few steps on the same normally distributed currents. If a norm feeds the
neuron, mean and deviation of the currents are the norm's bias and weight; otherwise they are 0 and the threshold, as
windows assume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..neuron.observe import Seen, watching
from ..neuron.parameters import QIFParameters
from .find import Survey
from .hosts import Host
from .report import Reason, Terms, shared
from .trial import reset_state, trial
from .walk import Site, neurons

STEPS, NEURONS = 16, 4096
FACTOR = 2.0
"""Factor by which a firing rate must change for the report to mention it."""
SATURATED = 0.9
"""Spikes a step above which a layer hardly depends on its input."""
DENSE = 0.5
"""Spikes a step above which the report warns of a layer that spiked less than half as often before."""
SILENT = 0.01
"""Spikes a step below which a layer is silent; the report mentions no change between smaller rates."""


@dataclass(frozen=True)
class Dynamics:
    """Dynamics of a neuron: h[t+1] = (charge(h[t]) or, after a spike, fired(h[t])) + gain x[t+1].

    Attributes:
        gain: Factor on the input.
        threshold: Threshold θ.
        start: Membrane before the first step.
        charge: Maps the membranes of neurons that did not spike to the next step, without input.
        fired: Does the same for neurons that spiked.
    """

    gain: float
    threshold: float
    start: float
    charge: Callable[[Tensor], Tensor]
    fired: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def rate(self, currents: Tensor) -> float:
        """Compute spikes per neuron and step under ``currents`` ``[T, N]``."""
        left = self.charge(torch.full_like(currents[0], self.start))
        spikes = 0.0
        for x in currents:
            h = left + self.gain * x
            fires = h >= self.threshold
            spikes += fires.float().mean().item()
            left = torch.where(fires, self.fired(h), self.charge(h))
        return spikes / len(currents)


def leaky(beta: Any, gain: Any, threshold: Any, v_reset: Any = 0.0, rest: Any = 0.0, subtracted: Any = 0.0) -> Dynamics:
    """Describe LIF with leak β towards ``rest``. A tensor of several values is replaced by its mean.

    Args:
        beta: Leak β.
        gain: Factor on the input.
        threshold: Threshold θ.
        v_reset: Membrane after a spike; ``None`` subtracts.
        rest: Potential that it leaks to, and starts at.
        subtracted: Amount that a spike takes from the membrane after the leak, if ``v_reset`` is ``None``.
    """
    beta, gain, threshold, rest, subtracted = (mean_of(value) for value in (beta, gain, threshold, rest, subtracted))
    after = None if v_reset is None else mean_of(v_reset)

    def charge(v: Tensor) -> Tensor:
        return rest + beta * (v - rest)

    def fired(h: Tensor) -> Tensor:
        return charge(h) - subtracted if after is None else charge(torch.full_like(h, after))

    return Dynamics(gain, threshold, rest, charge, fired)


def quadratic(params: QIFParameters, scale: Any = 1.0) -> Dynamics:
    """Describe QIF. A tensor of several values is replaced by its mean.

    Args:
        params: The neuron.
        scale: Further factor on the input. Default 1.
    """
    one = params.with_numbers(**{n: mean_of(v) for n, v in params.numbers().items()})
    start: Any = one.v_reset if one.reset == "hard" else 0.0

    def fired(h: Tensor) -> Tensor:
        return one.map(torch.full_like(h, start)) if one.reset == "hard" else one.map(one.after_soft_reset(h))

    return Dynamics(mean_of(one.input_gain) * mean_of(scale), mean_of(one.v_threshold), start, one.map, fired)


def measured_rates(found: Survey, hosts: Sequence[Host]) -> dict[str, float]:
    """Count spikes while a copy of the model runs on the example.

    A norm that has seen no batch normalizes by the example's own statistics, as it will in training. A model that runs
    a single time step a call is called several times.

    Args:
        found: The model's survey.
        hosts: The hosts of its neurons.

    Returns:
        Spikes per neuron and step, by the neuron's name; NaN if its input has NaN or infinite values. Empty without an
        example, and if the copy does not run: its neurons may be set to a GPU's backend while the example is on the
        CPU, or the example may have one sample, which a norm cannot normalize.
    """
    if found.example is None:
        return {}
    model, call = found.example
    counts: dict[str, list[int]] = {}

    def see(seen: Seen) -> None:
        counts.setdefault(seen.name, []).append(seen.spikes.numel())
        spikes[seen.name] = spikes.get(seen.name, 0) + int(seen.spikes.count_nonzero())

    spikes: dict[str, int] = {}
    broken: set[str] = set()

    def look(name: str, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not bool(args[0].isfinite().all()):
            broken.add(name)

    try:
        with trial(model, hosts) as twin, torch.no_grad():
            reset_state(twin)
            for module in twin.modules():
                if isinstance(module, _NormBase) and module.num_batches_tracked is not None:
                    module.train(not bool(module.num_batches_tracked))
            sites = neurons(twin, hosts)
            for site in sites:
                site.module.register_forward_pre_hook(lambda _, args, name=site.name: look(name, args))
            with watching({site.name: site.module for site in sites}, see):
                call.copied().run(twin)
                if all(len(sizes) == 1 for sizes in counts.values()):
                    repeats = 0 if any(site.host.takes_sequences(site.module) for site in sites) else STEPS - 1
                    for _ in range(repeats):
                        call.copied().run(twin)
    except Exception:  # whatever a user's model raises; the report says what the rates rest on
        return {}
    return {name: math.nan if name in broken else spikes[name] / max(sum(sizes), 1) for name, sizes in counts.items()}


@dataclass(frozen=True)
class Expected:
    """The firing rate that is expected of a neuron.

    Attributes:
        gain: Factor on its input.
        rate: Spikes per neuron and step; NaN where the currents are not finite.
        source: The measurement or assumption behind the rate.
        currents: Currents ``[T, N]`` that it was computed from; ``None`` if it was measured.
        assumed: Whether the currents are assumed because the neuron's input is unknown. Default False.
    """

    gain: float
    rate: float
    source: str | Reason
    currents: Tensor | None = None
    assumed: bool = False


def expected(
    site: Site,
    norms: Mapping[str, nn.Module],
    measured: Mapping[str, float],
    terms: Terms,
    before: Expected | None = None,
) -> Expected | None:
    """Find the firing rate of the neuron at ``site``; ``None`` if its parameters are on the meta device.

    Args:
        site: Its place.
        norms: The model's norms, by name.
        measured: The rates that were measured, by the neuron's name.
        terms: The user's names of the choices.
        before: The result for the LIF neuron before the swap. Its currents are used again unless a norm feeds the
            neuron.
    """
    if not has_values(site.module):
        return None
    if before is not None and before.currents is None and site.name not in measured:
        return None
    dynamics = site.host.dynamics(site.module)
    if site.name in measured:
        return Expected(dynamics.gain, measured[site.name], f"measured on {terms.example}")
    known = _known([norms[name] for name in site.norms])
    assumed = False
    source: str | Reason
    if known:
        others = [*site.weights, *site.direct, *(["its recurrent input"] if hasattr(site.module, "recurrent") else [])]
        without = f", without what {', '.join(others)} adds" if others else ""
        currents = _normal(known)
        source = Reason(f"at the moments of {', '.join(site.norms)}{without}", f"at the norm's moments{without}")
    elif before is not None and before.currents is not None:
        currents, source, assumed = before.currents, before.source, before.assumed
    else:
        assumed = True
        scale = torch.tensor([dynamics.threshold / (dynamics.gain or 1.0)], dtype=torch.float32, device="cpu")
        currents = _normal([(torch.zeros_like(scale), scale.abs())])
        source = f"under a current of mean 0 whose deviation is the threshold{terms.measures('it')}"
    rate = dynamics.rate(currents) if bool(currents.isfinite().all()) else math.nan
    return Expected(dynamics.gain, rate, source, currents, assumed)


def compared(
    before: Expected | None,
    after: Expected | None,
    site: Site,
    swapped: bool,
    chosen: bool,
    keeping: str,
    terms: Terms,
) -> tuple[tuple[float, float] | None, list[str | Reason]]:
    """Compare a neuron before and after the swap.

    Args:
        before: The LIF neuron; ``None`` if its parameters are on the meta device, or if it is no LIF neuron.
        after: The neuron in its place.
        site: Its place. Silence of a readout is not mentioned, because it may be decoded by its membrane.
        swapped: Whether it was replaced.
        chosen: Whether the gain was chosen because of the norm that feeds it.
        keeping: The call that keeps LIF's gain in every neuron; empty if every neuron has it.
        terms: The user's names of the choices.

    Returns:
        The rates before and after in spikes per neuron and step, and clauses for the report: a gain that changed, a
        rate that changed by more than a factor of two, a layer that saturates, falls silent or was silent already.
    """
    if before is None or after is None:
        return None, []
    if math.isnan(before.rate) or math.isnan(after.rate):
        unknown = "WARNING: its input has NaN or infinite values, so its rate is unknown"
        return None, [Reason(f"{unknown} ({before.source})", f"{unknown} ({shared(before.source)})")]
    said: list[str | Reason] = []
    own_gain_changed = abs(after.gain - before.gain) > 1e-3 * abs(before.gain)
    if own_gain_changed:
        said.append(f"input gain {after.gain:.4g} instead of LIF's {before.gain:.4g}")
    was, now = before.rate, after.rate
    changed = max(was, now) >= SILENT and max(was, now) > FACTOR * min(was, now)
    saturated, dense = now > SATURATED >= was, now > DENSE and changed and now > was
    if changed:
        more = "more" if now > was else "less"
        spikes = f"it spikes {more}"
        rates = f"expected firing rate {now:.2g} instead of {was:.2g} a step, so {spikes} ({after.source})"
        said.append(Reason(rates, f"{spikes} ({shared(after.source)})"))
        if saturated or dense:
            pass  # a warning follows
        elif own_gain_changed and was < now:
            if chosen:
                said.append(f"intended: with this gain the norm's scale reaches the neuron; {keeping} keeps LIF's gain")
            elif terms.passes_arguments:
                said.append(f"pass input_gain={before.gain:.4g} to keep LIF's")
        elif not own_gain_changed and keeping and after.currents is None:
            said.append(
                f"its gain is LIF's, its input comes from neurons whose gain changed; {keeping} keeps LIF's gain in "
                "every neuron"
            )
    cure = "a higher v_threshold lowers the rate"
    if keeping:
        cure = f"{keeping} keeps LIF's gain in every neuron, {cure}"
    if saturated:
        said.append(f"WARNING: saturated, it spikes in nearly every step whatever arrives; {cure}")
    elif dense:
        said.append(f"WARNING: close to saturation, it spikes in more than half of its steps; {cure}")
    if now < SILENT <= was:
        said.append(
            "WARNING: silent, hardly a neuron spikes; a norm before it brings its input to the threshold's scale, a "
            "lower v_threshold raises the rate"
        )
    if max(was, now) < SILENT and not (site.reads_out or after.assumed):
        little = "hardly a neuron spikes, so little reaches the layers after it; health(model, batch) says what to do"
        said.append(
            Reason(
                f"silent with LIF, too ({was:.2g} and {now:.2g} spikes a step, {after.source}): {little}",
                f"silent with LIF, too ({shared(after.source)}): {little}",
            )
        )
    elif said and not swapped:
        changes = "its input changed: "
        said[0] = Reason(f"{changes}{said[0]}", changes + shared(said[0]))
    return (was, now), said


def _moments(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Read mean and deviation of a norm's output, by channel; ``None`` if its parameters do not determine them."""
    if isinstance(norm, nn.LocalResponseNorm):
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if any(t is not None and t.is_meta for t in (weight, bias)):
        return None
    std = torch.ones(1, dtype=torch.float32, device="cpu") if weight is None else _plain(weight).abs()
    return (torch.zeros_like(std) if bias is None else _plain(bias)), std


def _known(norms: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Read the moments of all these norms; an empty list if those of one are unknown."""
    moments = [_moments(norm) for norm in norms]
    known = [both for both in moments if both is not None]
    return known if len(known) == len(moments) else []


def deviation_after(norms: Sequence[nn.Module]) -> float | None:
    """Return the deviation of the summed outputs of norms, over all channels; ``None`` if it is unknown or 0."""
    total = sum(std.double().square().mean().item() for _, std in _known(norms)) ** 0.5
    return total if 0 < total < math.inf else None


def _normal(moments: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Draw currents ``[T, N]``: sums of normal ones with these means and deviations, independent in time."""
    if len({len(std) for _, std in moments}) > 1:
        moments = [(mean.mean()[None], std.square().mean().sqrt()[None]) for mean, std in moments]
    mean = torch.stack([mean for mean, _ in moments]).sum(0)
    std = torch.stack([std for _, std in moments]).square().sum(0).sqrt()
    size = (STEPS, max(1, NEURONS // len(std)), len(std))
    draws = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return (mean + std * draws).flatten(1)


def _plain(values: Tensor) -> Tensor:
    return values.detach().flatten().to("cpu", torch.float32)


def has_values(module: nn.Module) -> bool:
    """Whether no parameter or buffer is on the meta device."""
    return not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def mean_of(value: Any) -> float:
    """Return a number, or the mean of a tensor."""
    return value.detach().double().mean().item() if isinstance(value, Tensor) else float(value)
