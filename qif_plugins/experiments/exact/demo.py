"""Demonstrations of exact gradients through smooth spikes, as figures: ``qif exact demo``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...exact.layers import QIFLayer
from ...exact.losses import spike_count_loss, spike_time_loss
from ...exact.spikes import Spikes
from ..figures import COLOURS, figure, integer_ticks, legend_below, require_matplotlib
from .data import load
from .settings import DEMONSTRATIONS, Settings
from .train import build, fit

DURATION = 6.0


def move_spikes(folder: Path, seed: int = 0, steps: int = 1500) -> dict[str, float]:
    """Move one QIF neuron's spikes to target times, and draw that to ``move_spikes.png`` in ``folder``.

    Returns:
        The largest distance from the targets before and after ``steps`` steps of Adam.
    """
    require_matplotlib()
    layer, inputs = _neuron(seed)
    targets = torch.tensor([[1.0, 2.5, 4.0, 5.0]], dtype=torch.float64, device="cpu")
    records = _optimize(layer, inputs, lambda out: spike_time_loss(out, targets), steps)
    _raster(folder / "move_spikes.png", records, "spikes of one neuron move to their targets", targets[0].tolist())
    times = [record[: targets.shape[1]] for record in records]
    return {
        "distance before": float((times[0] - targets[0]).abs().max()),
        "distance after": float((times[-1] - targets[0]).abs().max()),
    }


def count_spikes(folder: Path, seed: int = 0, steps: int = 500) -> dict[str, float]:
    """Add spikes to a silent QIF neuron, then remove most of them, by ``steps`` steps of Adam each.

    Draws to ``count_spikes.png`` in ``folder``.

    Returns:
        The number of spikes at the start, after the first phase (wanted: 5) and after the second (wanted: 1).
    """
    require_matplotlib()
    layer, inputs = _neuron(seed)
    layer.weight.data *= 0.1
    records = []
    for wanted in (5, 1):
        target = torch.tensor([[wanted]], dtype=torch.float64, device="cpu")
        records += _optimize(layer, inputs, lambda out, target=target: spike_count_loss(out, target), steps)  # type: ignore[misc]
    _raster(folder / "count_spikes.png", records, "five spikes are added, then four removed", [])
    counts = [int((record <= DURATION).sum()) for record in records]
    return {"at first": counts[0], "five wanted": counts[steps], "one wanted": counts[-1]}


def learn_from_silence(folder: Path, seed: int = 0, epochs: int = 8) -> dict[str, float]:
    """Train on ``digits`` a network in which no neuron spikes at first, and draw to ``learn_from_silence.png``.

    Returns:
        The fraction of silent hidden neurons and the accuracy, before and after.
    """
    require_matplotlib()
    settings = replace(Settings(), seed=seed, epochs=epochs)
    data = load("digits", settings.duration, settings.latest)
    network = build(settings, data.train.channels, data.classes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.2)
    history = fit(network, data, settings, report=lambda record: None, active=False)
    epochs_done = [record["epoch"] for record in history]
    with figure(folder / "learn_from_silence.png", (5, 3.2)) as drawn:
        axes = drawn.subplots()
        axes.plot(epochs_done, [record["accuracy"] for record in history], "o-", label="accuracy")
        axes.plot(epochs_done, [record["silent"] for record in history], "s--", label="silent neurons")
        axes.set(xlabel="epoch", ylabel="fraction", ylim=(-0.03, 1.03))
        axes.set_title("a network that is silent at first learns digits")
        integer_ticks(axes.xaxis)
        legend_below(drawn, axes)
    ends = {"before": history[0], "after": history[-1]}
    return {f"{name} {when}": row[name] for name in ("silent", "accuracy") for when, row in ends.items()}


DEMOS = dict(zip(DEMONSTRATIONS, (move_spikes, count_spikes, learn_from_silence), strict=True))
"""The demonstrations by name."""


def _neuron(seed: int) -> tuple[QIFLayer, Spikes]:
    """Make a neuron, and 60 inputs that spike once each."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    times = (torch.rand(1, 60, generator=generator, dtype=torch.float64, device="cpu") * DURATION).sort(1)[0]
    layer = QIFLayer(60, 1, DURATION)
    return layer, Spikes(times, torch.randperm(60, generator=generator, device="cpu")[None], 60)


def _optimize(layer: QIFLayer, inputs: Spikes, loss: Callable[[Spikes], Tensor], steps: int) -> list[Tensor]:
    """Train, and record the first eight ordinary spikes and pseudospikes at each step."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    records = []
    for _ in range(steps + 1):
        out = layer(inputs)
        records.append(out.nth(8)[0, 0].detach())
        optimizer.zero_grad()
        loss(out).backward()
        optimizer.step()
    return records


def _raster(path: Path, records: list[Tensor], title: str, targets: list[float]) -> None:
    times = torch.stack(records)
    step = torch.arange(len(records), device="cpu")[:, None].expand(times.shape)
    inside = times <= DURATION
    with figure(path, (6, 3.6)) as drawn:
        axes = drawn.subplots()
        axes.plot(times[inside], step[inside], ",", color=COLOURS[1])
        axes.plot([], [], ".", color=COLOURS[1], label="spikes")
        axes.plot(times[~inside], step[~inside], ",", color="0.6")
        axes.plot([], [], ".", color="0.6", label="pseudospikes")
        for target in targets:
            axes.axvline(target, color="C3", linewidth=0.8)
        axes.axvline(DURATION, color="k", linewidth=0.8, linestyle=":")
        axes.set(xlabel="time / τ", ylabel="training step", xlim=(0, DURATION + 2), title=title)
        legend_below(drawn, axes)
