"""Check the QIF layers of a model on one batch: measure input, membranes, spikes and gradients, and give advice."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..convert.trial import Call, unwrapped
from ..neuron.module import QIFLayer
from ..neuron.moments import MomentClosureError
from ..neuron.observe import Observation
from ..neuron.parameters import Number, QIFParameters
from ..neuron.surrogate import FusedSurrogate
from ..support.text import percent, text_table
from .advice import Cause, InputPlace, advise, advise_network, input_places
from .running import check_steps, input_of, run_on
from .spiking import LayerStatistics, MeasuredLayer, by_kind, measured, qif_layers
from .statistics import average, effective_input

__all__ = ["HealthReport", "LayerHealth", "health"]

SATURATED_RATE = 0.95
"""A neuron that spikes in this share of its steps, or more, is saturated."""


@dataclass(frozen=True, kw_only=True)
class LayerHealth(MeasuredLayer):
    """Measurements and advice of one layer on one batch.

    The predicted moments are those of the membrane that the surrogate was derived for, or NaN if the surrogate was
    given.

    Attributes:
        steps: Number of time steps, of all calls together.
        window_share: Share of neuron-steps with a membrane at which the surrogate is not 0.
        gradient_share: Of the gradient that arrives at the spikes (sum of absolute values), the share that arrives
            where the surrogate is not 0; NaN if no gradient arrives.
        gradient: Mean absolute gradient that arrives at a spike.
        silent: Share of neurons without a spike in the batch.
        saturated: Share of neurons that spike in 95 % of their steps or more.
        near: Share of neuron-steps whose membrane is at most as far from the threshold as the resting point is.
        rebound: Share of neuron-steps whose membrane lies so far below rest that the parabola maps it to the threshold
            or above: the neuron spikes at the next step without further input.
        rebound_spikes: Share of spikes caused by the parabola's rise below its vertex alone: if the map stayed at the
            vertex's value there, the neuron would not have spiked.
        memory: Slope f' of the map at rest: the share of a membrane near rest that remains one step later.
        input_repeats: Correlation of the input with that of the step before; 1 for an input that is constant in time.
        spike_repeats: Share of neuron-steps in which the neuron repeats the step before, with a spike or without.
        gain: Factor by which the layer multiplies the mean square of the gradient, if a norm feeds it:
            σ_I² E[w²]/(r(1 - r)), times the part that the memory adds. All quantities are the measured ones
            (docs/mathematics.md, "How wide").
        gradient_square: Sum of squares of the gradient that arrives at its spikes.
        advice: A sentence for each problem that keeps the layer from training, with its cure; empty for a healthy
            layer.
        causes: The causes that the advice names: ``"memory"``, ``"window's width"``, ``"window's scale"``,
            ``"input's scale"``, ``"rebound"``.
    """

    steps: int = 0
    window_share: float = math.nan
    gradient_share: float = math.nan
    gradient: float = math.nan
    silent: float = math.nan
    saturated: float = math.nan
    near: float = math.nan
    rebound: float = math.nan
    rebound_spikes: float = math.nan
    memory: float = math.nan
    input_repeats: float = math.nan
    spike_repeats: float = math.nan
    gain: float = math.nan
    gradient_square: float = math.nan
    advice: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True)
class HealthReport:
    """Measurements and advice of :func:`health`; ``str()`` is a table with the advice below it.

    Attributes:
        layers: One entry for each layer, in the model's order.
        advice: A sentence for each problem that keeps the network as a whole from training, with its cure.
        causes: The causes that the advice on the network and on its layers names, see :class:`LayerHealth`.
        batched: Whether the input of the layers had a batch dimension.
    """

    layers: tuple[LayerHealth, ...]
    advice: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
    batched: bool = True

    @property
    def healthy(self) -> bool:
        """True if there is no advice."""
        return not self.advice and not any(row.advice for row in self.layers)

    def rows(self) -> list[dict[str, Any]]:
        """Return the layers as dictionaries, for a data frame or a log."""
        return [{field.name: getattr(row, field.name) for field in fields(row)} for row in self.layers]

    def __str__(self) -> str:
        header = (
            "layer", "input", "membrane", "predicted", "spikes/step", "in window", "gradient", "silent", "saturated",
        )  # fmt: skip
        rows = [
            (
                row.name, row.input, row.membrane, row.predicted, f"{row.rate:.4f}", percent(row.window_share),
                percent(row.gradient_share), percent(row.silent), percent(row.saturated),
            )
            for row in self.layers
        ]  # fmt: skip
        advice = [*self.advice, *by_kind((row.name, sentence) for row in self.layers for sentence in row.advice)]
        return "\n".join([text_table(header, rows), self._measured(), "", *(advice or ["Nothing stands out."])])

    def _measured(self) -> str:
        steps = sorted({row.steps for row in self.layers if row.steps})
        if not steps:
            return "Nothing was measured."
        counted = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        times = f"{counted} time step{'' if counted == '1' else 's'}"
        if self.batched:
            return f"Measured over {times}."
        return (
            f"Measured over {times} of one sample: the neurons received no batch dimension. If the first dimension of "
            "the input is the batch, pass a sequence [T, N, ...]."
        )


class _Statistics(LayerStatistics):
    """Statistics of one layer, its neurons, its window and its steps; keeps the spikes whose gradient is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Tensor | None = None
        self.batched = True
        self.neuron_steps = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.before: tuple[Tensor, Tensor, Tensor] | None = None
        """Input, membrane and spikes of the last step."""
        self.spike_seqs: list[Tensor] = []
        self.inside: list[Tensor] = []

    def add(self, seen: Observation) -> None:
        super().add(seen)
        h, spikes, params = seen.h_seq.detach(), seen.spike_seq.detach() != 0, seen.params
        per_neuron = spikes.sum(0, dtype=torch.float64)
        batched = self.batched = per_neuron.dim() > 1
        counts = (per_neuron.sum(0) if batched else per_neuron).cpu()
        if self.counts is None or self.counts.shape != counts.shape:
            self.counts, self.neuron_steps = torch.zeros_like(counts), 0
        self.counts += counts
        self.neuron_steps += h.shape[0] * (h.shape[1] if batched else 1)
        w = _derivative(seen.surrogate, h, params.v_threshold)
        self._sum("near", (h - params.v_threshold).abs() <= params.v_threshold - params.fixed_points()[0])
        falls = params.map_derivative(h) < 0
        self._sum("window", w != 0)
        self._sum("surrogate", w.double().square())
        self._sum("rebound", falls & (params.map(h) >= params.v_threshold))
        v_reset: Any = params.v_reset
        left = params.after_soft_reset(h) if params.reset == "soft" else v_reset
        after = h.where(~spikes, left)
        # The derivative of the reset is 0, except where it leaves h or h - θ.
        kept = params.map_derivative(after) * (~spikes | ((left == h - params.v_threshold) & (params.reset == "soft")))
        self._sum("kept", kept.double().square())
        self._between_steps(params, effective_input(params, seen.x_seq.detach()), after, spikes)
        self.spike_seqs.append(seen.spike_seq)
        self.inside.append(w != 0)

    def _between_steps(self, params: QIFParameters, x: Tensor, v: Tensor, spikes: Tensor) -> None:
        """Compare each step with the one before it, in this call or the last."""
        if self.before is not None and self.before[0].shape == x.shape[1:]:
            x, v, spikes = (torch.cat([b[None], now]) for b, now in zip(self.before, (x, v, spikes), strict=True))
        self.before = x[-1], v[-1], spikes[-1]
        if len(x) < 2:
            return
        self._sum("input changes", (x[1:] - x[:-1]).double().square())
        self._sum("repeats", spikes[1:] == spikes[:-1])
        vertex = params.map((params.u1 + params.u2) / 2)
        rebounds = (params.map_derivative(v[:-1]) < 0) & spikes[1:]
        self._sum("rebound spikes", rebounds & (x[1:] + vertex < params.v_threshold))
        self.sums["pairs"] += spikes[1:].numel()
        self.sums["spikes after"] += int(spikes[1:].sum().item())

    def _sum(self, name: str, values: Tensor) -> None:
        self.sums[name] += values.sum().item()

    def shares(self, layer: QIFLayer) -> dict[str, Any]:
        """Return the attributes of :class:`LayerHealth` that follow from the sums, by name."""
        n, sums = self.input.n, self.sums
        variance, rate = self.input.std.item() ** 2, self.spikes / n
        kept = min(sums["kept"] / n, 1.0)
        # A membrane hands the gradient to earlier steps: the mean of 1 + j + ... + j^(n-1) over n = 1 .. T.
        handed = sum(kept**k * (self.steps - k) for k in range(self.steps)) / self.steps
        spread = rate * (1 - rate)
        params = layer.qif_parameters
        return {
            "steps": self.steps,
            "window_share": sums["window"] / n,
            "near": sums["near"] / n,
            "rebound": sums["rebound"] / n,
            "rebound_spikes": _share(sums["rebound spikes"], sums["spikes after"]),
            "memory": average(params.map_derivative(params.fixed_points()[0])),
            "input_repeats": 1 - _share(sums["input changes"], 2 * sums["pairs"] * variance),
            "spike_repeats": _share(sums["repeats"], sums["pairs"]),
            "gain": _share(variance * sums["surrogate"] / n * handed, spread),
        }

    def gradient(self, grads: list[Tensor | None]) -> tuple[float, float, float]:
        """Compute the share of the gradient that passes the window, its mean absolute value, and its sum of squares.

        The share is NaN if no gradient arrives, or if it is not finite.
        """
        arrived = [
            (g.detach().abs().double(), inside) for g, inside in zip(grads, self.inside, strict=True) if g is not None
        ]
        total = sum(g.sum().item() for g, _ in arrived)
        squares = sum(g.square().sum().item() for g, _ in arrived)
        if not math.isfinite(total):
            return math.nan, total, squares
        if not total > 0:
            return math.nan, 0.0, 0.0
        passed = sum((g * inside).sum().item() for g, inside in arrived)
        return passed / total, total / self.input.n, squares


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def health(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    steps: int = 1,
) -> HealthReport:
    """Check every QIF layer of a model while it runs one batch, forward and backward.

    The advice names which of five causes are present, the number that shows each, and the option that cures it. The
    causes are a map without memory, the surrogate's width in a deep network, the scale for which the surrogate was
    derived, the input's scale, and the rebound of the parabola. docs/does-not-learn.md explains each.

    The model is unchanged afterwards: no gradient is accumulated, and membranes, buffers, modes and random numbers are
    restored.

    Args:
        model: A model with QIF layers, of either host.
        batch: A tensor, or a tuple or list whose first element is the input and whose second, if any, is the target;
            or a callable that takes the model, runs it in its own way, such as over time, and returns the output.
            The callable resets the state itself.
        loss: Function that takes the output and the target (``None`` without one) and returns a scalar. With ``steps``
            above 1 the output is the list of the outputs. Default: a sum of the outputs with fixed random signs, which
            shows how much gradient the layers let through.
        steps: How often to call the model on the batch, without a reset in between; for models that take one time
            step per call. Default 1. For a layer that ran a single step the advice says so, and leaves out its
            membrane, which had no time to leave rest.

    Returns:
        The report, with a row and advice for each layer; ``str()`` is a table.

    Raises:
        ValueError: No QIF layer, an empty batch, or an output without gradient for the loss.
        TypeError: ``batch`` is something else, such as a DataLoader; the model takes more than one input; or ``loss``
            does not take the output and the target. Other errors of the loss keep their kind, and say with which
            arguments the loss was called.
    """
    check_steps(steps)
    inner = unwrapped(model)
    layers = qif_layers(inner)
    statistics = {name: _Statistics() for name in layers}
    with measured(inner, layers, statistics), torch.enable_grad():
        output, target = _run(inner, batch, steps)
        if any(s.steps for s in statistics.values()) and not any(s.input.n for s in statistics.values()):
            raise ValueError("the batch is empty: no neuron received a value. Pass one with at least one sample.")
        value = _direction(output) if loss is None else _loss(loss, output, target, steps)
        gradients = _gradients(statistics, value)
    flow = None if callable(batch) else Call((input_of(inner, batch),), drive=lambda one, x: run_on(one, x, steps))
    places = input_places(inner, layers, flow)
    rows = tuple(_row(name, layers[name], statistics[name], gradients[name], places[name]) for name in layers)
    batched = all(s.batched for s in statistics.values())
    broken = [row for row in rows if row.steps and not math.isfinite(row.membrane_std)]
    if broken:
        # The measurements of the other layers follow from it.
        rows = tuple(row if row in broken else replace(row, advice=(), causes=()) for row in rows)
        return HealthReport(rows, tuple(_not_finite_values(inner, batch)), (), batched)
    found = advise_network(rows, layers, places)
    causes = dict.fromkeys([cause for cause, _ in found] + [cause for row in rows for cause in row.causes])
    return HealthReport(rows, tuple(sentence for _, sentence in found), tuple(causes), batched)


