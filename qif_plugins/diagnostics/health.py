"""Check the QIF layers of a model on one batch: input, membranes, spikes, gradients, and what to do about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron.module import QIFLayer
from ..neuron.moments import MomentClosureError
from ..neuron.observe import Observation, Seen, watching
from ..neuron.parameters import Number, QIFParameters
from ..neuron.surrogate import FusedSurrogate
from ..support.text import percent, plus_minus, text_table
from .advice import advise
from .running import (
    Moments,
    average,
    bare,
    check_steps,
    effective_input,
    input_of,
    preserved,
    qif_layers,
    run_on,
    tdbn_before,
)

__all__ = ["HealthReport", "LayerHealth", "health"]

SATURATED_RATE = 0.95
"""A neuron that spikes in this share of its steps, or more, is saturated."""


@dataclass(frozen=True)
class LayerHealth:
    """One layer on one batch.

    Attributes:
        name: The module's name in the model.
        input_mean: Mean of g·x.
        input_std: Standard deviation of g·x.
        membrane_mean: Measured mean of the membrane before its reset.
        membrane_std: Its measured standard deviation.
        predicted_mean: Mean of the membrane that the layer's window assumes; NaN where the closure does not converge.
        predicted_std: Standard deviation that the window assumes, likewise.
        rate: Spikes per neuron-step.
        window_share: Share of neuron-steps whose membrane lies where the surrogate is not 0.
        gradient_share: Share of the gradient (sum of absolute values) that arrives at the spikes where the surrogate
            is not 0; NaN where no gradient arrives.
        gradient: Mean absolute gradient that arrives at a spike.
        silent: Share of neurons without a spike in the batch.
        saturated: Share of neurons that spike in 95 % of their steps or more.
        rebound: Share of neuron-steps whose membrane lies so far below rest that the parabola is above the threshold
            again: the neuron spikes at the next step without further input.
        advice: What to do, one sentence or more a problem; empty for a healthy layer.
    """

    name: str
    input_mean: float = math.nan
    input_std: float = math.nan
    membrane_mean: float = math.nan
    membrane_std: float = math.nan
    predicted_mean: float = math.nan
    predicted_std: float = math.nan
    rate: float = math.nan
    window_share: float = math.nan
    gradient_share: float = math.nan
    gradient: float = math.nan
    silent: float = math.nan
    saturated: float = math.nan
    rebound: float = math.nan
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class HealthReport:
    """What :func:`health` found; ``str()`` is a table with advice below it.

    Attributes:
        layers: One entry a layer, in the model's order.
    """

    layers: tuple[LayerHealth, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no advice."""
        return not any(row.advice for row in self.layers)

    def rows(self) -> list[dict[str, Any]]:
        """The layers as dictionaries, for a data frame or a log."""
        return [{field.name: getattr(row, field.name) for field in fields(row)} for row in self.layers]

    def __str__(self) -> str:
        header = (
            "layer", "input", "membrane", "predicted", "spikes/step", "in window", "gradient", "silent", "saturated",
        )  # fmt: skip
        rows = [
            (
                row.name, plus_minus(row.input_mean, row.input_std), plus_minus(row.membrane_mean, row.membrane_std),
                plus_minus(row.predicted_mean, row.predicted_std), f"{row.rate:.4f}", percent(row.window_share),
                percent(row.gradient_share), percent(row.silent), percent(row.saturated),
            )
            for row in self.layers
        ]  # fmt: skip
        advice = [f"{row.name}: {sentence}" for row in self.layers for sentence in row.advice]
        return "\n".join([text_table(header, rows), "", *(advice or ["Nothing stands out."])])


