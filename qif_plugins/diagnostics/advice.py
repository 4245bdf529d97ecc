"""Name the causes that keep QIF layers from training, with their cures.

:func:`~qif_plugins.health` prints the advice of :func:`advise` on each layer, and of :func:`advise_network` on all of
them together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.find import survey
from ..convert.hosts import loaded_hosts
from ..convert.norms import is_tdbn
from ..convert.trial import Call
from ..neuron.module import QIFLayer
from ..support.text import percent, plus_minus
from .statistics import average

if TYPE_CHECKING:
    from .health import LayerHealth

ONE_STEP = "measured over one time step; pass steps=T or a callable that runs the model over all its steps"
"""Advice on a layer whose membrane had no time to leave rest, so that its spikes and gradient may mislead."""

REACH = 3.0
"""Largest distance of the threshold from the membrane's mean, in deviations, for which a window around the threshold
contains membranes."""
DEAD = 0.9
"""Share of silent neurons from which on a layer is dead."""
SATURATED = 0.5
"""Share of saturated neurons from which on a layer is saturated."""
LARGE = 30.0
"""Deviation of the input, in units of the distance from rest to threshold, from which on the input is too large. On
scikit-learn's digits a network without norm has 93.6 % at 0.6 and 6, 91.0 at 56 and 89.9 at 560; LIF has 91.6 and 94.8,
92.3 and 90.3."""
STARVED = 0.02
"""Share of membranes, or of the gradient, inside the window below which a layer is starved."""
REBOUND = 0.1
"""Share of rebounding membranes from which on ``"rebound"`` is reported. The paper's neuron has 0.03 under tdBN."""
REBOUND_SPIKES = 0.5
"""Share of spikes caused by a rebound from which on it is reported. The paper's neuron has 0.24 under tdBN."""
FORGETS = 0.1
"""Slope of a map at rest below which it has no memory. The paper's map has -0.125."""
CONSTANT = 0.9
"""Correlation of the input with that of the step before above which the input is constant."""
DEEP = 6
"""Number of layers from which on a map without memory costs accuracy under any input: with nine, 83 % (LIF 94 %)."""
GROWTH = 20.0
"""Growth or decay of the mean square of the gradient, as a factor, above which ``"window's width"`` is reported."""
ISOMETRIC = 1.15
"""Factor per layer that still counts as 1, as does its inverse."""


Cause = Literal["memory", "window's width", "window's scale", "input's scale", "rebound"]
CAUSES: tuple[Cause, ...] = get_args(Cause)
"""Names of the causes that keep QIF layers from training."""
Advice = tuple[Cause | None, str]
"""A cause, or ``None`` for a problem of another kind, and a sentence with the numbers and the cure."""


@dataclass(frozen=True)
class InputPlace:
    """Place of a layer in the model, and the advice on its input that follows from it.

    Attributes:
        cure: Advice on the scale of the input, as an imperative that begins in lower case.
        normed: Whether it is known that a norm feeds the layer.
    """

    cure: str
    normed: bool


def advise(row: LayerHealth, layer: QIFLayer, place: InputPlace, *, one_step: bool) -> list[Advice]:
    """Name the causes that keep a layer from training, and their cures, the most urgent first.

    Args:
        row: The layer's measurements.
        layer: The layer.
        place: Its place, from :func:`input_places`.
        one_step: Whether it ran a single time step. Then its membrane had no time to leave rest, and most advice on
            spikes and window is left out.

    Returns:
        One or more sentences for each cause; empty for a healthy layer. If values are not finite, only these are
        reported, since the other measurements mean nothing then.
    """
    not_finite: list[Advice] = [(None, sentence) for sentence in _not_finite(row, layer)]
    return not_finite or _causes(row, layer, place, one_step)


def advise_network(
    rows: Sequence[LayerHealth], layers: Mapping[str, QIFLayer], places: Mapping[str, InputPlace]
) -> list[tuple[Cause, str]]:
    """Name the causes that several layers have together.

    Args:
        rows: The layers' measurements.
        layers: The layers by name.
        places: Their places, from :func:`input_places`.
    """
    measured = [row for row in rows if math.isfinite(row.membrane_std)]
    return [*_memory(measured), *_width([row for row in measured if places[row.name].normed], layers)]