def _not_finite_values(model: nn.Module, batch: Any) -> Iterator[str]:
    """Name the parameters, buffers and parts of the batch with NaN or infinite values."""
    values = [*model.named_parameters(), *model.named_buffers()]
    values += [("the batch", value) for value in tree_leaves(batch) if isinstance(value, Tensor)]
    for name, value in values:
        count = int((~value.detach().isfinite()).sum())
        if count:
            yield f"{name}: {count} of its {value.numel()} values are NaN or infinite, and so are the results."


def _run(model: nn.Module, batch: Any, steps: int) -> tuple[Any, Any]:
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model), None
    if isinstance(batch, Iterable) and not (
        isinstance(batch, Tensor | Mapping | tuple | list) or hasattr(batch, "__array__")
    ):
        raise TypeError(f"health looks at one batch, got {type(batch).__name__}; pass one batch: next(iter(loader))")
    x = input_of(model, batch)
    if x.is_floating_point():
        # So that gradient flows even where every parameter before a neuron is frozen.
        x = x.detach().requires_grad_()
    target = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if isinstance(target, Tensor):
        target = target.to(x.device)
    outputs = run_on(model, x, steps)
    return (outputs if steps > 1 else outputs[0]), target


def _loss(loss: Callable[[Any, Any], Tensor], output: Any, target: Any, steps: int) -> Tensor:
    try:
        return loss(output, target)
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        kind = next((kind for kind in (ValueError, RuntimeError) if isinstance(error, kind)), TypeError)
        if target is None:
            way_out = "there was no target: pass (x, target) as the batch, or a loss that needs no target"
        elif steps > 1:
            each = "[s for s, *_ in outputs]" if isinstance(output[0], tuple | list) else "outputs"
            way_out = (
                f"with steps={steps} the output is the list of the outputs of all calls: combine them, as in "
                f"loss=lambda outputs, target: your_loss(torch.stack({each}), target)"
            )
        else:
            way_out = "pass a function that takes these two and returns a scalar"
        raise kind(
            f"the loss failed: {str(error).rstrip('.')}. It was called as loss(output, target) with "
            f"{_described(output)} and {_described(target)}; {way_out}."
        ) from error


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}" + (f" (first {_described(value[0])})" if value else "")
    return "None" if value is None else f"a {type(value).__name__}"


