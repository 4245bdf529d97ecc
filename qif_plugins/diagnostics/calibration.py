"""Derive windows from the input that the layers of a model receive.

The analytic windows assume the input that tdBN gives, g·x ~ N(0, θ²). A layer without tdBN receives a different input.
:func:`calibrate` measures it on real batches and derives every layer's window from the measurement.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..convert.trial import unwrapped
from ..neuron.module import QIFLayer
from ..neuron.moments import MomentClosureError, firing_rate, membrane_moments
from ..support.names import check_known
from ..support.text import plus_minus, text_table
from .advice import ONE_STEP, REACH, derives, input_places, on_runaway, surrogate_with_tails
from .running import Batches, check_steps, run_all
from .spiking import LayerStatistics, MeasuredLayer, measured, qif_layers
from .statistics import Moments, average

__all__ = ["CalibratedLayer", "CalibrationReport", "CalibrationWarning", "calibrate"]

SKEWNESS_LIMIT = 1.0
KURTOSIS_LIMIT = 3.0
MEAN_LIMIT = 0.25
"""Largest tolerated |predicted - measured| of the membrane's mean, in measured deviations."""
STD_LIMIT = 1.25
"""Largest tolerated ratio of the membrane's predicted and measured deviations, and of the measured to the predicted."""


class CalibrationWarning(UserWarning):
    """Warns that a layer's input or membrane differs from the one that its window assumes."""


@dataclass(frozen=True, kw_only=True)
class CalibratedLayer(MeasuredLayer):
    """Measurements of one layer, and its window afterwards. The closure predicts its moments from the measured input.

    Attributes:
        samples: Number of neuron-steps that were measured.
        skewness: Skewness of g·x; 0 for a normal distribution.
        kurtosis: Excess kurtosis of g·x; 0 for a normal distribution.
        predicted_rate: Spikes per neuron-step, by the closure.
        window: The window's ends, ``(lo, hi)``, with ``per="channel"`` averaged over the channels; ``None`` if the
            layer's surrogate is not derived.
        changed: Whether the window was set.
        note: A remark on this layer, or ``""``.
    """

    samples: int = 0
    skewness: float = math.nan
    kurtosis: float = math.nan
    predicted_rate: float = math.nan
    window: tuple[float, float] | None = None
    changed: bool = False
    note: str = ""


@dataclass(frozen=True)
class CalibrationReport:
    """Measurements of :func:`calibrate` and the windows that it set; ``str()`` is a table.

    Attributes:
        layers: One entry for each layer, in the model's order.
    """

    layers: tuple[CalibratedLayer, ...]

    def __str__(self) -> str:
        header = (
            "layer", "input", "skew", "kurt", "membrane", "predicted", "spikes/step", "predicted", "window",
        )  # fmt: skip
        rows = [
            (
                row.name, row.input, f"{row.skewness:.2f}", f"{row.kurtosis:.2f}", row.membrane, row.predicted,
                f"{row.rate:.4f}", f"{row.predicted_rate:.4f}",
                "given" if row.window is None else f"[{row.window[0]:.3g}, {row.window[1]:.3g}]",
            )
            for row in self.layers
        ]  # fmt: skip
        notes = [f"{row.name}: {row.note}" for row in self.layers if row.note]
        return "\n".join([text_table(header, rows), *([""] if notes else []), *notes])


class _Statistics(LayerStatistics):
    """Statistics of one layer, also for each channel if ``per`` says so, and the number of runs."""

    def __init__(self, per: str) -> None:
        super().__init__()
        self.input_channels = Moments() if per == "channel" else None
        self.membrane_channels = Moments() if per == "channel" else None
        self.step_dims = 0
        self.runs = 0

    def add_step(self, x: Tensor, h: Tensor) -> None:
        super().add_step(x, h)
        self.step_dims = x.dim()
        if self.input_channels is not None and self.membrane_channels is not None:
            self.input_channels.update(_by_channel(x))
            self.membrane_channels.update(_by_channel(h))

    def streams(self) -> list[Moments]:
        return [s for s in (self.input, self.membrane, self.input_channels, self.membrane_channels) if s is not None]