def _memory(rows: Sequence[LayerHealth]) -> list[tuple[Cause, str]]:
    forgetful = [row for row in rows if row.memory < FORGETS and not math.isnan(row.spike_repeats)]
    constant = [row for row in forgetful if row.input_repeats > CONSTANT]
    found = constant if len(forgetful) < DEEP else forgetful
    if not found:
        return []
    if found is constant:
        repeats = sum(row.spike_repeats for row in found) / len(found)
        why = (
            f"its input hardly changes from step to step (correlation {min(row.input_repeats for row in found):.2f}), "
            f"so that {percent(repeats)} of its neurons repeat the step before"
        )
    else:
        why = f"nothing adds up over the time steps in any of {len(found)} layers"
    return [
        (
            "memory",
            f"memory: the map of {_names(found)} keeps {min(row.memory for row in found):.3g} of a membrane from step "
            f"to step, and {why}. Match a leak, as swap(model) does: pass tau= or beta= instead of dynamics='paper'.",
        )
    ]


def _width(rows: Sequence[LayerHealth], layers: Mapping[str, QIFLayer]) -> list[tuple[Cause, str]]:
    gains = [row.gain for row in rows if row.gain > 0 and math.isfinite(row.gain)]
    passing = [row.gradient_square for row in rows if row.gradient_square > 0]
    if len(gains) < 2 or len(passing) < 2:
        return []
    total = math.prod(gains)
    average_gain, measured = total ** (1 / len(gains)), passing[0] / passing[-1]
    # Shortcuts lead past the layers, so the product holds for a chain only: the gradient itself must show it, too.
    grows = total > GROWTH and measured > math.sqrt(GROWTH) and average_gain > ISOMETRIC
    shrinks = total < 1 / GROWTH and measured < 1 / math.sqrt(GROWTH) and average_gain < 1 / ISOMETRIC
    others = [row for row in rows if layers[row.name].derived_window != "isometric"]
    if not (grows or shrinks):
        return []
    cure = (
        f"Use window='isometric' in {_names(others)}, whose width makes the factor 1."
        if others
        else "Their isometric surrogates have the width for many time steps and the input that they assume: "
        "calibrate(model, batches, moments='measured') fits them to this batch."
    )
    return [
        (
            "window's width",
            f"window's width: each layer multiplies the mean square of the gradient by {average_gain:.3g} on its way "
            f"back, {len(gains)} layers by {total:.3g}; measured, the first of them has {measured:.3g} times the "
            f"squared gradient of the last. {cure}",
        )
    ]


def _names(rows: Sequence[LayerHealth]) -> str:
    names = [row.name for row in rows]
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} layers ({names[0]} to {names[-1]})"


def _not_finite(row: LayerHealth, layer: QIFLayer) -> list[str]:
    if not (math.isfinite(row.input_mean) and math.isfinite(row.input_std)):
        return ["its input is not finite: look for the first NaN or infinity before it."]
    found = []
    if not (math.isfinite(row.membrane_mean) and math.isfinite(row.membrane_std)):
        found.append(on_runaway(layer, row.membrane_mean, row.membrane_std))
    if not math.isfinite(row.gradient):
        found.append(
            f"the gradient that arrives at its spikes is not finite ({row.gradient}): search the loss and the layers "
            "after this one, with torch.autograd.detect_anomaly()."
        )
    if derives(layer) and not (math.isfinite(row.predicted_mean) and math.isfinite(row.predicted_std)):
        found.append(
            "the membrane that its window assumes is not finite: with its current parameters the closure does not "
            "converge for the input that the window assumes. Lower v_threshold, or a."
        )
    return found


