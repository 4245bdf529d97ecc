"""Loss and gradient along directions in parameter space, and numbers for how fragmented they are.

The functions take any module and any loss of it, exact networks and surrogate-trained ones alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .spikes import Spikes

__all__ = ["Line", "along", "classify_jumps", "fragmentation", "random_direction", "surface"]

Loss = Callable[[], Tensor]
Direction = Sequence[Tensor]


@dataclass(frozen=True)
class Line:
    """A loss on an equidistant grid along a direction.

    Attributes:
        positions: [P], multiples of the direction.
        loss: [P].
        slope: [P], the gradient that backward gives, along the direction.
    """

    positions: Tensor
    loss: Tensor
    slope: Tensor

    def jumps(self) -> Tensor:
        """[P - 1], what the mean of two neighbouring slopes does not explain of the loss's change between them.

        Shrinks with the cube of the grid's step where the loss is smooth, with the step at a kink, not at all at a
        jump, and with the step where the slope is not that of the loss.
        """
        step = self.positions.diff()
        return (self.loss.diff() - step * (self.slope[1:] + self.slope[:-1]) / 2).abs()


def random_direction(network: nn.Module, seed: int) -> list[Tensor]:
    """A filter-normalised random direction: each row of a parameter has the norm of the network's own row.

    Args:
        network: Whose parameters give the shapes and norms.
        seed: Of the draw.

    Returns:
        One tensor for each parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for parameter in network.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        rows = (drawn.flatten(1), parameter.detach().flatten(1)) if parameter.dim() > 1 else (drawn, parameter.detach())
        norms = [part.norm(dim=-1, keepdim=True) for part in rows]
        direction.append((rows[0] / norms[0].clamp(min=1e-300) * norms[1]).reshape(parameter.shape))
    return direction


def along(network: nn.Module, loss: Loss, direction: Direction, positions: Tensor) -> Line:
    """The loss and its slope along a direction.

    Args:
        network: Changed while measuring, and restored.
        loss: Evaluates the loss of ``network``.
        direction: One tensor for each parameter.
        positions: [P], ascending and equidistant; 0 is the network as it is.

    Returns:
        The line.
    """
    values, slopes = [], []
    with _moving(network) as move:
        for position in positions.tolist():
            value, grads = move([position], [direction], loss)
            values.append(value)
            slopes.append(_inner(grads, direction))
    return Line(positions, torch.tensor(values, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64))


def surface(
    network: nn.Module, loss: Loss, first: Direction, second: Direction, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss [P, P] and its slopes [P, P, 2] over the plane of two directions; arguments as in :func:`along`."""
    size = len(positions)
    values, slopes = torch.empty(size, size, dtype=torch.float64), torch.empty(size, size, 2, dtype=torch.float64)
    with _moving(network) as move:
        for i, x in enumerate(positions.tolist()):
            for j, y in enumerate(positions.tolist()):
                values[i, j], grads = move([x, y], [first, second], loss)
                slopes[i, j, 0], slopes[i, j, 1] = _inner(grads, first), _inner(grads, second)
    return values, slopes


def fragmentation(line: Line, refine: int = 4, window: int = 9) -> dict[str, float]:
    """Numbers for how fragmented a line is.

    Args:
        line: Measured on a fine grid of ``refine``·n + 1 positions.
        refine: The coarse grid takes every so many positions. Default 4.
        window: Width of the moving average that smooths the loss, in positions. Default 9.

    Returns:
        jump: the largest of :meth:`Line.jumps`; jump_ratio: it over the one on the coarse grid, 1 for a jump, 1/refine
        for a kink and less where the loss is smooth; variation_ratio: total variation over that of the smoothed loss,
        without the ends; angle: in degrees, between the slopes and central differences, over the whole line.

    Raises:
        ValueError: Too few positions.
    """
    if len(line.positions) < max(2 * refine, window) + 1:
        raise ValueError(f"{len(line.positions)} positions are too few; at least {max(2 * refine, window) + 1}")
    coarse = Line(line.positions[::refine], line.loss[::refine], line.slope[::refine])
    jump, coarse_jump = float(line.jumps().max()), float(coarse.jumps().max())
    smooth = line.loss.unfold(0, window, 1).mean(1)
    inner = line.loss[window // 2 : len(line.loss) - window // 2]
    difference = (line.loss[2:] - line.loss[:-2]) / (line.positions[2:] - line.positions[:-2])
    cosine = torch.nn.functional.cosine_similarity(difference, line.slope[1:-1], dim=0, eps=1e-300)
    return {
        "jump": jump,
        "jump_ratio": jump / coarse_jump if coarse_jump else 0.0,
        "variation_ratio": float(inner.diff().abs().sum() / smooth.diff().abs().sum().clamp(min=1e-300)),
        "angle": math.degrees(math.acos(max(-1.0, min(1.0, float(cosine))))),
    }


def classify_jumps(
    network: nn.Sequential, inputs: Spikes, direction: Direction, line: Line, smallest: float
) -> dict[str, int]:
    """What happens to the spikes of a single sample where its loss jumps.

    Args:
        network: A stack of spiking layers.
        inputs: One sample.
        direction: Of ``line``.
        line: Of this sample's loss.
        smallest: Jumps below it are not counted.

    Returns:
        How many jumps coincide with a neuron gaining or losing a spike, with a change in the order of spikes alone,
        and with neither.
    """
    counted = {"number of spikes": 0, "order of spikes": 0, "neither": 0}
    with _moving(network) as move:

        def trains(position: float) -> list[Tensor]:
            seen: list[Tensor] = []

            def record() -> Tensor:
                out = inputs
                for layer in network:
                    out = layer(out)
                    seen.append(out.indices[0])
                return out.first().sum()

            move([position], [direction], record)
            return seen

        for place in (line.jumps() > smallest).nonzero()[:, 0].tolist():
            before, after = (trains(float(line.positions[place + side])) for side in (0, 1))
            if any(not torch.equal(a.sort()[0], b.sort()[0]) for a, b in zip(before, after, strict=True)):
                counted["number of spikes"] += 1
            elif any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                counted["order of spikes"] += 1
            else:
                counted["neither"] += 1
    return counted


Move = Callable[[Sequence[float], Sequence[Direction], Loss], tuple[float, list[Tensor]]]


@contextmanager
def _moving(network: nn.Module) -> Iterator[Move]:
    """A function that evaluates loss and gradient elsewhere; the parameters are restored at the end."""
    parameters = list(network.parameters())
    origin = [parameter.detach().clone() for parameter in parameters]

    def move(positions: Sequence[float], directions: Sequence[Direction], loss: Loss) -> tuple[float, list[Tensor]]:
        with torch.no_grad():
            for place, parameter in enumerate(parameters):
                parameter.copy_(origin[place])
                for position, direction in zip(positions, directions, strict=True):
                    parameter.add_(direction[place], alpha=position)
        value = loss()
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        return float(value.detach()), [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)
        ]

    try:
        yield move
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, origin, strict=True):
                parameter.copy_(value)


def _inner(grads: Sequence[Tensor], direction: Direction) -> float:
    return sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