def calibrate(
    model: nn.Module,
    batches: Batches,
    per: Literal["layer", "channel"] = "layer",
    *,
    moments: Literal["closure", "measured"] = "closure",
    steps: int = 1,
) -> CalibrationReport:
    """Measure the input of every QIF layer on real batches and derive the layers' windows from it.

    The model runs in its present mode (training or evaluation), without gradient, and each batch starts from reset
    membranes. Only the windows change; modes, membranes, batch-norm statistics, hooks and random numbers are restored.
    If there is an error, or a warning that was made an error, the windows stay as well.

    Two kinds of layers keep their surrogate. One is a layer whose surrogate was given (``surrogate_function``,
    ``spike_grad``, a ``Window``). The other is a layer whose threshold is out of reach, more than three deviations from
    the mean of the membrane: a window fitted there would be narrow and far from every membrane, and no gradient would
    pass. So calibrate once the layers spike.

    The measured moments become part of the model's state_dict, see :mod:`qif_plugins.neuron.module`. Under
    DistributedDataParallel call it in every process; the measurements are pooled.

    Args:
        model: A model with QIF layers, of either host.
        batches: Batches to run the model on: tensors, or tuples or lists whose first element is the input, such as
            those of a DataLoader; a single batch; or a callable that takes the model and runs it in its own way, such
            as over time. The callable resets the state itself.
        per: ``"layer"`` (default), or ``"channel"``: one window for each entry of the first dimension after the batch.
            A channel that does not vary, or whose threshold is out of reach, gets the moments of the layer.
        moments: ``"closure"`` (default) computes the membrane's moments from the measured input. ``"measured"`` takes
            those measured at the membrane itself, for layers whose input is so far from independent in time that no
            closure fits. A layer that learns its parameters always uses the closure, which follows them.
        steps: How often to call the model on each batch, without a reset in between; for models that take one time
            step per call. Default 1.

    Returns:
        The report with the measurements and the windows; ``str()`` is a table.

    Raises:
        ValueError: No QIF layer, no batch or only empty ones, an input that is not finite, or an unknown option.
        TypeError: ``batches`` holds something else, or the model takes more than one input.

    Warns:
        CalibrationWarning: A layer's input is far from normal (absolute skewness above 1, or absolute excess kurtosis
            above 3); the closure misses the measured membrane (its mean by more than a quarter of a deviation, its
            deviation by a factor of more than 1.25) or does not converge; the threshold is out of reach; a membrane is
            not finite; or a layer did not run. For a layer that saw one time step per batch the warning names this
            instead of its membrane, which had no time to leave rest.
    """
    check_known("per", ("layer", "channel"), per)
    check_known("moments", ("closure", "measured"), moments)
    check_steps(steps)
    inner = unwrapped(model)
    layers = qif_layers(inner)
    statistics = {name: _Statistics(per) for name in layers}
    with measured(inner, layers, statistics), torch.no_grad():
        count = run_all(inner, batches, steps, "calibrate")
    for seen in statistics.values():
        seen.runs = count
    if inner is not model and isinstance(model, nn.parallel.DistributedDataParallel):
        _pool(list(statistics.values()))
    if any(s.steps for s in statistics.values()) and not any(s.input.n for s in statistics.values()):
        raise ValueError("every batch is empty: no neuron received a value. Pass one with at least one sample.")
    return _set(layers, statistics, moments, {name: place.cure for name, place in input_places(inner, layers).items()})


def _set(
    layers: dict[str, QIFLayer], statistics: dict[str, _Statistics], moments: str, scales: dict[str, str]
) -> CalibrationReport:
    before = {name: layer.measured_moments for name, layer in layers.items()}
    try:
        rows = [_set_layer(name, layer, statistics[name], moments, scales[name]) for name, layer in layers.items()]
        for row in rows:
            if row.note:
                warnings.warn(f"{row.name}: {row.note}", CalibrationWarning, stacklevel=3)
    except BaseException:
        for name, layer in layers.items():
            layer.measured_moments = before[name]
        raise
    return CalibrationReport(tuple(rows))


