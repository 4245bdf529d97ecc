"""Check the QIF layers of a model on one batch: input, membranes, spikes, gradients, and what to do about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..neuron.module import QIFLayer
from ..neuron.moments import MomentClosureError
from ..neuron.observe import Observation
from ..neuron.parameters import Number
from ..neuron.surrogate import FusedSurrogate
from ..support.text import percent, text_table
from .advice import advise, on_input_scale
from .running import bare, check_steps, input_of, run_on
from .spiking import LayerStatistics, MeasuredLayer, measured, qif_layers
from .statistics import average

__all__ = ["HealthReport", "LayerHealth", "health"]

SATURATED_RATE = 0.95
"""A neuron that spikes in this share of its steps, or more, is saturated."""


@dataclass(frozen=True, kw_only=True)
class LayerHealth(MeasuredLayer):
    """Measurements and advice of one layer on one batch; predicted is the membrane that its window assumes.

    Attributes:
        window_share: Share of neuron-steps whose membrane lies where the surrogate is not 0.
        gradient_share: Share of the gradient (sum of absolute values) that arrives at the spikes where the surrogate
            is not 0; NaN where no gradient arrives.
        gradient: Mean absolute gradient that arrives at a spike.
        silent: Share of neurons without a spike in the batch.
        saturated: Share of neurons that spike in 95 % of their steps or more.
        rebound: Share of neuron-steps whose membrane lies so far below rest that the parabola is above the threshold
            again: the neuron spikes at the next step without further input.
        advice: Causes that keep the layer from training, each with its cure; empty for a healthy layer.
    """

    window_share: float = math.nan
    gradient_share: float = math.nan
    gradient: float = math.nan
    silent: float = math.nan
    saturated: float = math.nan
    rebound: float = math.nan
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class HealthReport:
    """Measurements and advice of :func:`health`; ``str()`` is a table with the advice below it.

    Attributes:
        layers: One entry for each layer, in the model's order.
    """

    layers: tuple[LayerHealth, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no advice."""
        return not any(row.advice for row in self.layers)

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
        advice = [f"{row.name}: {sentence}" for row in self.layers for sentence in row.advice]
        return "\n".join([text_table(header, rows), "", *(advice or ["Nothing stands out."])])