def _causes(row: LayerHealth, layer: QIFLayer, place: InputPlace, one_step: bool) -> list[Advice]:
    threshold, scale_input = average(layer.qif_parameters.v_threshold), place.cure
    reach = threshold - average(layer.qif_parameters.fixed_points()[0])
    scale = f"its input is {row.input} and its threshold {threshold:.3g}"
    dead = row.silent >= DEAD and not one_step
    saturated = row.saturated >= SATURATED
    large = row.input_std >= LARGE * reach
    rebounds = row.rebound >= REBOUND or row.rebound_spikes >= REBOUND_SPIKES
    found: list[Advice] = []

    def tell(cause: Cause | None, sentence: str) -> None:
        found.append((cause, sentence))

    if one_step:
        tell(None, f"{ONE_STEP}.")
    if dead and row.input_mean < -max(row.input_std, reach):
        tell(
            "input's scale",
            f"dead: {percent(row.silent)} of its neurons never spike; {scale}. Inhibition keeps it silent: raise the "
            f"mean of its input, by the bias of the layer before it, or {scale_input}.",
        )
    elif dead:
        gain = f", take a gain {reach / row.input_std:.3g} times as large" if row.input_std > 0 else ""
        tell(
            "input's scale",
            f"dead: {percent(row.silent)} of its neurons never spike; {scale}. Bring the input to the threshold's "
            f"scale: {scale_input}{gain}, or lower v_threshold{surrogate_with_tails(layer)}.",
        )
    if saturated:
        own_gain = " or LIF's own gain (swap(model, dynamics='monotone'))" if place.normed else ""
        tell(
            "input's scale",
            f"saturated: {percent(row.saturated)} of its neurons spike at nearly every step; {scale}. Reduce the "
            f"input: {scale_input}, take smaller weights{own_gain}, or raise v_threshold.",
        )
    elif large:
        tell(
            "input's scale",
            f"too large: {scale}, so that its deviation is {row.input_std / reach:.3g} times the distance from rest to "
            f"threshold. The sign of a step's input decides whether a neuron spikes, and {percent(row.near)} of its "
            "membranes are as near to the threshold as rest is, where the surrogate gradient is large. Reduce the "
            f"input: scale the data, {scale_input}, or take a gain {reach / row.input_std:.3g} times as large.",
        )
    if rebounds:
        tell(
            "rebound",
            f"rebound: {percent(row.rebound)} of its membranes lie below {_rebound_point(layer):.3g}, where the "
            "parabola is above the threshold again, so that strong negative input makes these neurons spike at the "
            f"next step; the rise below the vertex causes {percent(row.rebound_spikes)} of its spikes; {scale}. Match "
            f"the leak by the map without rebound (dynamics='monotone'), or reduce the input: {scale_input}, take "
            "smaller weights; `qif phase` shows the point.",
        )
    if one_step:
        # A membrane that is still near rest is outside the window, so no gradient reaches the layers before.
        return found
    starved = row.window_share < STARVED or row.gradient_share < STARVED
    if starved:
        by_input = dead or saturated or large
        tell(
            "input's scale" if by_input else "window's scale",
            f"starved: {percent(row.window_share)} of its membranes and {percent(row.gradient_share)} of its gradient "
            f"fall into the window. {'Its input comes first, see above.' if by_input else _widen(layer, scale_input)}",
        )
    elif math.isnan(row.gradient_share) and layer.fires_in_operator:
        tell(None, "no gradient arrives: no layer after it passes one back, or the output does not depend on it.")
    # A window cannot help if the input is the problem or the threshold is out of reach: calibrate changes nothing then.
    within_reach = abs(threshold - row.membrane_mean) <= REACH * row.membrane_std
    if derives(layer) and _misses(row) and within_reach and not (dead or starved or rebounds or large):
        tell(
            "window's scale",
            f"window's scale: its window assumes a membrane of {row.predicted}, and it is {row.membrane}: "
            f"{_calibration(layer)} fits the window to it.",
        )
    return found


def surrogate_with_tails(layer: QIFLayer) -> str:
    """Return the advice to take a surrogate with tails if the derived one is a rectangle; else an empty string."""
    if layer.derived_window in (None, "isometric"):
        return ""
    return f"; or use a surrogate with tails, window='isometric', instead of the {layer.derived_window} rectangle"