class _Recorder:
    """Statistics of one layer, and the spikes whose gradient is wanted."""

    def __init__(self) -> None:
        self.input, self.membrane = Moments(), Moments()
        self.counts: Tensor | None = None
        self.steps = 0
        self.time_steps = 0
        self.open = 0
        self.rebound = 0
        self.spikes: list[Tensor] = []
        self.inside: list[Tensor] = []

    def add(self, seen: Observation, params: QIFParameters, surrogate: Any) -> None:
        h, spikes = seen.h_seq.detach(), seen.spike_seq
        self.time_steps += h.shape[0]
        self.input.update(effective_input(params, seen.x_seq.detach()).reshape(-1, 1))
        self.membrane.update(h.reshape(-1, 1))
        per_neuron = (spikes.detach() != 0).sum(0, dtype=torch.float64)
        batched = per_neuron.dim() > 1
        counts = (per_neuron.sum(0) if batched else per_neuron).cpu()
        if self.counts is None or self.counts.shape != counts.shape:
            self.counts, self.steps = torch.zeros_like(counts), 0
        self.counts += counts
        self.steps += h.shape[0] * (h.shape[1] if batched else 1)
        inside = _derivative(surrogate, h, params.v_threshold) != 0
        self.open += int(inside.sum().item())
        self.rebound += int(((h < (params.u1 + params.u2) / 2) & (params.map(h) >= params.v_threshold)).sum().item())
        self.spikes.append(spikes)
        self.inside.append(inside)

    def finish(self, grads: list[Tensor | None]) -> tuple[float, float]:
        """Share of the gradient that passes, and the mean absolute gradient; NaN and it where it is not finite."""
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
    """Look at every QIF layer of a model while it runs one batch, forward and backward.

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
            step a call. Default 1. A layer that saw a single step is told so, and gets no advice on a membrane that
            had no time to leave rest.

    Returns:
        A row a layer with advice; ``str()`` is a table.

    Raises:
        ValueError: No QIF layer, an empty batch, or an output without gradient for the loss.
        TypeError: ``batch`` is something else, such as a DataLoader, the model takes more than one input, or ``loss``
            something else than the output and the target. Other errors of the loss keep their kind. All say with
            what it was called.
    """
    check_steps(steps)
    inner = bare(model)
    layers = qif_layers(inner)
    recorders = {name: _Recorder() for name in layers}

    def see(seen: Seen) -> None:
        for observation in seen.runs:
            recorders[seen.name].add(observation, layers[seen.name].qif_parameters, observation.surrogate)

    with preserved(inner), torch.enable_grad(), watching(layers, see, membranes=True):
        output, target = _run(inner, batch, steps)
        if any(r.time_steps for r in recorders.values()) and not any(r.input.n for r in recorders.values()):
            raise ValueError("the batch is empty: no neuron received a value. Pass one with at least one sample.")
        value = _direction(output) if loss is None else _loss(loss, output, target, steps)
        gradients = _gradients(recorders, value)
    tdbn = tdbn_before(inner, layers)
    return HealthReport(
        tuple(_row(name, layers[name], recorders[name], gradients[name], tdbn[name]) for name in layers)
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


def _gradients(recorders: dict[str, _Recorder], value: Any) -> dict[str, list[Tensor | None]]:
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise ValueError(
            "the loss carries no gradient: the model ran under no_grad, or its output does not depend on anything "
            "that has one"
        )
    spikes = [spike for recorder in recorders.values() for spike in recorder.spikes if spike.requires_grad]
    found = torch.autograd.grad(value.sum(), spikes, allow_unused=True) if spikes else ()
    by_spike = {id(spike): grad for spike, grad in zip(spikes, found, strict=True)}
    return {name: [by_spike.get(id(spike)) for spike in recorder.spikes] for name, recorder in recorders.items()}


def _direction(output: Any) -> Tensor:
    """A fixed random functional of every floating-point tensor in the output."""
    tensors = [t for t in _tensors(output) if t.requires_grad]
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


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _derivative(surrogate: Any, h: Tensor, v_threshold: Number) -> Tensor:
    if isinstance(surrogate, FusedSurrogate):
        return surrogate.derivative(h, v_threshold)
    x = (h - v_threshold).detach().requires_grad_()
    with torch.enable_grad():
        spike = surrogate(x)
        if not spike.requires_grad:
            return torch.zeros_like(h)
        return torch.autograd.grad(spike.sum(), x)[0]


def _row(name: str, layer: QIFLayer, seen: _Recorder, grads: list[Tensor | None], tdbn: str) -> LayerHealth:
    if not seen.input.n or seen.counts is None:
        advice = ("the batch did not reach it, or a subclass computes its own steps: nothing was measured.",)
        return LayerHealth(name, advice=advice)
    gradient_share, gradient = seen.finish(grads)
    try:
        predicted = tuple(average(moment) for moment in layer.window_moments())
    except MomentClosureError:
        predicted = (math.nan, math.nan)
    rates = seen.counts / seen.steps
    row = LayerHealth(
        name,
        seen.input.mean.item(),
        seen.input.std.item(),
        seen.membrane.mean.item(),
        seen.membrane.std.item(),
        predicted[0],
        predicted[1],
        seen.counts.sum().item() / seen.input.n,
        seen.open / seen.input.n,
        gradient_share,
        gradient,
        (seen.counts == 0).double().mean().item(),
        (rates >= SATURATED_RATE).double().mean().item(),
        seen.rebound / seen.input.n,
    )
    return replace(row, advice=advise(row, layer, tdbn, one_step=seen.time_steps == 1))