class _Statistics(LayerStatistics):
    """Statistics of one layer, of its neurons, window and rebound too, with the spikes whose gradient is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Tensor | None = None
        self.neuron_steps = 0
        self.inside_window = self.rebounds = 0
        self.spike_seqs: list[Tensor] = []
        self.inside: list[Tensor] = []

    def add(self, seen: Observation) -> None:
        super().add(seen)
        h, params = seen.h_seq.detach(), seen.params
        per_neuron = (seen.spike_seq.detach() != 0).sum(0, dtype=torch.float64)
        batched = per_neuron.dim() > 1
        counts = (per_neuron.sum(0) if batched else per_neuron).cpu()
        if self.counts is None or self.counts.shape != counts.shape:
            self.counts, self.neuron_steps = torch.zeros_like(counts), 0
        self.counts += counts
        self.neuron_steps += h.shape[0] * (h.shape[1] if batched else 1)
        inside = _derivative(seen.surrogate, h, params.v_threshold) != 0
        self.inside_window += int(inside.sum().item())
        below_vertex = h < (params.u1 + params.u2) / 2
        self.rebounds += int((below_vertex & (params.map(h) >= params.v_threshold)).sum().item())
        self.spike_seqs.append(seen.spike_seq)
        self.inside.append(inside)

    def gradient(self, grads: list[Tensor | None]) -> tuple[float, float]:
        """Share of the gradient that passes, NaN where none arrives or it is not finite; mean absolute gradient."""
        arrived = [
            (g.detach().abs().double(), inside) for g, inside in zip(grads, self.inside, strict=True) if g is not None
        ]
        total = sum(g.sum().item() for g, _ in arrived)
        if not math.isfinite(total):
            return math.nan, total
        if not total > 0:
            return math.nan, 0.0
        passed = sum((g * inside).sum().item() for g, inside in arrived)
        return passed / total, total / self.input.n


def health(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    steps: int = 1,
) -> HealthReport:
    """Check every QIF layer of a model while it runs one batch, forward and backward.

    The model is left as found: no gradient is accumulated, membranes, buffers, modes and random numbers are restored.

    Args:
        model: A model with QIF layers, of either host.
        batch: A tensor, or a tuple or list whose first element is the input and whose second, if any, is the target;
            or a callable that takes the model, runs it in its own way, such as over time, and returns the output.
            The callable resets the state itself.
        loss: Takes the output and the target (``None`` without one) and returns a scalar. With ``steps`` above 1 the
            output is the list of the outputs. Default: a fixed random direction in the output, which
            shows how much gradient the layers let through without saying where it should point.
        steps: How often to call the model on the batch, without a reset in between; for models that take one time
            step a call. Default 1. The advice on a layer that ran a single step says so, and nothing of a membrane
            that had no time to leave rest.

    Returns:
        A row for each layer, with advice; ``str()`` is a table.

    Raises:
        ValueError: No QIF layer, an empty batch, or an output without gradient for the loss.
        TypeError: ``batch`` is something else, such as a DataLoader; the model takes more than one input; or ``loss``
            does not take the output and the target. Other errors of the loss keep their kind, and say what the loss
            was called with.
    """
    check_steps(steps)
    inner = bare(model)
    layers = qif_layers(inner)
    statistics = {name: _Statistics() for name in layers}
    with measured(inner, layers, statistics), torch.enable_grad():
        output, target = _run(inner, batch, steps)
        if any(s.steps for s in statistics.values()) and not any(s.input.n for s in statistics.values()):
            raise ValueError("the batch is empty: no neuron received a value. Pass one with at least one sample.")
        value = _direction(output) if loss is None else _loss(loss, output, target, steps)
        gradients = _gradients(statistics, value)
    scales = on_input_scale(inner, layers)
    return HealthReport(
        tuple(_row(name, layers[name], statistics[name], gradients[name], scales[name]) for name in layers)
    )


def _run(model: nn.Module, batch: Any, steps: int) -> tuple[Any, Any]:
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model), None
    if isinstance(batch, Iterable) and not isinstance(batch, Tensor | Mapping | tuple | list):
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
            way_out = "there was no target: pass (x, target) as the batch, or a loss that needs none"
        elif steps > 1:
            each = "[s for s, *_ in outputs]" if isinstance(output[0], tuple | list) else "outputs"
            way_out = (
                f"with steps={steps} the output is the list of what the calls returned: put them together, as in "
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
            "the loss carries no gradient: the model ran under no_grad, or its output does not depend on anything "
            "that has one"
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
            "the model's output carries no gradient; if it is spikes without one, pass a loss or a callable"
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


def _row(name: str, layer: QIFLayer, seen: _Statistics, grads: list[Tensor | None], scale_input: str) -> LayerHealth:
    if not seen.input.n or seen.counts is None:
        advice = ("the batch did not reach it, or a subclass computes its own steps: nothing was measured.",)
        return LayerHealth(name=name, advice=advice)
    gradient_share, gradient = seen.gradient(grads)
    try:
        predicted = tuple(average(moment) for moment in layer.window_moments())
    except MomentClosureError:
        predicted = (math.nan, math.nan)
    row = LayerHealth(
        name=name, **seen.moments(), predicted_mean=predicted[0], predicted_std=predicted[1],
        window_share=seen.inside_window / seen.input.n, gradient_share=gradient_share, gradient=gradient,
        silent=(seen.counts == 0).double().mean().item(),
        saturated=(seen.counts / seen.neuron_steps >= SATURATED_RATE).double().mean().item(),
        rebound=seen.rebounds / seen.input.n,
    )  # fmt: skip
    return replace(row, advice=advise(row, layer, scale_input, one_step=seen.steps == 1))