def _gradients(statistics: dict[str, _Statistics], value: Any) -> dict[str, list[Tensor | None]]:
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise ValueError(
            "the loss has no gradient: the model ran under no_grad, or its output does not depend on any parameter"
        )
    spikes = [spike for seen in statistics.values() for spike in seen.spike_seqs if spike.requires_grad]
    found = torch.autograd.grad(value.sum(), spikes, allow_unused=True) if spikes else ()
    by_spike = {id(spike): grad for spike, grad in zip(spikes, found, strict=True)}
    return {name: [by_spike.get(id(spike)) for spike in seen.spike_seqs] for name, seen in statistics.items()}


def _direction(output: Any) -> Tensor:
    """Sum every floating-point tensor in the output, with fixed random signs."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    if not tensors:
        raise ValueError(
            "the model's output has no gradient; if it consists of spikes without gradient, pass a loss or a callable"
        )
    generator = torch.Generator().manual_seed(0)
    total = tensors[0].new_zeros(())
    for tensor in tensors:
        signs = (
            torch.randint(0, 2, tensor.shape, generator=generator, device="cpu").to(tensor.device, tensor.dtype) * 2 - 1
        )
        total = total + (tensor * signs).sum()
    return total


def _derivative(surrogate: Any, h: Tensor, v_threshold: Number) -> Tensor:
    if isinstance(surrogate, FusedSurrogate):
        return surrogate.derivative(h, v_threshold)
    x = (h - v_threshold).detach().requires_grad_()
    with torch.enable_grad():
        spike = surrogate(x)
        if not spike.requires_grad:
            return torch.zeros_like(h)
        return torch.autograd.grad(spike.sum(), x)[0]


def _row(name: str, layer: QIFLayer, seen: _Statistics, grads: list[Tensor | None], place: InputPlace) -> LayerHealth:
    if not seen.input.n or seen.counts is None:
        advice = ("the batch did not reach it, or a subclass computes its own steps: nothing was measured.",)
        return LayerHealth(name=name, advice=advice)
    gradient_share, gradient, squares = seen.gradient(grads)
    predicted: tuple[float, ...] = (math.nan, math.nan)
    if layer.derived_window is not None:
        with contextlib.suppress(MomentClosureError):
            predicted = tuple(average(moment) for moment in layer.window_moments())
    row = LayerHealth(
        name=name, **seen.moments(), predicted_mean=predicted[0], predicted_std=predicted[1], **seen.shares(layer),
        gradient_share=gradient_share, gradient=gradient, gradient_square=squares,
        silent=(seen.counts == 0).double().mean().item(),
        saturated=(seen.counts / seen.neuron_steps >= SATURATED_RATE).double().mean().item(),
    )  # fmt: skip
    found = advise(row, layer, place, one_step=seen.steps == 1)
    causes = tuple(cause for cause, _ in found if cause is not None)
    return replace(row, advice=tuple(sentence for _, sentence in found), causes=causes)