def _set_layer(name: str, layer: QIFLayer, seen: _Statistics, moments: str, scale_input: str) -> CalibratedLayer:
    if not seen.input.n:
        note = "the batches did not reach it, or a subclass computes its own steps; its window is unchanged"
        return CalibratedLayer(name=name, window=_window(layer), note=note)
    found = seen.moments()
    mean, std = found["input_mean"], found["input_std"]
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise ValueError(
            f"layer {name} received an input that is not finite; look for the NaN where the model runs before it"
        )
    membrane = found["membrane_mean"], found["membrane_std"]
    one_step = 0 < seen.steps <= seen.runs
    # A learned window needs the closure, which follows its parameters.
    by_membrane = moments == "measured" and not layer.learns_window
    predicted, rate, notes, problem = _closure(layer, seen, membrane, by_membrane, one_step)
    problem = problem or _out_of_reach(layer, membrane, predicted, by_membrane, one_step, scale_input)
    derived, changed = derives(layer), False
    if derived and not problem:
        try:
            layer.measured_moments, strays = _found(layer, seen, by_membrane)
            changed = True
            if strays:
                notes.append(f"in {strays} channels the threshold is out of reach: they get the moments of the layer")
        except MomentClosureError as error:
            problem = f"in a channel, {error}"
    if problem:
        notes.append(f"{problem}; its window is unchanged")
    return CalibratedLayer(
        name=name, **found, samples=seen.input.n, skewness=seen.input.skewness.item(),
        kurtosis=seen.input.kurtosis.item(), predicted_mean=predicted[0], predicted_std=predicted[1],
        predicted_rate=rate, window=_window(layer), changed=changed, note="; ".join(notes) if derived else "",
    )  # fmt: skip


def _closure(
    layer: QIFLayer, seen: _Statistics, membrane: tuple[float, float], by_membrane: bool, one_step: bool
) -> tuple[tuple[float, float], float, list[str], str]:
    """Solve the closure for the measured input.

    Returns:
        Mean and deviation of the membrane, and the firing rate, NaN if they are unknown; notes on how well the closure
        fits; and the reason why no window can be fitted, or ``""``.
    """
    predicted, rate = (math.nan, math.nan), math.nan
    notes = [ONE_STEP] if one_step else []
    mean, std = seen.input.mean.item(), seen.input.std.item()
    if not all(map(math.isfinite, membrane)):
        return predicted, rate, notes, on_runaway(layer, *membrane).rstrip(".")
    # The membrane's own moments need no closure.
    needed = not (by_membrane and membrane[1] > 0)
    if not std > 0:
        return predicted, rate, notes, f"its input is constantly {mean:g}" if needed else ""
    notes += _unlike_normal(seen.input)
    try:
        predicted, rate = _predict(layer, mean, std)
    except MomentClosureError as error:
        return predicted, rate, notes, str(error) if needed else ""
    if not one_step and not by_membrane:
        notes += _misfit(layer, membrane, predicted)
    return predicted, rate, notes, ""


def _found(layer: QIFLayer, seen: _Statistics, by_membrane: bool) -> tuple[dict[str, Tensor], int]:
    """Choose the moments to derive the window from; count the channels out of reach, which get the layer's moments."""
    kind, pooled, channels = "input", seen.input, seen.input_channels
    if by_membrane:
        kind, pooled, channels = "membrane", seen.membrane, seen.membrane_channels
    # With learned parameters the closure follows these, and there is one for all channels.
    if channels is None or layer.learns_window:
        return {f"{kind}_mean": pooled.mean[0], f"{kind}_std": pooled.std[0]}, 0
    still = channels.std <= 1e-6 * pooled.std
    far = _far_channels(layer, seen.membrane_channels) & ~still  # type: ignore[arg-type]
    mean, std = (
        torch.where(still | far, whole, own)
        for whole, own in ((pooled.mean, channels.mean), (pooled.std, channels.std))
    )
    shape = (-1, *[1] * max(seen.step_dims - 2, 0))
    return {f"{kind}_mean": mean.view(shape), f"{kind}_std": std.view(shape)}, int(far.sum())


def _far_channels(layer: QIFLayer, membrane: Moments) -> Tensor:
    """Find the channels whose threshold is out of reach."""
    threshold = torch.as_tensor(layer.qif_parameters.v_threshold, dtype=torch.float64, device="cpu").flatten()
    if threshold.numel() != membrane.mean.numel():
        threshold = threshold.mean()
    return (threshold - membrane.mean).abs() > REACH * membrane.std


