"""Locate the jumps of a loss on a line: where exactly, how high, and which spikes change there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...diagnostics.spiking import spiking_layers
from ...neuron.observe import Seen, watching
from .lines import Direction, Line, Loss, moving, slope_along
from .numbers import candidates

EVENTS = ("number of spikes", "order of spikes", "time of spikes", "none")
"""Events in the first layer whose spikes differ between the two sides of a jump, the first that applies: a neuron gains
or loses spikes; the order of the layer's spikes changes (exact networks only); spikes move further than the distance
between the two sides explains; no spike changes."""

_HALVINGS = 30


@dataclass(frozen=True)
class Jump:
    """A place where a loss jumps.

    Attributes:
        position: On the line.
        height: The loss just after less the loss just before.
        event: One of :data:`EVENTS`, between the two sides.
        layer: The first layer whose spikes change, by name; ``None`` if none does.
        neurons: Number of its neurons whose spikes change, summed over samples.
        shift: Largest distance that a spike of these neurons moves, in time (exact networks), or that all spikes of one
            neuron move together, in steps; 0 where spikes are added or removed.
    """

    position: float
    height: float
    event: str
    layer: str | None
    neurons: int
    shift: float


@dataclass(frozen=True)
class _Side:
    position: float
    loss: float
    slope: float
    spikes: dict[str, list[Any]]


def locate_jumps(
    network: nn.Module,
    loss: Loss,
    direction: Direction,
    line: Line,
    *,
    layers: Mapping[str, nn.Module] | None = None,
    smallest: float = 1e-6,
    most: int = 50,
) -> list[Jump]:
    """Find the jumps of a line, each confined by bisection to 2^-30 of the grid's step.

    A step of the grid is searched if the change of the loss that the slopes leave unexplained is as large there as on a
    coarser grid. It counts as a jump if that change stays above ``smallest`` to the end of the bisection, which kinks
    and steep stretches do not. Of several jumps in one step, the search follows the largest.

    Args:
        network: Changed while measuring, and restored.
        loss: That of ``line``; runs ``network`` once.
        direction: That of ``line``.
        line: Measured on 4n + 1 positions.
        layers: The layers to compare, by name, first to last: modules that return an exact layer's spikes, or a tensor
            (or a tuple that begins with it) with time first, or one step at a time. Default:
            :func:`~qif_plugins.diagnostics.spiking.spiking_layers`.
        smallest: Height below which a jump does not count, in units of the loss. Default 1e-6.
        most: Search so many steps at most, those with the largest jumps. Default 50.

    Returns:
        The jumps, by position.

    Raises:
        ValueError: As in :func:`~qif_plugins.experiments.landscape.along`.
    """
    layers = spiking_layers(network) if layers is None else layers
    heights = torch.where(candidates(line, smallest), line.unexplained().abs(), 0.0)
    wanted = [int(place) for place in heights.argsort(descending=True, stable=True)[:most] if heights[place] > 0]
    found = []
    with moving(network) as move, _recorded(layers) as spikes:

        def at(position: float) -> _Side:
            spikes.clear()
            value, gradient = move([position], [direction], loss)
            seen = {name: [*calls] for name, calls in spikes.items()}
            return _Side(position, value, slope_along(gradient, direction), seen)

        for place in sorted(wanted):
            left, right = (at(float(line.positions[place + side])) for side in (0, 1))
            for _ in range(_HALVINGS):
                middle = at((left.position + right.position) / 2)
                halves = (left, middle), (middle, right)
                left, right = max(halves, key=lambda pair: abs(_unexplained(*pair)))
            height = _unexplained(left, right)
            if abs(height) > smallest:
                found.append(Jump((left.position + right.position) / 2, height, *_event(left.spikes, right.spikes)))
    return found


def _unexplained(left: _Side, right: _Side) -> float:
    return right.loss - left.loss - (right.position - left.position) * (left.slope + right.slope) / 2


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Record the spikes that layers return, call by call, in the order of their first calls."""
    spikes: dict[str, list[Any]] = {}

    def remember(seen: Seen) -> None:
        kept = seen.spikes.detach() if isinstance(seen.spikes, Tensor) else seen.spikes
        spikes.setdefault(seen.name, []).append(kept)

    with watching(layers, remember):
        yield spikes


def _event(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> tuple[str, str | None, int, float]:
    for name, first in before.items():
        change = _steps_change if isinstance(first[0], Tensor) else _times_change
        event, neurons, shift = change(first, after[name])
        if event != EVENTS[3]:
            return event, name, neurons, shift
    return EVENTS[3], None, 0, 0.0


def _steps_change(before: list[Tensor], after: list[Tensor]) -> tuple[str, int, float]:
    """Compare spikes in time steps: one tensor with time first, or one for each step."""
    a, b = (calls[0] if len(calls) == 1 else torch.stack(calls) for calls in (before, after))
    changed = (a != b).any(0)
    neurons = int(changed.sum())
    if not neurons:
        return EVENTS[3], 0, 0.0
    if bool((a.sum(0) != b.sum(0)).any()):
        return EVENTS[0], neurons, 0.0
    # A spike that comes n steps later leaves the cumulative count lower by one for n steps.
    moved = (a.cumsum(0) - b.cumsum(0)).abs().sum(0)
    return EVENTS[2], neurons, float(moved.max())


def _times_change(before: list[Any], after: list[Any]) -> tuple[str, int, float]:
    """Compare exact spike trains."""
    a, b = before[0], after[0]
    gained = a.ordinary_counts() != b.ordinary_counts()
    if bool(gained.any()):
        return EVENTS[0], int(gained.sum()), 0.0
    # The same counts: sorted by neuron, the trains match spike by spike.
    places = [spikes.indices.argsort(dim=1, stable=True) for spikes in (a, b)]
    times = [spikes.times.detach().gather(1, place) for spikes, place in zip((a, b), places, strict=True)]
    owners = a.indices.gather(1, places[0])
    shift = torch.where(owners >= 0, (times[1] - times[0]).abs(), 0.0)
    moved = shift > 1e-6 * a.duration
    neurons = torch.zeros_like(gained)
    sample = torch.arange(len(owners), device=owners.device)[:, None].expand_as(owners)
    neurons[sample[moved], owners[moved]] = True
    if not torch.equal(a.indices, b.indices):
        return EVENTS[1], int(neurons.sum()), float(shift.max())
    if bool(moved.any()):
        return EVENTS[2], int(neurons.sum()), float(shift.max())
    return EVENTS[3], 0, 0.0