def _rebound_point(layer: QIFLayer) -> float:
    """Return the lower root of f(v) = θ."""
    params = layer.qif_parameters
    vertex = (params.u1 + params.u2) / 2
    above = torch.as_tensor((params.v_threshold - params.map(vertex)) / params.a, dtype=torch.float64, device="cpu")
    return average(vertex - above.clamp(min=0).sqrt())


def _widen(layer: QIFLayer, scale_input: str) -> str:
    if layer.derived_window is None:
        return "Its surrogate was given: widen it, or leave it out for the isometric Gaussian."
    if layer.derived_window in ("isometric", "unbiased"):  # centred on the threshold, with the membrane's own width
        return (
            f"Its membranes stay away from the threshold: bring the input to the threshold's scale: {scale_input}"
            f"{surrogate_with_tails(layer)}."
        )
    return f"The {layer.derived_window} window misses its membranes near the threshold: use window='isometric'."


def _calibration(layer: QIFLayer) -> str:
    closure = "input_mean" in layer.measured_moments and not layer.learns_window
    return f"calibrate(model, batches{', moments=' + repr('measured') if closure else ''})"


def _misses(row: LayerHealth) -> bool:
    """Return whether the membrane differs from the one that the window assumes."""
    if not row.membrane_std > 0:
        return False
    ratio = row.predicted_std / row.membrane_std
    return abs(row.predicted_mean - row.membrane_mean) > 0.5 * row.membrane_std or not 1 / 1.5 <= ratio <= 1.5


def derives(layer: QIFLayer) -> bool:
    """Return whether the layer's window follows from the moments of its membrane."""
    return layer.derived_window not in (None, "heuristic")


def on_runaway(layer: QIFLayer, mean: float, std: float) -> str:
    """Return the advice on a membrane that is not finite although its input is."""
    found = f"its membrane is not finite ({plus_minus(mean, std)}), though its input is: "
    if layer.qif_parameters.reset == "soft" and layer.qif_parameters.rebound:
        return found + (
            "the soft reset leaves a large membrane large, and the map squares it. Use dynamics='monotone', which "
            "bounds it, or the hard reset, v_reset=0 or reset_mechanism='zero'."
        )
    return found + (
        "strongly negative input takes it far below rest, and the map squares it. Normalize or clamp the input."
    )


def input_places(
    model: nn.Module, layers: Mapping[str, QIFLayer], example: Call | None = None
) -> dict[str, InputPlace]:
    """Find for each layer, by name, the norm that scales its input, and the advice on that scale.

    The norm that feeds a layer is found by the order of registration, as in :func:`~qif_plugins.swap`, or else by the
    data flow of the example. A layer without a norm gets other advice, because ``swap(model, norm="tdbn")`` converts
    norms but inserts none.

    Args:
        model: The model.
        layers: Its QIF layers by name.
        example: A call of the model; ``None`` (default) for the order alone.
    """
    found = survey(model, loaded_hosts())
    if found.norms_unknown and example is not None:
        with contextlib.suppress(ValueError):
            found = survey(model, loaded_hosts(), example)
    sites = {id(site.module): site for site in found.sites}
    places = {}
    for name, layer in layers.items():
        site = sites.get(id(layer))
        if site is None or not site.norms_known:
            cure = (
                "check that tdBN comes before it (swap(model, norm='tdbn') turns a batch norm into tdBN, but inserts "
                "none; qif_plugins.neuron.norm has TDBatchNorm1d to 3d)"
            )
        elif not site.norms:
            cure = (
                "insert tdBN before it, as no normalization feeds it (TDBatchNorm1d to 3d of qif_plugins.neuron.norm), "
                "scale its weights before training (initialise(model, batch))"
            )
        elif all(isinstance(found.norms[norm], _BatchNorm) and not is_tdbn(found.norms[norm]) for norm in site.norms):
            cure = f"turn {', '.join(site.norms)}, which feeds it, into tdBN (swap(model, norm='tdbn'))"
        else:
            cure = f"change the scale of {', '.join(site.norms)}, which feeds it (its weight and bias)"
        places[name] = InputPlace(cure, bool(site and site.norms_known and site.norms))
    return places