def _predict(layer: QIFLayer, mean: float, std: float) -> tuple[tuple[float, float], float]:
    """Compute the closure's membrane moments and rate, pooled over neurons if their parameters differ."""
    params = layer.qif_parameters
    mu, sigma = membrane_moments(params, std, mean)
    rate = firing_rate(params, mu, sigma)
    if not isinstance(mu, Tensor) or not isinstance(sigma, Tensor):
        return (float(mu), float(sigma)), float(rate)
    pooled = mu.mean().item(), (sigma.square().mean() + mu.var(correction=0)).sqrt().item()
    return pooled, average(rate)


def _unlike_normal(seen: Moments) -> list[str]:
    skewness, kurtosis = seen.skewness.item(), seen.kurtosis.item()
    if abs(skewness) <= SKEWNESS_LIMIT and abs(kurtosis) <= KURTOSIS_LIMIT:
        return []
    return [
        f"its input is far from normal: skewness {skewness:.2f} and excess kurtosis {kurtosis:.2f}, where a normal "
        "distribution has 0 and 0. The closure assumes a normal one; a batch norm before the neuron brings it closer"
    ]


def _misfit(layer: QIFLayer, membrane: tuple[float, float], predicted: tuple[float, float]) -> list[str]:
    shift = abs(predicted[0] - membrane[0]) / membrane[1] if membrane[1] > 0 else math.inf
    ratio = predicted[1] / membrane[1] if membrane[1] > 0 else math.inf
    if shift <= MEAN_LIMIT and 1 / STD_LIMIT <= ratio <= STD_LIMIT:
        return []
    remedy = "" if layer.learns_window else ". Calibrate with moments='measured' to use the membrane's own moments"
    return [
        f"its closure does not fit: it predicts a membrane of {plus_minus(*predicted)}; {plus_minus(*membrane)} was "
        f"measured (off by {shift:.2f} deviations and a factor of {ratio:.2f}){remedy}"
    ]


def _out_of_reach(
    layer: QIFLayer, membrane: tuple[float, float], predicted: tuple[float, float], by_membrane: bool, one_step: bool,
    scale_input: str,
) -> str:  # fmt: skip
    """Return why no window is fitted if the threshold is far from the measured or the assumed membrane; else ``""``."""
    threshold = average(layer.qif_parameters.v_threshold)
    judged = [membrane] if by_membrane else [predicted] if one_step else [membrane, predicted]
    distances = [(threshold - mean) / std if std > 0 else math.inf for mean, std in judged]
    farthest = max(distances, key=abs)
    if abs(farthest) <= REACH:
        return ""
    if one_step:
        return "hardly a membrane came near the threshold"
    return (
        f"its threshold {threshold:.3g} is {farthest:.1f} deviations from the mean of its membrane, so that a window "
        f"fitted to it would pass hardly any gradient. Bring the input to the threshold's scale first: {scale_input}, "
        f"or take another gain{surrogate_with_tails(layer)}"
    )


def _window(layer: QIFLayer) -> tuple[float, float] | None:
    if layer.derived_window is None:
        return None
    params = layer.qif_parameters
    low, high = layer.derive_window(layer.derived_window, params).span(params.v_threshold)
    return average(low), average(high)


def _by_channel(x: Tensor) -> Tensor:
    """Reshape one step ``[N, C, *]`` or ``[C]`` to ``[values, C]``."""
    return x.unsqueeze(0) if x.dim() < 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def _pool(statistics: list[_Statistics]) -> None:
    """Merge the statistics of all processes, in every process."""
    mine = [([(s.n, s.sums) for s in r.streams()], (r.spikes, r.steps, r.runs)) for r in statistics]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for index, seen in enumerate(statistics):
        # Everything is merged, so that all processes decide alike.
        counts = [other[index][1] for other in everyone]
        seen.spikes, seen.steps, seen.runs = (sum(column) for column in zip(*counts, strict=True))
        for position, stream in enumerate(seen.streams()):
            stream.n, stream.sums = 0, None
            for other in everyone:
                n, sums = other[index][0][position]
                if n:
                    stream.merge(n, sums)
